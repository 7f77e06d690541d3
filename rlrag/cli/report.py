"""Write an HTML report of runs.

    rlrag report --run-dir runs/nq --output report.html
    rlrag report --run-dir runs/m2 --run-dir runs/m8 --output samples.html

Several runs are overlaid and compared. A run that is not finished is shown as far as it went, one
that was not evaluated without a comparison.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlrag.cli.command_line import parse, program_name
from rlrag.errors import ConfigError
from rlrag.evaluation.question_records import EvaluatedQuestions, read_questions
from rlrag.evaluation.report.page import render_report
from rlrag.evaluation.report.paired_tests import between_runs
from rlrag.evaluation.report.run_record import RunRecord, to_json
from rlrag.runs.alarms import Alarms
from rlrag.runs.directory import RunDirectory

_EXAMPLE = "rlrag report --run-dir runs/quickstart --output report.html"
_MOST_NAMED = 5


@dataclass(frozen=True)
class ReportArguments:
    """Flags of `rlrag report`."""

    run_dir: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """Directory of a run; repeat the flag to compare several runs."""
    output: Path
    """HTML file to write."""
    json: Path | None = None
    """Also write the numbers to this JSON file."""


def main(argv: Sequence[str]) -> None:
    """Read, draw, write."""
    if not argv:
        raise _no_run()
    arguments = parse(ReportArguments, None, argv, program_name("report"))
    if not arguments.run_dir:
        raise _no_run()
    _check_place("--output", arguments.output)
    if arguments.json is not None:
        _check_place("--json", arguments.json)
        if arguments.json.resolve() == arguments.output.resolve():
            raise ConfigError(
                f"--output and --json are both {arguments.json}; give two different files"
            )
    names = _names(arguments.run_dir)
    runs = [
        _read(RunDirectory(path), name) for path, name in zip(arguments.run_dir, names, strict=True)
    ]
    _write(arguments.output, render_report(runs))
    if arguments.json is not None:
        record = to_json(runs) | {"between_runs": [asdict(test) for test in between_runs(runs)]}
        _write(arguments.json, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _no_run() -> ConfigError:
    return ConfigError(
        f"no run to report: give --run-dir and --output, such as {_EXAMPLE}; "
        f"the folder runs here {_describe(Path('runs'))}"
    )


def _describe(place: Path) -> str:
    """What lies in a folder that is no run, as the rest of a sentence about it."""
    if not place.exists():
        return "does not exist"
    if not place.is_dir():
        return "is a file"
    inside = sorted(path for path in place.iterdir() if not path.name.startswith("."))
    runs = [path for path in inside if RunDirectory(path).metrics.is_file()]
    if not inside:
        return "is empty"
    what, found = ("the runs", runs) if runs else ("no run, but", inside)
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"holds {what} {', '.join(path.name for path in found[:_MOST_NAMED])}{more}"


def _check_place(flag: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: the directory {path.parent} does not exist")
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a directory; give the name of a file in it")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or what differs in the whole where two runs share it."""
    whole = [path.expanduser().resolve() for path in paths]
    twice = [str(path) for path, count in Counter(whole).items() if count > 1]
    if twice:
        raise ConfigError(f"--run-dir {twice[0]} is given more than once; give each run once")
    shared = Counter(path.name for path in whole)
    above = os.path.commonpath(whole)
    return [path.name if shared[path.name] == 1 else os.path.relpath(path, above) for path in whole]


def _read(run_dir: RunDirectory, name: str) -> RunRecord:
    if not run_dir.config.is_file():
        raise ConfigError(
            f"--run-dir {run_dir.path} is not a run, it {_describe(run_dir.path)}; give the "
            f"directory that rlrag train wrote, as in {_EXAMPLE}"
        )
    config = run_dir.read_config()
    metrics = run_dir.read_metrics()
    if not metrics:
        from rlrag.bundle_files import FACTS  # brings torch, which no report needs

        if (run_dir.path / FACTS).is_file():
            raise ConfigError(
                f"--run-dir {run_dir.path} is a bundle; give the directory of the run that wrote "
                f"it, such as {run_dir.path.parent}"
            )
        raise ConfigError(
            f"--run-dir {run_dir.path} has no metrics yet; wait for the run's first step"
        )
    alarms = Alarms(config).replay(metrics)
    evaluation = run_dir.read_evaluation()
    questions = _read_questions(run_dir, evaluation)
    is_trained = run_dir.bundle.is_dir()
    return RunRecord(name, config, metrics, alarms, evaluation, questions, is_trained)


def _read_questions(
    run_dir: RunDirectory, evaluation: dict[str, Any] | None
) -> EvaluatedQuestions | None:
    """The questions of this very evaluation, where it kept them."""
    if evaluation is None or not run_dir.questions.is_file():
        return None
    found = read_questions(run_dir.questions)
    return found if found.belongs_to(evaluation) else None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; choose another file"
        ) from error
    print(f"written to {path}", file=sys.stderr)
