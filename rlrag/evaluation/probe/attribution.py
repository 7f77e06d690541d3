"""Whether answers come from the passages shown, and when systems abstain.

A question is unanswerable if it has no golden answer, or blank ones alone. An answer abstains if,
normalised as `answer_match` does, it is empty (SQuAD 2.0's rule; the letter A is not), is one of
`ABSTAINING_ANSWERS`, or holds the words of one of `ABSTAINING_PHRASES`; but not if it equals a
golden answer. The lists are English. Any other answer to an unanswerable question is a
hallucination.

Shape letter: Q questions. A question that a measure says nothing of has the value NaN there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlrag.records import Passage, Question
from rlrag.rewards.answer_match import (
    answer_contained,
    exact_match,
    is_unanswerable,
    normalize_answer,
    passages_contain_answer,
)

ABSTAINING_ANSWERS = frozenset({"na", "none", "unknown", "unclear", "unsure", "not sure"})
"""Whole answers that say that there is none, normalised."""

ABSTAINING_PHRASES = (
    "unanswerable",
    "no answer",
    "dont know",
    "do not know",
    "cannot answer",
    "cant answer",
    "cannot be answered",
    "cant be answered",
    "cannot be determined",
    "cannot determine",
    "not mentioned",
    "not specified",
    "not stated",
    "not provided",
    "not given in",
    "no information",
    "not enough information",
    "insufficient information",
)
"""Words that say so anywhere in an answer, normalised."""


def abstains(answer: str, golden_answers: Sequence[str] = ()) -> bool:
    """Whether an answer says that there is none; see the module.

    Example:
        >>> abstains("I don't know."), abstains("Unknown"), abstains("Unknown Pleasures")
        (True, True, False)
        >>> abstains("Unknown", golden_answers=["unknown"])
        False
    """
    said = normalize_answer(answer)
    if not is_unanswerable(golden_answers) and exact_match(answer, golden_answers):
        return False
    if not said:  # "a" is dropped as an article, but alone it names a choice
        return "".join(filter(str.isalnum, answer.lower())) != "a"
    if said in ABSTAINING_ANSWERS:
        return True
    return any(f" {phrase} " in f" {said} " for phrase in ABSTAINING_PHRASES)


def attribution(
    questions: Sequence[Question],
    selections: Sequence[Sequence[Passage]],
    answers: Sequence[str],
) -> dict[str, np.ndarray]:
    """Whether each answer stands in a passage that was shown; means over Q are the measures.

    `found` is 1 where some picked passage (title and text) holds the words of the answer together,
    both normalised, and NaN where the answer abstains. `found_when_right` and `found_when_wrong`
    are the same of the answers that contain a golden answer and of the others: a right answer that
    is not found was known or guessed. What a full prompt cuts off a passage counts as shown.

    Example:
        >>> passage = Passage("fr", "France", "Its capital is Paris.")
        >>> question = Question("q1", "capital of France?", ("Paris",))
        >>> found = attribution([question] * 2, [[passage]] * 2, ["Paris", "Lyon"])
        >>> found["found"].tolist(), found["found_when_right"].tolist()
        ([1.0, 0.0], [1.0, nan])
    """
    found, right = [], []
    for question, selection, answer in zip(questions, selections, answers, strict=True):
        given = not abstains(answer, question.golden_answers)
        found.append(passages_contain_answer(selection, [answer]) if given else np.nan)
        right.append(answer_contained(answer, question.golden_answers))
    found_Q, right_Q = np.array(found), np.array(right)
    return {
        "found": found_Q,
        "found_when_right": np.where(right_Q == 1, found_Q, np.nan),
        "found_when_wrong": np.where(right_Q == 0, found_Q, np.nan),
    }


def abstention(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether each answer abstains, by whether it should; means over Q are the measures.

    `hallucination` is, of unanswerable questions, the share that is answered nevertheless;
    `abstained_unanswerable` is the rest of them. `abstained_answerable` is the share of
    answerable questions without an answer, and `abstention_precision` the share of the abstentions
    whose question is unanswerable.

    Example:
        >>> questions = [Question("q1", "who?", ()), Question("q2", "capital?", ("Paris",))]
        >>> found = abstention(questions, ["Napoleon", "unanswerable"])
        >>> found["hallucination"].tolist(), found["abstained_answerable"].tolist()
        ([1.0, nan], [nan, 1.0])
        >>> found["abstention_precision"].tolist()
        [nan, 0.0]
    """
    unanswerable_Q = np.array([is_unanswerable(question.golden_answers) for question in questions])
    abstained_Q = np.array(
        [
            abstains(answer, question.golden_answers)
            for question, answer in zip(questions, answers, strict=True)
        ]
    )
    return {
        "hallucination": np.where(unanswerable_Q, ~abstained_Q, np.nan),
        "abstained_unanswerable": np.where(unanswerable_Q, abstained_Q, np.nan),
        "abstained_answerable": np.where(unanswerable_Q, np.nan, abstained_Q),
        "abstention_precision": np.where(abstained_Q, unanswerable_Q, np.nan),
    }
