"""Answer measures against hand-computed values, rouge_score, loops over definitions and edges."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from rlrag.records import Passage
from rlrag.rewards.answer_match import (
    answer_contained,
    exact_match,
    normalize_answer,
    passages_contain_answer,
    rouge_l,
    token_f1,
)

MEASURES = (exact_match, token_f1, answer_contained, rouge_l)
WORDS = st.lists(
    st.sampled_from(["paris", "Paris,", "the", "of", "île", "1,000", "a", "tower", "The"]),
    max_size=6,
)
PHRASES = WORDS.map(" ".join)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a pear and THE fig", "apple pear and fig"),
        ("theatre", "theatre"),
        ("1,234.5 km²", "12345 km²"),
        ("U.S.A.", "usa"),
        ("co-op", "coop"),
        ("Ångström\u00a0Straße", "ångström straße"),
        ("«Niamey»", "«niamey»"),
        ("東京", "東京"),
        ("a.the", "athe"),
        ("'s", "s"),
        ("The", ""),
        (" \t\n", ""),
        ("", ""),
    ],
)
def test_normalisation_by_hand(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def squad_steps(text: str) -> str:
    """The four steps of the SQuAD rules, one character and one word at a time."""
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    words = re.split(r"(\W+)", kept)
    return " ".join("".join(" " if w in ("a", "an", "the") else w for w in words).split())


@given(st.text(max_size=40))
def test_normalisation_follows_the_steps_and_repeats(text: str) -> None:
    assert normalize_answer(text) == squad_steps(text)
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


def test_exact_match_takes_any_golden_answer() -> None:
    golden = ("France", "The French Republic")
    assert exact_match("french republic.", golden) == 1.0
    assert exact_match("French", golden) == 0.0
    assert exact_match("1,000", ("1000",)) == 1.0
    assert exact_match("Sao Tome", ("São Tomé",)) == 0.0


def test_token_f1_by_hand() -> None:
    # "new york city" against "york": c = 1, a = 3, g = 1 -> 2/4; against "new york": 2*2/5.
    assert token_f1("New York City", ("York",)) == pytest.approx(0.5)
    assert token_f1("New York City", ("York", "New York")) == pytest.approx(0.8)
    # Multiplicity: "ha ha ha" and "ha ha" share two words -> 4/5.
    assert token_f1("ha ha ha", ("ha ha",)) == pytest.approx(0.8)
    assert token_f1("", ("York",)) == 0.0
    assert token_f1("London", ("York",)) == 0.0


@given(PHRASES, PHRASES)
def test_token_f1_is_the_harmonic_mean_of_precision_and_recall(answer: str, golden: str) -> None:
    words, golden_words = normalize_answer(answer).split(), normalize_answer(golden).split()
    assume(golden_words or not golden.strip())  # else articles count
    left, num_common = list(golden_words), 0
    for word in words:
        if word in left:
            left.remove(word)
            num_common += 1
    if not golden_words:
        expected = float(not words)
    elif not num_common:
        expected = 0.0
    else:
        precision, recall = num_common / len(words), num_common / len(golden_words)
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(answer, (golden,)) == pytest.approx(expected)


def test_containment_respects_word_boundaries() -> None:
    assert answer_contained("The capital of Niger is Niamey.", ("Niger",)) == 1.0
    assert answer_contained("Nigeria", ("Niger",)) == 0.0
    assert answer_contained("It is the New, York", ("new york",)) == 1.0
    assert answer_contained("New and York", ("New York",)) == 0.0
    assert answer_contained("", ("Niger",)) == 0.0


@given(PHRASES, PHRASES)
def test_containment_is_a_run_of_words(answer: str, golden: str) -> None:
    words, sought = normalize_answer(answer).split(), normalize_answer(golden).split()
    if sought:
        runs = (words[i : i + len(sought)] for i in range(len(words) - len(sought) + 1))
        assert answer_contained(answer, (golden,)) == float(sought in runs)


def test_a_passage_contains_an_answer_in_its_title_or_text() -> None:
    niger = Passage(id="ne", title="Niger", text="The capital is Niamey.")
    nigeria = Passage(id="ng", title="Nigeria", text="The capital is Abuja.")
    assert passages_contain_answer([nigeria, niger], ("niger",)) == 1.0
    assert passages_contain_answer([nigeria], ("niger",)) == 0.0
    assert passages_contain_answer([nigeria], ("Niamey", "abuja")) == 1.0
    # An answer that starts in one passage and ends in the next is in neither.
    assert passages_contain_answer([nigeria, niger], ("abuja niger",)) == 0.0
    assert passages_contain_answer([], ()) == 1.0
    assert passages_contain_answer([niger], ()) == 0.0


def test_passages_of_equal_id_and_different_text_are_kept_apart() -> None:
    assert passages_contain_answer([Passage(id="1", title="", text="Paris")], ("Paris",)) == 1.0
    assert passages_contain_answer([Passage(id="1", title="", text="Rome")], ("Paris",)) == 0.0


def test_rouge_l_by_hand() -> None:
    # Lin (2004), section 3.1: sequences of 3 and 4 tokens share "police the gunman".
    assert rouge_l("police kill the gunman", ("police the gunman",)) == pytest.approx(6 / 7)
    # "the gunman kill police" and "police killed the gunman": "the gunman" of 4 and 4.
    assert rouge_l("the gunman kill police", ("police killed the gunman",)) == 0.5
    assert rouge_l("b a", ("a b",)) == 0.5
    assert rouge_l("", ("a b",)) == 0.0
    assert rouge_l("Étoile 東京", ("étoile",)) == pytest.approx(2 / 3)


class UnicodeWords:
    """Tokens of any script for rouge_score, found without a regular expression."""

    def tokenize(self, text: str) -> list[str]:
        return "".join(char if char.isalnum() else " " for char in text.lower()).split()


@given(st.text(st.characters(max_codepoint=126), max_size=30), st.lists(PHRASES, min_size=1))
def test_rouge_l_agrees_with_rouge_score_on_ascii(answer: str, golden: list[str]) -> None:
    golden = [text.replace("î", "i") for text in golden]
    if any(re.search("[a-z0-9]", text.lower()) for text in golden):
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        expected = scorer.score_multi(golden, answer)["rougeL"].fmeasure
        assert rouge_l(answer, golden) == pytest.approx(expected)


@given(PHRASES, PHRASES)
def test_rouge_l_agrees_with_rouge_score_given_the_same_tokens(answer: str, golden: str) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=UnicodeWords())
    if golden.strip(" ,"):
        expected = scorer.score(golden, answer)["rougeL"].fmeasure
        assert rouge_l(answer, (golden,)) == pytest.approx(expected)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("golden", [(), ("",), ("", " \t")])
def test_an_unanswerable_question_wants_an_empty_answer(measure, golden) -> None:
    assert measure("", golden) == 1.0
    assert measure("The ...", golden) == 1.0
    assert measure("Paris", golden) == 0.0


def test_golden_answers_that_normalise_to_nothing_are_dropped_as_in_squad_2() -> None:
    assert exact_match("", ("the", "Paris")) == 0.0
    assert exact_match("Paris", ("the", "Paris")) == 1.0


@pytest.mark.parametrize("golden", [("A",), ("The",), (".",), ("", "a")])
def test_without_any_other_golden_answer_articles_and_signs_count(golden) -> None:
    """Silence and another article are wrong, the golden answer and what contains it right."""
    right = golden[-1]
    for measure in MEASURES:
        assert measure(right, golden) == measure(f" {right.lower()} ", golden) == 1.0
        for wrong in ("", " ", "an", "!"):
            assert measure(wrong, golden) == 0.0, (measure, wrong)
    assert answer_contained(f"Answer: {right}", golden) == 1.0
    assert exact_match(f"Answer: {right}", golden) == 0.0
    assert token_f1(f"Answer: {right}", golden) == pytest.approx(2 / 3)
    assert passages_contain_answer([Passage("p", "It", f"says {right} here")], golden) == 1.0
    assert passages_contain_answer([Passage("p", "It", "says nothing")], golden) == 0.0
    assert passages_contain_answer([], golden) == 0.0


def test_the_four_letters_of_multiple_choice_are_scored_alike() -> None:
    for letter in "ABCD":
        others = [other for other in "ABCD" if other != letter]
        assert [exact_match(said, (letter,)) for said in (letter, f"({letter}).", "")] == [1, 1, 0]
        assert [exact_match(other, (letter,)) for other in others] == [0, 0, 0]
        assert answer_contained(f"Answer: {letter}.", (letter,)) == 1.0
        assert answer_contained("Answer: none", (letter,)) == 0.0


@pytest.mark.parametrize("measure", MEASURES)
@given(answer=PHRASES, golden=st.lists(PHRASES, min_size=1, max_size=4))
def test_a_measure_lies_in_the_unit_interval_and_ignores_the_order(measure, answer, golden) -> None:
    value = measure(answer, golden)
    assert 0.0 <= value <= 1.0
    assert measure(answer, golden[::-1]) == value
    if any(normalize_answer(text) for text in golden):  # else articles or signs count
        answerable = [text for text in golden if normalize_answer(text)]
        assert value == max(measure(answer, (text,)) for text in answerable) or measure is rouge_l


@given(PHRASES, PHRASES)
def test_exact_implies_f1_and_containment(answer: str, golden: str) -> None:
    if exact_match(answer, (golden,)):
        assert token_f1(answer, (golden,)) == answer_contained(answer, (golden,)) == 1.0
