"""The comparison with other projects as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.plan import Prepared
from benchmarks.peers.quality import Quality, Values
from rlrag.errors import ConfigError
from rlrag.evaluation.question_records import questions_path, read_questions

_TRAINED = ("trained", "tuned_retriever")
_MEASURES = {"em": "em", "f1": "f1", "accuracy": "contained"}
_STEP_SECONDS = ("judge_s", "collect_s", "learn_s", "validate_s")


@dataclass(frozen=True)
class Cost:
    """What a system's training took; None for what is not known."""

    generator_tokens: float | None = None
    training_examples: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One system: its quality, or the reason that it has none."""

    name: str
    quality: Quality | str
    cost: Cost = Cost()


@dataclass(frozen=True)
class OwnRun:
    """A finished run of rlrag: its values a question, and what its training took."""

    name: str
    values: Values
    cost: Cost


def own_run(name: str, run_dir: Path, prepared: Prepared) -> OwnRun:
    """A finished run of rlrag, from its records.

    Raises:
        ConfigError: when the run is not finished or was measured on something else.
    """
    path = run_dir / "evaluation.json"
    if not path.is_file():
        raise ConfigError(f"--runs {name}={run_dir}: it has no evaluation.json; finish it first")
    found = json.loads(path.read_text())
    config = json.loads((run_dir / "config.json").read_text())
    mine = dict(prepared.hashes) | {"K": prepared.config.environment.num_selected}
    theirs = found["hashes"] | {"K": config["environment"]["num_selected"]}
    different = [key for key, value in mine.items() if theirs.get(key) != value]
    if different:
        raise ConfigError(
            f"--runs {name}={run_dir} differs from this comparison in: {', '.join(different)}; "
            "give a run with the same corpus, evaluation questions and passages in context"
        )
    return OwnRun(name, _own_values(name, path, prepared), _own_cost(run_dir))


def _own_values(name: str, evaluation: Path, prepared: Prepared) -> Values:
    """What the system that the run trained answered, in the order of the comparison."""
    answered = read_questions(questions_path(evaluation))
    system = next((each for each in _TRAINED if each in answered.systems), None)
    if system is None:
        raise ConfigError(
            f"--runs {name}: its evaluation has no trained system; give a run that trains something"
        )
    of_id = {question.id: question.systems[system] for question in answered.questions}
    answers = [of_id.get(question.id) for question in prepared.dev.questions]
    if any(answer is None or answer.error is not None for answer in answers):
        raise ConfigError(f"--runs {name}: {system} did not answer all questions")
    return {
        measure: np.array([getattr(answer, field) for answer in answers])
        for measure, field in _MEASURES.items()
    }


def _own_cost(run_dir: Path) -> Cost:
    """Generator tokens, and the seconds of judging, collecting, learning and validating."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seconds = sum(record.get(key, 0.0) for record in records for key in _STEP_SECONDS)
    return Cost(records[-1].get("generator_tokens_total", 0.0), None, seconds)


def report(rows: Sequence[Row], prepared: Prepared, token_budget: int, command: str) -> str:
    """The results as Markdown."""
    config = prepared.config
    lines = [
        f"# {config.recipe}: peers side by side",
        "",
        f"`{command}`; {len(prepared.dev)} questions, {config.environment.num_selected} of "
        f"{prepared.dev.num_candidates} candidates in the prompt, one machine. A peer may spend "
        f"{token_budget:,} tokens of the generator, prompts and answers together. Quality is "
        "measured in the same way for all; minutes are those of training alone, from the start of "
        "a peer's script to its end. The encoding of the corpus that a new retriever needs is not "
        "in them.",
        "",
        *table_lines(rows),
    ]
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Row]) -> list[str]:
    """The table itself, and below it why a system has no figures."""
    lines = [
        "| system | EM (95 %) | F1 (95 %) | contained | EM minus retriever's order (95 %) | p "
        "| generator tokens, k | training examples | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {' | '.join([row.name, *_quality(row.quality), *_cost(row.cost)])} |" for row in rows
    ]
    failed = [f"- {row.name}: {row.quality}" for row in rows if isinstance(row.quality, str)]
    if failed:
        lines += ["", "Not measured:", "", *failed]
    return lines


def _quality(quality: Quality | str) -> list[str]:
    if isinstance(quality, str):
        return ["failed", *["-"] * 4]
    cells = []
    for metric in ("em", "f1"):
        low, high = quality.intervals[metric]
        cells.append(f"{quality.means[metric]:.3f} ({low:.3f}-{high:.3f})")
    cells.append(f"{quality.means['accuracy']:.3f}")
    gain = quality.em_gain
    if gain is None:
        return [*cells, "-", "-"]
    low, high = gain.ci95
    return [*cells, f"{gain.difference:+.3f} ({low:+.3f} to {high:+.3f})", f"{gain.p_value:.2g}"]


def _cost(cost: Cost) -> list[str]:
    return [
        "-" if cost.generator_tokens is None else f"{cost.generator_tokens / 1e3:,.0f}",
        "-" if cost.training_examples is None else f"{cost.training_examples:,}",
        "-" if cost.seconds is None else f"{cost.seconds / 60:.1f}",
    ]
