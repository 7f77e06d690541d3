"""Builds copies of gold passages that state a different answer.

Every golden answer that stands in the text as it is written, by whole words and in either case, is
replaced by a golden answer of another question. That one looks alike: it has digits too, or none,
and as many words where there is such a one. The first by a hash of question, answer
and seed is taken, so that the same questions always get the same copies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlrag.evaluation.probe.robustness import GoldQuestions
from rlrag.records import Passage, Question
from rlrag.rewards.answer_match import answer_contained, normalize_answer, passages_contain_answer


@dataclass(frozen=True)
class Contradiction:
    """Gold passages that say a wrong answer in the place of the golden ones."""

    wrong_answer: str
    passages: tuple[Passage, ...]


def contradictions(
    questions: Sequence[Question], gold: GoldQuestions, seed: int = 0
) -> dict[int, Contradiction]:
    """By row, the questions whose gold passages can be made to say another answer.

    What they are made to say is the first golden answer of another of the questions.
    """
    others = [question.golden_answers[0] for question in questions if question.golden_answers]
    made = {
        row: contradiction(question, context.gold, others, seed)
        for row, (question, context) in enumerate(zip(questions, gold.contexts, strict=True))
        if context is not None
    }
    return {row: found for row, found in made.items() if found is not None}


def contradiction(
    question: Question, gold: Sequence[Passage], others: Sequence[str], seed: int = 0
) -> Contradiction | None:
    """The gold passages that hold a golden answer, with another answer in its place.

    Args:
        question: Whose golden answers are replaced.
        gold: Its gold passages.
        others: Golden answers of other questions, of which one is taken.
        seed: Changes which one.

    Returns:
        None where no gold passage holds a golden answer as it is written, or where every other
        answer is right too, holds a golden one or stands in the gold passages.

    Example:
        >>> asked = Question("q", "which capital?", ("Paris",))
        >>> gold = [Passage("p", "France", "Its capital is Paris, on the Seine.")]
        >>> found = contradiction(asked, gold, ["Rome", "in 1804"])
        >>> found.wrong_answer, found.passages[0].text
        ('Rome', 'Its capital is Rome, on the Seine.')
    """
    golden = [answer for answer in question.golden_answers if answer.strip()]
    longest_first = sorted(golden, key=len, reverse=True)
    stated = re.compile(
        "|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in longest_first), re.IGNORECASE
    )
    holding = [passage for passage in gold if golden and stated.search(passage.text)]
    wrong = _wrong_answer(question, gold, others, seed) if holding else None
    if wrong is None:
        return None
    changed = tuple(
        replace(
            passage,
            id=f"{passage.id} contradicted",
            text=stated.sub(lambda _: wrong, passage.text),
        )
        for passage in holding
    )
    return Contradiction(wrong, changed)


def _wrong_answer(
    question: Question, gold: Sequence[Passage], others: Sequence[str], seed: int
) -> str | None:
    golden = question.golden_answers

    def unlike(other: str) -> tuple[bool, int, bytes]:
        text = "\0".join((str(seed), question.id, other)).encode()
        return (
            _has_digits(other) != _has_digits(golden[0]),
            abs(len(other.split()) - len(golden[0].split())),
            hashlib.sha256(text).digest(),
        )

    def is_wrong(other: str) -> bool:
        return (
            bool(normalize_answer(other))
            and not answer_contained(other, golden)
            and not any(answer_contained(answer, [other]) for answer in golden)
            and not passages_contain_answer(list(gold), [other])
        )

    # Most are wrong, so that the first is nearly always the one, and the rest is not looked at.
    return next(filter(is_wrong, sorted(set(others), key=unlike)), None)


def _has_digits(text: str) -> bool:
    return any(character.isdigit() for character in text)
