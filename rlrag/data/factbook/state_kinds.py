"""Question kinds of the Factbook, part two: state and economy."""

from __future__ import annotations

from rlrag.data.factbook import answers
from rlrag.data.factbook.country_kinds import QuestionKind, kilometres
from rlrag.data.factbook.passages import PLAIN

STATE_KINDS = (
    QuestionKind(
        "capital",
        "Government",
        "Capital",
        "name",
        answers.single_name,
        (
            "What is the capital of {country}?",
            "Which city is the seat of government of {country}?",
            "From where is {country} governed?",
            "In which town do foreign ambassadors to {country} usually live?",
        ),
    ),
    QuestionKind(
        "government_type",
        "Government",
        "Government type",
        PLAIN,
        answers.plain_name,
        (
            "What kind of state is {country}?",
            "Under which political system is {country} ruled?",
            "What type of government does {country} have?",
        ),
    ),
    QuestionKind(
        "head_of_state",
        "Government",
        "Executive branch",
        "chief of state",
        answers.head_of_state,
        (
            "Who is the head of state of {country}?",
            "Who stands at the top of the state in {country}?",
            "Which person represents {country} as its leader?",
        ),
    ),
    QuestionKind(
        "parliament",
        "Government",
        "Legislative branch",
        "legislature name",
        answers.single_name,
        (
            "What is the parliament of {country} called?",
            "Who passes the laws in {country}?",
            "Which body do lawmakers of {country} sit in?",
        ),
    ),
    QuestionKind(
        "independence_date",
        "Government",
        "Independence",
        PLAIN,
        answers.independence_date,
        (
            "When did {country} become a sovereign state?",
            "On what date did {country} gain its independence?",
            "When was {country} set free from foreign rule?",
        ),
    ),
    QuestionKind(
        "former_ruler",
        "Government",
        "Independence",
        PLAIN,
        answers.former_ruler,
        (
            "Which power ruled {country} before it became free?",
            "From whom did {country} gain independence?",
            "Who was the last colonial or foreign master of {country}?",
        ),
    ),
    QuestionKind(
        "national_day",
        "Government",
        "National holiday",
        PLAIN,
        answers.holiday_date,
        (
            "On which day of the year does {country} celebrate itself?",
            "What is the date of the national holiday of {country}?",
            "When are the yearly state festivities in {country}?",
        ),
    ),
    QuestionKind(
        "national_symbol",
        "Government",
        "National symbol(s)",
        PLAIN,
        answers.plain_name,
        (
            "What emblem stands for {country}?",
            "Which animal, plant or sign represents {country}?",
            "What is the national symbol of {country}?",
        ),
    ),
    QuestionKind(
        "anthem",
        "Government",
        "National anthem(s)",
        "title",
        answers.anthem_title,
        (
            "Which song is played when an athlete from {country} wins gold?",
            "What is the title of the national anthem of {country}?",
            "Which hymn do people in {country} rise for?",
        ),
    ),
    QuestionKind(
        "former_name",
        "Government",
        "Country name",
        "former",
        answers.plain_name,
        (
            "What was {country} called in earlier times?",
            "Under which name was {country} known before?",
            "What is the old name of {country}?",
        ),
    ),
)

ECONOMY_KINDS = (
    QuestionKind(
        "currency",
        "Economy",
        "Exchange rates",
        "Currency",
        answers.currency,
        (
            "What money do people in {country} pay with?",
            "What is the currency of {country}?",
            "Which banknotes does a shopkeeper in {country} take?",
        ),
    ),
    QuestionKind(
        "export_good",
        "Economy",
        "Exports - commodities",
        PLAIN,
        answers.first_item,
        (
            "What does {country} sell abroad most of all?",
            "Which good brings {country} the most money from other countries?",
            "What is the leading export commodity of {country}?",
        ),
    ),
    QuestionKind(
        "export_partner",
        "Economy",
        "Exports - partners",
        PLAIN,
        answers.largest_share,
        (
            "Which country buys the most from {country}?",
            "Where do most goods shipped from {country} go?",
            "Who is the best foreign customer of {country}?",
            "What is the main export partner of {country}?",
        ),
    ),
    QuestionKind(
        "import_partner",
        "Economy",
        "Imports - partners",
        PLAIN,
        answers.largest_share,
        (
            "Which country sells the most to {country}?",
            "Where do most foreign goods in {country} come from?",
            "Who is the biggest foreign supplier of {country}?",
            "What is the main import partner of {country}?",
        ),
    ),
    QuestionKind(
        "farm_product",
        "Economy",
        "Agricultural products",
        PLAIN,
        answers.first_item,
        (
            "What do the farms of {country} yield most of?",
            "Which crop or animal product comes first by weight in {country}?",
            "What is the top agricultural product of {country}?",
        ),
    ),
    QuestionKind(
        "electricity_access",
        "Energy",
        "Electricity access",
        "electrification - total population",
        answers.share,
        (
            "What share of the people of {country} have power at home?",
            "How many per cent in {country} can switch on an electric light?",
            "What percentage of {country} has access to electricity?",
        ),
    ),
    QuestionKind(
        "internet_code",
        "Communications",
        "Internet country code",
        PLAIN,
        answers.code,
        (
            "With which letters do web addresses in {country} end?",
            "What is the internet country code of {country}?",
            "Which top-level domain belongs to {country}?",
        ),
    ),
    QuestionKind(
        "airports",
        "Transportation",
        "Airports",
        PLAIN,
        answers.quantity,
        (
            "How many airfields are there in {country}?",
            "How many airports does {country} have?",
            "In how many places in {country} can a plane land?",
        ),
    ),
    QuestionKind(
        "railways",
        "Transportation",
        "Railways",
        "total",
        kilometres,
        (
            "How much track do trains in {country} run on?",
            "How long is the rail network of {country}?",
            "What is the total length of railways in {country}?",
        ),
    ),
)
