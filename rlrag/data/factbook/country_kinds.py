"""Question kinds of the Factbook, part one: land and people.

Each kind asks for one field in three or four ways. Many wordings avoid the words of the field's
name, so that a search for the question's words tends to find other fields of the same country.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rlrag.data.factbook import answers
from rlrag.data.factbook.passages import PLAIN


@dataclass(frozen=True)
class QuestionKind:
    """One thing to ask of a country: where it stands, how to find it, how to ask for it.

    `subfield` may name several, of which the first present counts; `wordings` have the field
    `country`.
    """

    name: str
    section: str
    field: str
    subfield: str | tuple[str, ...]
    find: Callable[[str], tuple[str, ...]]
    wordings: tuple[str, ...]


def _years(text: str) -> tuple[str, ...]:
    return answers.quantity(text, "years")


def kilometres(text: str) -> tuple[str, ...]:
    """A length at the start of a text, with and without its unit."""
    return answers.quantity(text, "km")


LAND_KINDS = (
    QuestionKind(
        "area",
        "Geography",
        "Area",
        "total",
        partial(answers.quantity, unit="sq km"),
        (
            "How big is {country}, land and water together?",
            "What is the total area of {country}?",
            "How many square kilometres does {country} cover?",
        ),
    ),
    QuestionKind(
        "coastline",
        "Geography",
        "Coastline",
        PLAIN,
        kilometres,
        (
            "How long is the shore of {country}?",
            "How many kilometres of {country} lie along the sea?",
            "What is the length of the coast of {country}?",
        ),
    ),
    QuestionKind(
        "highest_point",
        "Geography",
        "Elevation",
        "highest point",
        answers.highest_point,
        (
            "What is the tallest peak in {country}?",
            "Where would a climber stand at the very top of {country}?",
            "Which mountain or hill rises above all others in {country}?",
            "What is the highest point of {country}?",
        ),
    ),
    QuestionKind(
        "lowest_point",
        "Geography",
        "Elevation",
        "lowest point",
        answers.highest_point,
        (
            "Where does the ground of {country} lie deepest?",
            "What is the lowest point of {country}?",
            "At which spot or water is {country} nearest to or furthest below sea level?",
        ),
    ),
    QuestionKind(
        "mean_elevation",
        "Geography",
        "Elevation",
        "mean elevation",
        partial(answers.quantity, unit="m"),
        (
            "How far above the sea does {country} lie on average?",
            "What is the average height of the land in {country}?",
            "What is the mean elevation of {country}?",
        ),
    ),
    QuestionKind(
        "longest_border",
        "Geography",
        "Land boundaries",
        "border countries",
        answers.longest_border,
        (
            "Which neighbour shares the longest frontier with {country}?",
            "With which country does {country} have its longest border?",
            "Next to which state does most of the frontier of {country} run?",
        ),
    ),
    QuestionKind(
        "forest",
        "Geography",
        "Land use",
        "forest",
        answers.share,
        (
            "How much of {country} is covered by woods?",
            "What share of the land of {country} do trees cover?",
            "What percentage of {country} is forest?",
        ),
    ),
)

PEOPLE_KINDS = (
    QuestionKind(
        "population",
        "People and Society",
        "Population",
        "total",
        answers.quantity,
        (
            "How many people live in {country}?",
            "What is the population of {country}?",
            "How many inhabitants does {country} have?",
        ),
    ),
    QuestionKind(
        "demonym",
        "People and Society",
        "Nationality",
        "noun",
        answers.demonym,
        (
            "What do you call a person from {country}?",
            "By what name are citizens of {country} known?",
            "What is the noun for somebody from {country}?",
        ),
    ),
    QuestionKind(
        "ethnic_group",
        "People and Society",
        "Ethnic groups",
        PLAIN,
        answers.largest_share,
        (
            "What is the largest ethnic group in {country}?",
            "To which people do most residents of {country} belong by descent?",
            "Which community is the most numerous in {country}?",
        ),
    ),
    QuestionKind(
        "religion",
        "People and Society",
        "Religions",
        PLAIN,
        answers.largest_share,
        (
            "Which faith has the most followers in {country}?",
            "What is the main religion of {country}?",
            "What do most believers in {country} profess?",
        ),
    ),
    QuestionKind(
        "official_language",
        "People and Society",
        "Languages",
        ("Languages", PLAIN),
        answers.official_language,
        (
            "In which language does the state of {country} write its laws?",
            "What is the official language of {country}?",
            "Which tongue do the authorities of {country} use?",
        ),
    ),
    QuestionKind(
        "median_age",
        "People and Society",
        "Median age",
        "total",
        _years,
        (
            "How old is the person in the middle of {country}'s population by age?",
            "At what age is half of {country} younger and half older?",
            "What is the median age in {country}?",
        ),
    ),
    QuestionKind(
        "life_expectancy",
        "People and Society",
        "Life expectancy at birth",
        "total population",
        _years,
        (
            "How long can a newborn in {country} hope to live?",
            "What is the life expectancy in {country}?",
            "How many years does a typical life last in {country}?",
        ),
    ),
    QuestionKind(
        "fertility",
        "People and Society",
        "Total fertility rate",
        PLAIN,
        answers.quantity,
        (
            "How many children does a woman in {country} have on average?",
            "How many babies will the typical mother in {country} bear?",
            "What is the fertility rate of {country}?",
        ),
    ),
    QuestionKind(
        "largest_city",
        "People and Society",
        "Major urban areas - population",
        PLAIN,
        answers.largest_city,
        (
            "Which is the biggest city in {country}?",
            "In which city of {country} do the most people live?",
            "What is the most crowded town of {country}?",
        ),
    ),
    QuestionKind(
        "urban_share",
        "People and Society",
        "Urbanization",
        "urban population",
        answers.share,
        (
            "What share of the people of {country} live in towns and cities?",
            "How many per cent of {country}'s residents are city dwellers?",
            "What percentage of {country} is urban?",
        ),
    ),
)
