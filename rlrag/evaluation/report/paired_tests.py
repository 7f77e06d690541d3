"""The paired significance tests of a report, corrected for multiple comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rlrag.evaluation.report.run_record import RunRecord
from rlrag.evaluation.significance import holm_correction
from rlrag.evaluation.table import SystemMetrics, compare

_MEASURES = {
    "EM": ("em_diff", "ci95", "p_value"),
    "F1": ("f1_diff", "f1_ci95", "f1_p_value"),
    "accuracy": ("accuracy_diff", "accuracy_ci95", "accuracy_p_value"),
    "reward": ("reward_diff", "reward_ci95", "reward_p_value"),
}
"""Fields of a comparison, as `evaluation.json` has them too."""

_Values = tuple[float | None, ...]


@dataclass(frozen=True)
class PairedTest:
    """One measure of two systems on the same questions.

    `corrected_p_value` is Holm's for all tests that stand in one list.
    """

    ours: str
    theirs: str
    measure: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    corrected_p_value: float


def within_run(evaluation: Mapping[str, Any]) -> list[PairedTest]:
    """The comparisons of one run's `evaluation.json`."""
    pairs = []
    for name, comparison in evaluation.get("paired", {}).items():
        ours, _, theirs = name.partition("_vs_")
        pairs.append((ours, theirs, comparison))
    return _corrected(pairs)


def between_runs(runs: Sequence[RunRecord]) -> list[PairedTest]:
    """What each run trained against what every later one did, on questions that both answered.

    Runs that kept no answers, or were evaluated on other questions, are not compared.
    """
    answered = [(run, values) for run in runs if (values := dict(_answers(run)))]
    pairs = []
    for (first, theirs), (second, ours) in combinations(answered, 2):
        shared = [key for key in ours if key in theirs]
        if shared and _questions_hash(first) == _questions_hash(second):
            comparison = compare(_metrics(ours, shared), _metrics(theirs, shared))
            pairs.append((second.name, first.name, vars(comparison)))
    return _corrected(pairs)


def _answers(run: RunRecord) -> Iterator[tuple[str, _Values]]:
    """A question's id and the measures of what the trained system answered, where it did."""
    for question in run.questions.questions if run.questions is not None else ():
        answer = question.systems.get(run.main_system)
        if answer is not None and answer.em is not None:
            yield question.id, (answer.em, answer.f1, answer.contained)


def _metrics(values: Mapping[str, _Values], shared: Sequence[str]) -> SystemMetrics:
    columns = np.array([values[key] for key in shared], dtype=np.float64).T
    return SystemMetrics(*columns)


def _questions_hash(run: RunRecord) -> Any:
    return (run.evaluation or {}).get("hashes", {}).get("questions")


def _corrected(pairs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[PairedTest]:
    """The tests of comparisons of two named systems, ours first."""
    found = [
        (ours, theirs, measure, comparison[difference], tuple(comparison[interval]), comparison[p])
        for ours, theirs, comparison in pairs
        for measure, (difference, interval, p) in _MEASURES.items()
        if comparison.get(difference) is not None
    ]
    if not found:
        return []
    corrected = holm_correction([p_value for *_, p_value in found])
    return [PairedTest(*test, float(p)) for test, p in zip(found, corrected, strict=True)]
