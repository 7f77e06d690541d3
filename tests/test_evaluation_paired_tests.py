"""Tests of a report: which are made, on which questions, and corrected for their number."""

from __future__ import annotations

import pytest

from rlrag.config import RunConfig
from rlrag.evaluation.question_records import (
    EvaluatedQuestion,
    EvaluatedQuestions,
    SystemAnswer,
)
from rlrag.evaluation.report.paired_tests import between_runs, within_run
from rlrag.evaluation.report.run_record import RunRecord


def answer(em: float | None) -> SystemAnswer:
    error = "no answer" if em is None else None
    return SystemAnswer((), None, "a", error, em, em, em)


def run(name: str, values: list[float | None], asked: str = "q", kept: bool = True) -> RunRecord:
    questions = tuple(
        EvaluatedQuestion(f"q{row}", "", (), (), None, {}, {"trained": answer(em)})
        for row, em in enumerate(values)
    )
    evaluation = {"hashes": {"questions": asked}}
    answered = EvaluatedQuestions(evaluation, {}, questions) if kept else None
    return RunRecord(name, RunConfig(), ({"step": 0},), (), evaluation, answered)


def test_two_runs_are_compared_on_what_both_answered() -> None:
    first = run("first", [0, 0, 0, 0, 0, 1, 1, None])
    second = run("second", [1, 1, 1, 1, 1, 1, None, 1])
    tests = between_runs([first, second])
    assert [test.measure for test in tests] == ["EM", "F1", "accuracy"]
    for test in tests:
        assert (test.ours, test.theirs) == ("second", "first")
        assert test.difference == pytest.approx(5 / 6)
        assert test.ci95[0] <= test.difference <= test.ci95[1] == 1
        assert test.p_value == 2 / 2**5
        assert test.corrected_p_value == 3 * 2 / 2**5


def test_three_runs_are_compared_pair_by_pair_in_one_correction() -> None:
    tests = between_runs([run("a", [0] * 6), run("b", [1] * 6), run("c", [1] * 6)])
    assert [(test.ours, test.theirs) for test in tests[::3]] == [("b", "a"), ("c", "a"), ("c", "b")]
    corrected = [test.corrected_p_value for test in tests]
    assert corrected == [9 * 2 / 2**6] * 6 + [1] * 3


@pytest.mark.parametrize(
    "other", [run("other", [1] * 6, "others"), run("other", [1] * 6, kept=False), run("other", [])]
)
def test_runs_that_share_no_questions_are_not_compared(other: RunRecord) -> None:
    assert between_runs([run("first", [0] * 6), other]) == []


def test_a_runs_own_comparisons_are_corrected_together() -> None:
    em = {"em_diff": 0.25, "ci95": [0.1, 0.4], "p_value": 0.01}
    f1 = {"f1_diff": 0.5, "f1_ci95": [0.2, 0.8], "f1_p_value": 0.04}
    tests = within_run({"paired": {"trained_vs_retriever_order": em, "a_vs_b": em | f1}})
    assert [(test.ours, test.theirs, test.measure) for test in tests] == [
        ("trained", "retriever_order", "EM"),
        ("a", "b", "EM"),
        ("a", "b", "F1"),
    ]
    assert tests[2].difference == 0.5
    assert tests[2].ci95 == (0.2, 0.8)
    assert [test.corrected_p_value for test in tests] == pytest.approx([0.03, 0.03, 0.04])
    assert within_run({}) == []
