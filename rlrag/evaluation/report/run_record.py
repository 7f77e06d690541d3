"""Reads the files of a finished or running run for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlrag.config import AlternatingConfig, FeedbackConfig, JSAConfig, RunConfig
from rlrag.evaluation.question_records import EvaluatedQuestions

Point = tuple[float, float]


class Finding(Protocol):
    """A warning that a run raised."""

    @property
    def name(self) -> str:
        """Which rule it is."""
        ...

    @property
    def step(self) -> int:
        """The step that raised it."""
        ...

    @property
    def text(self) -> str:
        """What was seen and what to try."""
        ...


@dataclass(frozen=True)
class IterationQuality:
    """The last validation within one pass over the training questions; 0 is before training."""

    iteration: int
    em: float
    f1: float


@dataclass(frozen=True)
class RunRecord:
    """One run: its configuration, the metrics of every step, its alarms and its final comparison.

    `evaluation` is the content of `evaluation.json`, None while the run is unfinished, and for a
    turn or a run that compares no systems; `questions` is what that evaluation kept of each
    question, None where it kept nothing. `is_trained` says whether the bundle is written.
    """

    name: str
    config: RunConfig
    metrics: Sequence[Mapping[str, Any]]
    alarms: Sequence[Finding]
    evaluation: Mapping[str, Any] | None
    questions: EvaluatedQuestions | None = None
    is_trained: bool = False

    @property
    def state(self) -> str:
        """How far the run came."""
        if self.evaluation is not None:
            return "finished"
        return "trained, not evaluated" if self.is_trained else "unfinished"

    @property
    def num_samples(self) -> int | None:
        """Selections drawn a question (m); one under `sft`, the steps of a chain under `jsa`.

        None where a retriever alone is trained by OpenRAG, or a selector on a service's log: these
        draw none; nor is it known of a trainer of somebody's own.
        """
        if isinstance(self.config.algorithm, JSAConfig):
            return self.config.algorithm.mis_steps
        draws = self.config.algorithm.name in ("dro", "sft", "alternating")
        return self.config.dro.num_samples if draws else None

    @property
    def algorithm(self) -> str:
        """What the parts were trained by."""
        return self.config.algorithm.name

    @property
    def num_epochs(self) -> int:
        """Passes over the training questions that the configuration asks for."""
        algorithm, num_epochs = self.config.algorithm, self.config.training.num_epochs
        if isinstance(algorithm, FeedbackConfig):
            return algorithm.num_epochs
        of_retriever = self.config.openrag.offline_epochs + self.config.openrag.online_epochs
        if isinstance(algorithm, AlternatingConfig):
            return algorithm.rounds * (of_retriever + num_epochs)
        return of_retriever if self.config.trains_by_openrag else num_epochs

    @property
    def main_system(self) -> str:
        """The system that the run was for."""
        alone = self.config.algorithm.parts == ("retriever",)
        return "tuned_retriever" if alone else "trained"

    @property
    def num_steps(self) -> int:
        """The last recorded step."""
        return int(self.metrics[-1]["step"])

    @property
    def epoch(self) -> float:
        """Passes over the training questions at the last recorded step."""
        return float(self.metrics[-1].get("epoch", math.nan))

    def failures(self) -> dict[str, int]:
        """Why rewards could not be computed, with the first step that says so."""
        found: dict[str, int] = {}
        for record in self.metrics:
            for text in record.get("failures", ()):
                found.setdefault(text, int(record["step"]))
        return found

    def metric_names(self) -> list[str]:
        """Every metric that is a number in some record, in the order of appearance."""
        names: dict[str, None] = {}
        for record in self.metrics:
            names.update((name, None) for name, value in record.items() if is_number(value))
        return list(names)

    def series(self, name: str, against: str = "step") -> list[Point]:
        """A metric against another, for the steps that recorded both; NaN where it was NaN."""
        return [
            (float(record[against]), float(record[name]))
            for record in self.metrics
            if is_number(record.get(name)) and math.isfinite(_number(record.get(against)))
        ]

    def values(self, name: str) -> list[float]:
        """The finite values of a metric over the steps."""
        return [value for _, value in self.series(name) if math.isfinite(value)]

    def mean(self, name: str) -> float | None:
        """Mean over the steps, None where it was never recorded."""
        values = self.values(name)
        return sum(values) / len(values) if values else None

    def variance(self, name: str) -> float | None:
        """Variance over the steps (divided by their number less 1), None below two steps."""
        values = self.values(name)
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        return sum((value - mean) ** 2 for value in values) / (len(values) - 1)

    def phases(self) -> dict[str, float]:
        """Seconds of the whole run in each phase: all metrics `*_s` that are not a rate."""
        return {
            name.removesuffix("_s"): sum(self.values(name))
            for name in self.metric_names()
            if name.endswith("_s") and not name.endswith("_per_s")
        }

    def tokens(self) -> dict[str, float]:
        """Tokens of training, of prompts and answers.

        Those of the steps were computed or found in the cache; the rest was asked for before them.
        """
        computed = sum(self.values("generator_tokens_spent"))
        cached = sum(self.values("generator_tokens_saved"))
        total = (self.values("generator_tokens_total") or [0.0])[-1]
        return {
            "before the steps": max(0.0, total - computed - cached),
            "computed": computed,
            "from the cache": cached,
        }

    def weight_statistics(self) -> dict[str, float | None]:
        """What the weights and the gradient were like, over all steps."""
        ess, num_samples = self.mean("ess"), self.num_samples
        return {
            "ess": ess,
            "ess_share": None if ess is None or num_samples is None else ess / num_samples,
            "weight_entropy": self.mean("weight_entropy"),
            "log_weight_variance": self.mean("log_weight_variance"),
            "grad_norm": self.mean("grad_norm"),
            "grad_norm_variance": self.variance("grad_norm"),
            "generator_grad_variance": self.mean("generator/grad_variance"),
        }

    def iterations(self) -> list[IterationQuality]:
        """Validation quality after each pass over the training questions (the paper's Table 3)."""
        last: dict[int, IterationQuality] = {}
        for record in self.metrics:
            epoch, em, f1 = (
                _number(record.get(name)) for name in ("epoch", "validation/em", "validation/f1")
            )
            if math.isfinite(epoch + em + f1):
                number = math.ceil(epoch - 1e-9)
                last[number] = IterationQuality(number, em, f1)
        return [last[number] for number in sorted(last)]

    def system(self, name: str) -> Mapping[str, Any] | None:
        """One line of the final comparison, None where there is none."""
        systems = (self.evaluation or {}).get("systems", {})
        found: Mapping[str, Any] | None = systems.get(name)
        return found

    def flat_config(self) -> dict[str, Any]:
        """`section.field` and value of every configured field."""
        return _leaves(self.config.model_dump(mode="json"), "")


def is_number(value: Any) -> bool:
    """Whether a value of a record can be drawn; lists, texts and truth values cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def differing_fields(runs: Sequence[RunRecord]) -> list[str]:
    """Configured fields whose values are not the same in all runs."""
    flat = [run.flat_config() for run in runs]
    names = dict.fromkeys(name for leaves in flat for name in leaves)
    return [n for n in names if any(leaves.get(n) != flat[0].get(n) for leaves in flat)]


def to_json(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """All numbers of a report as values that `json.dumps` takes; None for what is not finite."""
    return {"runs": [_finite(_run_json(run)) for run in runs]}


def _run_json(run: RunRecord) -> dict[str, Any]:
    return {
        "name": run.name,
        "recipe": run.config.recipe,
        "seed": run.config.seed,
        "num_samples": run.num_samples,
        "num_steps": run.num_steps,
        "epoch": run.epoch,
        "finished": run.evaluation is not None,
        "config": run.config.model_dump(mode="json"),
        "evaluation": run.evaluation,
        "alarms": [{"name": a.name, "step": a.step, "text": a.text} for a in run.alarms],
        "failures": run.failures(),
        "weight_statistics": run.weight_statistics(),
        "iterations": [vars(quality) for quality in run.iterations()],
        "phase_seconds": run.phases(),
        "tokens": run.tokens(),
        "metrics": {name: run.series(name) for name in run.metric_names() if name != "step"},
    }


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which are no JSON, by None."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _leaves(inner, f"{path}.{name}" if path else name)
    return found
