"""Questions about the World Factbook, in this project's own wording.

A country gets one question of each kind, in a wording chosen by a hash of its code. Answers stand
literally in the passage; a kind is left out for a country whose text gives no single short answer.
Countries, not questions, are divided into train and test, so that no test country was trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rlrag.data.factbook.country_kinds import LAND_KINDS, PEOPLE_KINDS, QuestionKind
from rlrag.data.factbook.passages import Country, factbook_countries
from rlrag.data.factbook.state_kinds import ECONOMY_KINDS, STATE_KINDS
from rlrag.errors import DataError
from rlrag.records import Question

QUESTION_KINDS = LAND_KINDS + PEOPLE_KINDS + STATE_KINDS + ECONOMY_KINDS
Split = Literal["train", "test"]
TEST_SHARE = 0.25
MAX_ANSWER_WORDS = 6
ANSWER_WITHIN_WORDS = 80
"""Answers stand in this many first words of their passage, so that cutting keeps them."""

# Not countries: the world as a whole and the European Union.
_NOT_COUNTRIES = ("xx", "ee")
_ARTICLE_ENDINGS = ("Islands", "Republic", "Kingdom", "Strip", "Bank", "Emirates", "Territory")
_ARTICLE_NAMES = (
    "Comoros",
    "Democratic Republic of the Congo",
    "Federated States of Micronesia",
    "Holy See",
    "Isle of Man",
    "Maldives",
    "Netherlands",
    "Philippines",
    "Republic of the Congo",
    "Seychelles",
    "United States",
)


@dataclass(frozen=True)
class Found:
    """What a kind asks of a country: the answers, and the passage that they stand in."""

    answers: tuple[str, ...]
    passage_id: str


def factbook_questions(split: str) -> tuple[Question, ...]:
    """The questions about the countries of one split.

    Raises:
        DataError: when `split` is neither `train` nor `test`.
        SetupError: when the Factbook package is not installed.
    """
    return tuple(
        question
        for country in question_countries(split, "factbook")
        for question in _country_questions(country)
    )


def question_countries(split: str, source: str) -> tuple[Country, ...]:
    """The countries of one split of a source of questions.

    Raises:
        DataError: when `split` is neither `train` nor `test`.
        SetupError: when the Factbook package is not installed.
    """
    if split not in get_args(Split):
        raise DataError(
            f"{source} questions have no split {split!r}; write {source}:train or {source}:test"
        )
    wanted_test = split == "test"
    return tuple(
        country
        for country in factbook_countries()
        if country.code not in _NOT_COUNTRIES and is_test_country(country.code) == wanted_test
    )


def is_test_country(code: str) -> bool:
    """Whether a country's questions belong to the test split; a matter of its code alone."""
    return _fraction(f"split:{code}") < TEST_SHARE


def name_in_sentence(name: str) -> str:
    """A country's name as it stands within a sentence.

    Example:
        >>> [name_in_sentence(name) for name in ("The Gambia", "United States", "Mali")]
        ['the Gambia', 'the United States', 'Mali']
    """
    if name.startswith("The "):
        return "the " + name.removeprefix("The ")
    needs_article = name in _ARTICLE_NAMES or name.endswith(_ARTICLE_ENDINGS)
    return f"the {name}" if needs_article else name


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def chosen_by_hash(names: Sequence[str], text: str) -> str:
    """One of several names, which one is a matter of a text alone."""
    return names[int(_fraction(text) * len(names))]


def find_answers(kind: QuestionKind, country: Country) -> Found | None:
    """What a kind asks of a country; None where its text gives no single short answer."""
    field = country.fields.get((kind.section, kind.field))
    if field is None:
        return None
    names = (kind.subfield,) if isinstance(kind.subfield, str) else kind.subfield
    answers = kind.find(next((field.parts[name] for name in names if name in field.parts), ""))
    shown = " ".join(field.passage.text.split()[:ANSWER_WITHIN_WORDS])
    if not answers or any(
        answer not in shown or len(answer.split()) > MAX_ANSWER_WORDS for answer in answers
    ):
        return None
    return Found(answers, field.passage.id)


def _country_questions(country: Country) -> list[Question]:
    made = (_question(kind, country) for kind in QUESTION_KINDS)
    return [question for question in made if question is not None]


def _question(kind: QuestionKind, country: Country) -> Question | None:
    found = find_answers(kind, country)
    if found is None:
        return None
    wording = chosen_by_hash(kind.wordings, f"{kind.name}:{country.code}")
    return Question(
        id=f"factbook-{country.code}-{kind.name}",
        question=wording.format(country=name_in_sentence(country.name)),
        golden_answers=found.answers,
        metadata={"dataset": "factbook", "type": kind.name, "gold_ids": [found.passage_id]},
    )
