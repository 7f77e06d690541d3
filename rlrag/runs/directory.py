"""The run directory: paths of configuration, metrics, checkpoints, bundle and results.

DIR/config.json       the resolved configuration; the same command continues the run
DIR/metrics.jsonl     one object a finished step
DIR/sources.json      hashes of the corpus and the questions that it is trained on
DIR/feedback.sqlite   where a selector is trained on a log, that log as the run found it
DIR/pools/            where a retriever is trained, what the generator made of first candidates
DIR/experience/       where it is kept, every selection that was drawn and its reward
DIR/rounds/           where parts are trained in turns, a run directory for each turn
DIR/indexes/          where it is refreshed in training, versions of the retriever's index
DIR/checkpoints/      what a stopped run continues from
DIR/bundle/           what evaluation and serving load
DIR/evaluation.json   the final comparison
DIR/evaluation.questions.jsonl   its questions, with what every system picked and answered
DIR/logs/             what was said, as lines of JSON, and TensorBoard's files
DIR/profile/          where they are asked for, traces of chosen steps
DIR/may-run           there while steps run; they end when it is emptied
DIR/in-use            there while a process works in the directory, and names it
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError, DataError, InUseError, RunDirectoryError
from rlrag.evaluation.question_records import questions_path
from rlrag.files.locks import held
from rlrag.files.text import delete_rubbish, write_whole

_PLACEMENT = frozenset(
    {
        *("training.launcher", "training.num_workers", "training.worker_threads"),
        *("training.worker_cpus", "training.worker_gpus", "training.worker_placement"),
        "training.max_failures",
        *("generator.num_actors", "generator.cpus_per_actor", "generator.gpus_per_actor"),
        *("generator.threads_per_actor", "generator.tensor_parallel"),
        *("generator.placement", "generator.request_timeout_s"),
    }
)
"""Fields that say on what a run is computed, and not what: they may change when it continues."""

_AROUND = (
    *("evaluation.", "mirror.", "data.eval_questions", "data.max_eval_questions"),
    *("training.loggers", "training.metrics_", "training.profile_steps", "training.keep_"),
)
"""Beginnings of fields that say what is done with the weights, and not what they become: what they
are compared with at the end, where they are copied to, how the run is watched, which checkpoints
stay. These may change too.
"""


class RunDirectory:
    """Paths below one directory, and the records that are appended there."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.sources = self.path / "sources.json"
        self.feedback = self.path / "feedback.sqlite"
        self.pools = self.path / "pools"
        self.experience = self.path / "experience"
        self.rounds = self.path / "rounds"
        self.indexes = self.path / "indexes"
        self.checkpoints = self.path / "checkpoints"
        self.bundle = self.path / "bundle"
        self.evaluation = self.path / "evaluation.json"
        self.questions = questions_path(self.evaluation)
        self.logs = self.path / "logs"
        self._may_run = self.path / "may-run"
        self._lock = self.path / "in-use"
        self._made: list[Path] = []

    def check(self, config: RunConfig) -> None:
        """Check that a run of this configuration may use the directory; nothing is written.

        Raises:
            RunDirectoryError: when it holds a run with another configuration, naming the fields, or
                files that are no run, or when its path is no Unicode text.
        """
        try:
            str(self.path.absolute()).encode()
        except UnicodeEncodeError as error:  # bundles and records are written with it
            raise RunDirectoryError(
                f"--run-dir {os.fsencode(self.path.absolute())!r} is not valid UTF-8; rename the "
                "folder, or choose another --run-dir"
            ) from error
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file; choose another --run-dir")
        if self.config.is_file():
            kept = self.read_config()
            check_same_run(kept, config, str(self.path), "--run-dir")
        elif self.path.exists() and not set(self._visible()) <= {
            self._lock,
            self.logs,
            self.pools,  # these say themselves what they were made from
            self.rounds,
        }:
            raise RunDirectoryError(
                f"{self.path} contains files but no config.json, so it is not a run; choose "
                "another --run-dir"
            )

    def _visible(self) -> list[Path]:
        return [path for path in self.path.iterdir() if not path.name.startswith(".")]

    @contextmanager
    def in_use(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keep other processes out of the directory during the block.

        The process that launches a run does this; its workers write on its behalf. What killed ones
        left half-built or half-deleted is cleared.

        Args:
            say: Tells people from whom the directory was taken over.

        Raises:
            InUseError: when another process works there.
            RunDirectoryError: when the directory cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(self._lock, str(self.path), say))
                for place in (self.path, *self.rounds.glob("*")):
                    for directory in (place, place / "checkpoints", place / "experience"):
                        delete_rubbish(directory, re.compile(".*"))
            except InUseError:
                raise
            except OSError as error:
                raise self._unwritable(error) from error
            yield

    def claim(self, config: RunConfig) -> None:
        """Create the directory, or check that it belongs to this configuration.

        Raises:
            RunDirectoryError: as `check`, or when the directory cannot be written.
        """
        self.check(config)
        self._made += [p for p in (self.config, self.feedback, self.sources) if not p.exists()]
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_whole(self.config, config.to_json())
        except OSError as error:
            raise self._unwritable(error) from error

    def read_config(self) -> RunConfig:
        """The configuration of the run.

        Raises:
            ConfigError: when the file is missing or damaged.
        """
        try:
            text = self.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self.config} cannot be read ({error}); restore it, or choose another --run-dir"
            ) from error
        return RunConfig.from_json(text, str(self.config))

    def check_sources(self, hashes: Mapping[str, str]) -> None:
        """Check that the run goes on with the data that it began with, or note what it begins with.

        Args:
            hashes: Of the corpus and the questions that are trained on, by name.

        Raises:
            RunDirectoryError: naming what has changed.
            DataError: when what the run noted is damaged.
            CheckpointError: when the disk is full.
        """
        if self.sources.is_file() and self.metrics.is_file():
            try:
                before = dict(json.loads(self.sources.read_bytes()))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{self.sources} is damaged ({error}); delete it if corpus and questions "
                    "have not changed since the start of the run"
                ) from error
            changed = [name for name in hashes if before.get(name) != hashes[name]]
            if changed:
                raise RunDirectoryError(
                    f"{self.path} was trained on a different version of {' and '.join(changed)}; "
                    "restore that version, or choose another --run-dir (--from starts there "
                    "with the weights of this run)"
                )
            return
        try:
            write_whole(self.sources, json.dumps(dict(hashes), indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(_cannot_write(self.sources, error)) from error

    def check_records(self, step: int) -> None:
        """Check that every step of a checkpoint that a run continues from is recorded.

        Raises:
            DataError: when records are gone.
        """
        found = {record["step"] for record in self.read_metrics()}
        lacking = next((number for number in range(step + 1) if number not in found), None)
        if lacking is not None:
            raise DataError(
                f"{self.metrics} has no record of step {lacking}, which the checkpoint of step "
                f"{step} includes; restore the file, or choose another --run-dir"
            )

    def _unwritable(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"cannot write to {self.path}: {error.strerror or error}; choose another --run-dir"
        )

    def release(self) -> None:
        """Give up the claim of a run that failed before its first record.

        What this process made is deleted, so that the directory takes a corrected configuration. A
        run that has records keeps its own.
        """
        if not self.metrics.exists():
            for path in self._made:
                path.unlink(missing_ok=True)

    def allow_to_run(self) -> None:
        """Begin without the wish to end; what an earlier process was asked is over.

        Raises:
            CheckpointError: when the disk is full.
        """
        # Its content is the sign, and not whether it is there: shared storage may hide a new file
        # for half a minute, but shows what one that is opened holds now. A full disk can empty it.
        try:
            self._may_run.write_text("yes\n")
        except OSError as error:
            raise CheckpointError(_cannot_write(self.metrics, error)) from error

    def ask_to_stop(self) -> None:
        """Ask the loop that works here, in whichever process, to end after its present step."""
        os.truncate(self._may_run, 0)

    def stop_is_asked(self) -> bool:
        """Whether the loop was asked to end."""
        try:
            return not self._may_run.read_text()
        except FileNotFoundError:  # nobody who could ask launched it
            return False

    def forget_stop(self) -> None:
        """Take the sign away once its loop has ended."""
        self._may_run.unlink(missing_ok=True)

    def truncate_metrics(self, num_steps: int) -> None:
        """Drop the records of steps that the checkpoint to continue from does not contain.

        Raises:
            CheckpointError: when the disk is full; the records then stay as they were.
        """
        self.replace_metrics([line for line in self.read_metrics() if line["step"] <= num_steps])

    def replace_metrics(self, records: list[dict[str, Any]]) -> None:
        """Let these be all the records.

        Raises:
            CheckpointError: when the disk is full; the records then stay as they were.
        """
        try:
            write_whole(self.metrics, "".join(json.dumps(line) + "\n" for line in records))
        except OSError as error:
            raise CheckpointError(_cannot_write(self.metrics, error)) from error

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Add the record of one step.

        Raises:
            CheckpointError: when the disk is full.
        """
        try:
            with self.metrics.open("a") as stream:
                stream.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise CheckpointError(_cannot_write(self.metrics, error)) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole records; a last line cut short by a kill is left out.

        Raises:
            DataError: when the file is damaged.
        """
        if not self.metrics.is_file():
            return []
        records = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{self.metrics}:{number} is damaged: it is not a record of a step; restore "
                    "the file, or choose another --run-dir"
                ) from error
            records.append(record)
        return records

    def read_evaluation(self) -> dict[str, Any] | None:
        """The final comparison; None before there is one.

        Raises:
            DataError: when the file is damaged.
        """
        if not self.evaluation.is_file():
            return None
        try:
            found: Any = json.loads(self.evaluation.read_text())
            if not isinstance(found, dict) or not {"systems", "num_questions"} <= found.keys():
                raise ValueError("it contains no comparison of systems")
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.evaluation} is damaged: {error}; delete it and run rlrag train again, "
                "which then only evaluates"
            ) from error
        return found


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror or error}; free space, then run the same command "
        "again: it continues from the last checkpoint"
    )


def check_same_run(kept: RunConfig, given: RunConfig, place: str, flag: str) -> None:
    """Check that a run of one configuration may be continued by the other.

    They may differ in what the run is computed on: launcher, workers, actors, and how long is
    waited for them. The steps are the same then, their sums equal up to rounding. They may differ
    in what is done with the weights, too: evaluation, mirror, loggers, which checkpoints are kept.

    Raises:
        RunDirectoryError: naming the fields that differ otherwise, and the flag of the place.
    """
    differing = describe_differences(kept, given)
    if differing:
        raise RunDirectoryError(
            f"{place} belongs to a run with another configuration ({'; '.join(differing)}); choose "
            f"another {flag}, or give the same flags to continue that run"
        )


def describe_differences(kept: RunConfig, given: RunConfig) -> list[str]:
    """`section.field: kept -> given` for every leaf of what is computed that differs."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for n, x in value.items() for k, v in leaves(x, f"{path}.{n}").items()}
        return {path.lstrip("."): value}

    before = leaves(kept.model_dump(mode="json"), "")
    after = leaves(given.model_dump(mode="json"), "")
    names = sorted(name for name in before.keys() - _PLACEMENT if not name.startswith(_AROUND))
    return [
        f"{name}: {before[name]!r} there, {after[name]!r} given"
        for name in names
        if before[name] != after[name]
    ]
