"""Where answers come from, and abstention, on answers written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlrag.evaluation.probe.attribution import abstains, abstention, attribution
from rlrag.records import Passage, Question

PARIS = Passage("fr", "France", "The capital, Paris, lies on the Seine.")
BERLIN = Passage("de", "Germany", "Its capital is Berlin.")


def question(*golden: str) -> Question:
    return Question("q", "which capital?", golden)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", True),
        ("  the. ", True),
        ("Unknown.", True),
        ("N/A", True),
        ("I don't know", True),
        ("There is no answer in the passage.", True),
        ("The question cannot be answered from this", True),
        ("It is not mentioned", True),
        ("Paris", False),
        ("A.", False),  # the letter of a choice, no article
        ("Unknown Pleasures", False),  # only the whole answer counts
        ("none of the above", False),
        ("a noble answer", False),  # only whole words count
    ],
)
def test_answers_that_say_there_is_none(answer, expected):
    assert abstains(answer) is expected


def test_a_golden_answer_is_no_abstention():
    assert not abstains("Unknown", ["unknown", "Paris"])
    assert not abstains("the", ["The"])
    assert abstains("Unknown", ["Paris"])
    assert abstains("", [])
    assert abstains("unanswerable", [])


def test_answers_are_looked_for_in_what_was_shown():
    cases = [
        ("paris", ("Paris",), [PARIS], 1.0),
        ("the capital Paris", ("Paris",), [BERLIN, PARIS], 1.0),  # punctuation is dropped
        ("Seine, Paris", ("Paris",), [PARIS], 0.0),  # right, its words stand apart
        ("Lyon", ("Paris",), [PARIS], 0.0),
        ("Berlin", (), [BERLIN], 1.0),  # nobody should have answered
        ("Berlin", ("Berlin",), [], 0.0),
        ("I don't know", ("Paris",), [PARIS], np.nan),
        ("", (), [PARIS], np.nan),
    ]
    found = attribution(
        [question(*golden) for _, golden, _, _ in cases],
        [passages for _, _, passages, _ in cases],
        [answer for answer, _, _, _ in cases],
    )
    nan = np.nan
    assert np.array_equal(found["found"], [case[-1] for case in cases], equal_nan=True)
    right = [1, 1, 0, nan, nan, 0, nan, nan]
    assert np.array_equal(found["found_when_right"], right, equal_nan=True)
    wrong = [nan, nan, nan, 0, 1, nan, nan, nan]
    assert np.array_equal(found["found_when_wrong"], wrong, equal_nan=True)


def test_abstentions_are_counted_by_whether_they_are_due():
    """Three unanswerable questions, of which one is answered; four others, of which two are not."""
    answers = ["Berlin", "", "unanswerable", "Paris", "Lyon", "unknown", "no answer"]
    questions = [question()] * 3 + [question("Paris")] * 4
    found = {name: np.nanmean(of) for name, of in abstention(questions, answers).items()}
    assert found == pytest.approx(
        {
            "hallucination": 1 / 3,
            "abstained_unanswerable": 2 / 3,
            "abstained_answerable": 2 / 4,
            "abstention_precision": 2 / 4,
        }
    )


def test_nothing_is_said_of_questions_that_there_are_none_of():
    found = abstention([question("Paris")], ["Paris"])
    assert found["abstained_answerable"].tolist() == [0.0]
    assert all(np.isnan(found[name]).all() for name in found if name != "abstained_answerable")
