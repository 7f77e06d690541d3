"""Runs in; the paired tests that a report shows of them, corrected for their number, out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from rlrag.evaluation.run_record import RunRecord
from rlrag.evaluation.significance import (
    holm_correction,
    paired_bootstrap_ci,
    paired_randomization_test,
)

_OF_EVALUATION = {
    "EM": ("em_diff", "ci95", "p_value"),
    "F1": ("f1_diff", "f1_ci95", "f1_p_value"),
    "accuracy": ("accuracy_diff", "accuracy_ci95", "accuracy_p_value"),
}
_OF_ANSWER = {"EM": "em", "F1": "f1", "accuracy": "contained"}


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
    found = []
    for name, pair in evaluation.get("paired", {}).items():
        ours, _, theirs = name.partition("_vs_")
        for measure, (difference, interval, p_value) in _OF_EVALUATION.items():
            if difference in pair:
                low, high = pair[interval]
                p = pair[p_value]
                found.append(PairedTest(ours, theirs, measure, pair[difference], (low, high), p, p))
    return _corrected(found)


def between_runs(runs: Sequence[RunRecord]) -> list[PairedTest]:
    """What each run trained against what every later one did, on questions that both answered.

    Runs that kept no answers, or were evaluated on other questions, are not compared.
    """
    answered = [(run, values) for run in runs if (values := dict(_answers(run)))]
    found = []
    for (first, theirs), (second, ours) in combinations(answered, 2):
        shared = [key for key in ours if key in theirs]
        if not shared or _questions_hash(first) != _questions_hash(second):
            continue
        for place, measure in enumerate(_OF_ANSWER):
            ours_Q = np.array([ours[key][place] for key in shared])
            theirs_Q = np.array([theirs[key][place] for key in shared])
            p_value = paired_randomization_test(ours_Q, theirs_Q)
            found.append(
                PairedTest(
                    second.name,
                    first.name,
                    measure,
                    float(ours_Q.mean() - theirs_Q.mean()),
                    paired_bootstrap_ci(ours_Q, theirs_Q),
                    p_value,
                    p_value,
                )
            )
    return _corrected(found)


def _answers(run: RunRecord) -> Iterator[tuple[str, tuple[float, ...]]]:
    """A question's id and the measures of what the trained system answered, where it did."""
    for question in run.questions.questions if run.questions is not None else ():
        answer = question.systems.get(run.main_system)
        if answer is not None and answer.error is None:
            yield question.id, tuple(getattr(answer, name) for name in _OF_ANSWER.values())


def _questions_hash(run: RunRecord) -> Any:
    return (run.evaluation or {}).get("hashes", {}).get("questions")


def _corrected(tests: Sequence[PairedTest]) -> list[PairedTest]:
    if not tests:
        return []
    corrected = holm_correction([test.p_value for test in tests])
    return [
        replace(test, corrected_p_value=float(p)) for test, p in zip(tests, corrected, strict=True)
    ]
