"""Gold passages that are made to say another answer."""

from __future__ import annotations

import pytest

from rlrag.evaluation.probe.contradiction import contradiction
from rlrag.records import Passage, Question

GOLD = [
    Passage("p1", "Tower", "The Eiffel Tower (EIFFEL TOWER) opened in 1889; 18890 came."),
    Passage("p2", "Paris", "A city on the Seine."),
]


def asks(*golden: str) -> Question:
    return Question("q", "what?", golden)


def test_every_wording_is_replaced_by_whole_words_in_either_case():
    found = contradiction(asks("Eiffel", "eiffel tower"), GOLD, ["Big Ben"])
    assert found is not None
    (changed,) = found.passages
    assert changed.text == "The Big Ben (Big Ben) opened in 1889; 18890 came."
    assert (changed.id, changed.title) == ("p1 contradicted", "Tower")


def test_a_number_is_contradicted_by_a_number():
    found = contradiction(asks("1889"), GOLD, ["a long answer", "Rome", "1066", "on 1 May 1900"])
    assert found is not None
    assert found.wrong_answer == "1066"
    assert found.passages[0].text.endswith("opened in 1066; 18890 came.")


def test_words_are_contradicted_by_as_many_words():
    others = ["1066", "Rome", "the Colosseum of Rome", "Big Ben"]
    found = contradiction(asks("Eiffel Tower"), GOLD, others)
    assert found is not None
    assert found.wrong_answer == "Big Ben"


def test_of_equal_ones_the_seed_decides():
    others = [f"Name {letter}" for letter in "abcdefgh"]
    chosen = {contradiction(asks("Eiffel Tower"), GOLD, others, s).wrong_answer for s in range(9)}
    assert len(chosen) > 2
    again = contradiction(asks("Eiffel Tower"), GOLD, others[::-1], 3)
    assert again == contradiction(asks("Eiffel Tower"), GOLD, others, 3)


@pytest.mark.parametrize(
    ("golden", "others"),
    [
        (("Eiffel Tower",), []),
        (("Eiffel Tower",), ["the Eiffel Tower!", "Eiffel"]),  # right, and part of what is right
        (("Eiffel Tower",), ["Seine"]),  # stands in a gold passage
        (("Eiffel Tower",), ["  "]),
        (("Eiffel Tower",), ["A"]),  # an article, of which normalisation leaves nothing
        (("Eiffel-Tower",), ["Big Ben"]),  # not as it is written
        (("Tow",), ["Big Ben"]),  # no whole word
        ((), ["Big Ben"]),
        (("", " "), ["Big Ben"]),
    ],
)
def test_where_nothing_can_be_contradicted_there_is_none(golden, others):
    assert contradiction(asks(*golden), GOLD, others) is None
