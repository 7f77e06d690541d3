"""Two-hop questions name a country by one fact and ask for another."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from rlrag.data.factbook.passages import factbook_countries, factbook_passages
from rlrag.data.factbook.questions import is_test_country
from rlrag.data.factbook.two_hops import BRIDGES, two_hop_questions
from rlrag.data.load import load_corpus, load_questions
from rlrag.errors import DataError


@pytest.fixture(scope="module")
def questions():
    return two_hop_questions("train") + two_hop_questions("test")


def test_their_number_and_some_of_them(questions):
    by_id = {question.id: question for question in questions}
    assert len(by_id) == len(questions)
    assert len(two_hop_questions("train")) > 4000
    assert len(two_hop_questions("test")) > 1200
    assert {question.metadata["bridge"] for question in questions} == set(BRIDGES)
    climbed = by_id["factbook-hops-et-highest_point-electricity_access"]
    assert climbed.question == (
        "How many per cent in the country whose highest point is Ras Dejen can switch on an "
        "electric light?"
    )
    assert climbed.golden_answers == ("55%", "55")


def test_a_fact_names_one_country_and_stands_in_its_own_passage(questions):
    texts = {passage.id: passage for passage in factbook_passages()}
    for question in questions:
        code = question.id.split("-")[2]
        fact_id, answer_id = question.gold_ids
        assert fact_id != answer_id
        for passage_id in (fact_id, answer_id):
            assert passage_id.startswith(f"{code}-")
        pattern = re.escape(BRIDGES[question.metadata["bridge"]]).replace(r"\{fact\}", "(.+)")
        asked = re.search(pattern, question.question)
        assert asked is not None
        # The fact comes before whatever the wording ends with.
        words = re.split(r"[ ,?]", asked[1])
        assert words[0].lower() in texts[fact_id].text.lower()
        assert question.golden_answers[0] in texts[answer_id].text


def test_no_question_tells_its_country_or_its_answer(questions):
    names = {country.code: country.name.lower() for country in factbook_countries()}
    for question in questions:
        asked = question.question.lower()
        assert names[question.id.split("-")[2]] not in asked
        words = f" {asked.replace('?', '')} "
        told = [answer for answer in question.golden_answers if f" {answer.lower()} " in words]
        assert not told, question


def test_no_fact_is_that_of_two_countries(questions):
    named = Counter(
        (match[0], question.id.split("-")[2])
        for question in questions
        if (match := re.search(r"internet code (\.\w+)", question.question))
    )
    codes = [code for code, _ in named]
    assert len(codes) == len(set(codes)) > 100


def test_countries_are_divided_as_for_questions_of_one_passage():
    for split, is_test in (("train", False), ("test", True)):
        for question in two_hop_questions(split):
            assert is_test_country(question.id.split("-")[2]) == is_test


def test_they_are_loaded_by_name(tmp_path):
    corpus = load_corpus("factbook", tmp_path, 80)
    found = load_questions("factbook-hops:test", tmp_path, corpus)
    assert found.questions == two_hop_questions("test")
    with pytest.raises(DataError, match=r"no split 'dev'; write factbook-hops:train or"):
        load_questions("factbook-hops:dev", tmp_path, corpus)
