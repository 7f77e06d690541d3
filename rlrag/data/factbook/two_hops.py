"""Two-hop questions about the World Factbook: the country is named by a fact of it alone.

"What is the tallest peak in the country whose anthem is called X?" needs two passages, the one with
the fact and the one with the answer. Facts are unique among all countries and do not contain the
country's name. A country gets one question of each kind, with one of its facts; wordings, answers
and the division into train and test are those of the questions about one passage.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from rlrag.data.factbook.passages import Country, factbook_countries
from rlrag.data.factbook.questions import (
    QUESTION_KINDS,
    Found,
    chosen_by_hash,
    find_answers,
    question_countries,
)
from rlrag.records import Question

BRIDGES: Mapping[str, str] = {
    "capital": "the country whose capital is {fact}",
    "highest_point": "the country whose highest point is {fact}",
    "largest_city": "the country whose largest city is {fact}",
    "anthem": "the country whose anthem is called {fact}",
    "internet_code": "the country with the internet code {fact}",
    "head_of_state": "the country led by {fact}",
}
"""How each kind of fact names a country."""

_SHORTEST_NAME = 4  # letters of a word of a country's name that gives it away


def two_hop_questions(split: str) -> tuple[Question, ...]:
    """The questions about the countries of one split.

    `metadata["gold_ids"]` are the passage with the fact and the one with the answer.

    Raises:
        DataError: when `split` is neither `train` nor `test`.
        SetupError: when the Factbook package is not installed.
    """
    return tuple(
        question
        for country in question_countries(split, "factbook-hops")
        for question in _questions_about(country)
    )


def _questions_about(country: Country) -> Iterator[Question]:
    facts = _facts()[country.code]
    for kind in QUESTION_KINDS:
        found = find_answers(kind, country)
        if found is None:
            continue
        fitting = [name for name, fact in facts.items() if fact.passage_id != found.passage_id]
        if not fitting:
            continue
        bridge = chosen_by_hash(fitting, f"bridge:{kind.name}:{country.code}")
        # A possessive would belong to the end of the fact.
        wordings = [wording for wording in kind.wordings if "{country}'" not in wording]
        wording = chosen_by_hash(wordings, f"{kind.name}:{country.code}")
        fact = facts[bridge].answers[0]
        named = BRIDGES[bridge].format(fact=fact.title() if fact.isupper() else fact)
        question = wording.format(country=named)
        if _contains(question, found.answers):
            continue
        yield Question(
            id=f"factbook-hops-{country.code}-{bridge}-{kind.name}",
            question=question,
            golden_answers=found.answers,
            metadata={
                "dataset": "factbook-hops",
                "type": kind.name,
                "bridge": bridge,
                "gold_ids": [facts[bridge].passage_id, found.passage_id],
            },
        )


@functools.cache
def _facts() -> Mapping[str, Mapping[str, Found]]:
    """By country, its facts that no other country has, by kind."""
    kinds = [kind for kind in QUESTION_KINDS if kind.name in BRIDGES]
    countries = factbook_countries()
    found = {
        (country.code, kind.name): fact
        for country in countries
        for kind in kinds
        if (fact := find_answers(kind, country)) is not None
    }
    counts = Counter(
        (name, answer.lower()) for (_, name), fact in found.items() for answer in fact.answers
    )
    return {
        country.code: {
            kind.name: fact
            for kind in kinds
            if (fact := found.get((country.code, kind.name))) is not None
            and all(counts[kind.name, answer.lower()] == 1 for answer in fact.answers)
            and not _names(fact.answers[0], country.name)
        }
        for country in countries
    }


def _names(fact: str, country: str) -> bool:
    """Whether a fact contains a word of the country's name."""
    words = re.findall(r"\w+", country.lower())
    return any(word in fact.lower() for word in words if len(word) >= _SHORTEST_NAME)


def _contains(question: str, answers: tuple[str, ...]) -> bool:
    """Whether a question has one of the answers as words of its own."""
    asked = question.lower()
    return any(re.search(rf"(?<!\w){re.escape(a.lower())}(?!\w)", asked) for a in answers)
