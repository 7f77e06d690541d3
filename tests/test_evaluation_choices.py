"""What a policy picked: a choice, an order, or the same for every question."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_evaluation_report import Page, evaluation
from test_evaluation_report import run as run_record
from test_evaluation_systems import run, three_questions

from rlrag.config import DROConfig
from rlrag.evaluation.baselines import UNTRAINED, Baseline, baselines_to_json
from rlrag.evaluation.choices import MIN_QUESTIONS, Choices
from rlrag.evaluation.report.page import render_report


def picks(*parts: tuple[tuple[int, ...], int]) -> np.ndarray:
    return np.array([row for row, times in parts for _ in range(times)])


def test_sets_orders_and_places_are_counted_by_hand() -> None:
    choices = Choices.of(picks(((0, 1), 3), ((1, 0), 4), ((2, 0), 2), ((3, 4), 1)), 5, 2)
    assert (choices.num_questions, choices.num_selected) == (10, 2)
    assert (choices.num_other_set, choices.num_other_order) == (3, 4)
    assert choices.first == (3, 4, 2, 1, 0)
    assert choices.last == (6, 3, 0, 0, 1)
    assert (choices.usual, choices.num_usual) == ((2, 1), 4)
    assert choices.describe() == [
        "trained picks other passages than the retriever's first 2 for 3 of 10 questions, the same "
        "in another order for 4",
        "by the retriever's position: picked first 1 in 30 %, 2 in 40 %, 3 in 20 %, 4 in 10 %; "
        "last 1 in 60 %, 2 in 30 %, 5 in 10 %",
    ]
    assert Choices.from_json(json.loads(json.dumps(choices.to_json()))) == choices


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (picks(((1, 0), 275), ((2, 0), 4)), "positions (2, 1) for 275 of 279 questions: it has"),
        (picks(((0, 1), 275), ((2, 0), 4)), "keeps the retriever's order and has learned no"),
        # One of four others first, the retriever's first last: one place is constant.
        (
            picks(((1, 0), 83), ((2, 0), 68), ((3, 0), 63), ((4, 0), 61), ((0, 1), 4)),
            "position 1 last for 275 of 279 questions",
        ),
        (picks(((2, 0), 30), ((2, 1), 30)), "position 3 first for 60 of 60 questions"),
        (picks(((1, 0), 95), ((2, 3), 5)), "positions (2, 1) for 95 of 100 questions"),
        (picks(((1, 0), 94), ((2, 3), 6)), None),
        (picks(((1, 0), MIN_QUESTIONS - 1)), None),
        (picks(((2,), 50)), "positions (3) for 50 of 50 questions"),
    ],
)
def test_what_is_the_same_for_nearly_every_question_is_named(found, said) -> None:
    constant = Choices.of(found, 5, found.shape[1]).constant
    assert constant is None if said is None else said in constant


def test_fewer_picks_than_allowed_are_another_set() -> None:
    choices = Choices.of([(0,), (), (0, 1), (1, 0)], 5, 2)
    assert (choices.num_other_set, choices.num_other_order) == (2, 1)
    assert (choices.first, choices.last) == ((2, 1, 0, 0, 0), (2, 1, 0, 0, 0))


def test_one_candidate_leaves_nothing_to_choose() -> None:
    assert Choices.of(picks(((0,), 50)), 1, 1).constant is None


def test_what_a_trained_policy_picks_is_counted():
    found = run(three_questions(), "trained", num_selected=2, algorithm=DROConfig()).choices
    assert found is not None
    assert (found.num_other_set, found.usual, found.num_usual) == (3, (3, 2), 3)
    assert run(three_questions(), "trained").choices is None


def test_a_result_says_what_it_is_compared_with_and_what_the_policy_picked():
    found = evaluation() | {
        "baselines": baselines_to_json([Baseline("retriever_order", UNTRAINED, 5, 60)]),
        "choices": Choices.of(np.array([[1, 0]] * 39 + [[2, 0]]), 5, 2).to_json(),
    }
    text = Page(render_report([run_record(evaluation=found)])).text
    strongest = "trained minus retriever_order, the strongest untrained system on 60 validation"
    assert strongest in text
    assert "other passages than the retriever's first 2 for 1 of 40 questions" in text
    assert "picks positions (2, 1) for 39 of 40 questions: it has learned an order, not a" in text
    assert "it has learned" not in Page(render_report([run_record()])).text
