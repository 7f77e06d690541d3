"""Query writers: what they write, the rules for it, and those of one's own."""

from __future__ import annotations

import sys

import pytest

from rlrag.errors import ConfigError, EpisodeError
from rlrag.records import Passage, Question
from rlrag.selection.queries.built_in import QUERY_WRITERS, build_query_writer
from rlrag.selection.queries.protocol import (
    MAX_QUERY_CHARACTERS,
    QueryWriter,
    fresh_query,
    is_cut,
    write_queries,
)
from rlrag.testing import check_query_writer

QUESTION = Question("q", "Where did the director of the film Harvest Moon study?", ())
FILM = Passage("film", "Harvest Moon", "A 1990 film, whose director is Ida Brandt.")
PERSON = Passage("person", "Ida Brandt", "She went to study in Uppsala.")
UNTITLED = Passage("untitled", "", "A film.")
BLANK = Passage("blank", "Harvest Moon", " ")

SOURCE = """
class Shouts:
    needs_pick = False
    def __init__(self, mark: str = "!", times: int = 1):
        self.end = mark * times
    def write(self, questions, picks, chosen):
        return [question.question.upper() + self.end for question in questions]

class Undecided(Shouts):
    needs_pick = "maybe"

class Silent:
    needs_pick = False

class Breaks:
    needs_pick = False
    what = None
    def write(self, questions, picks, chosen):
        if self.what == "raise": raise KeyError("gone")
        return {"few": [], "number": [7] * len(questions)}[self.what]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_writers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_writers"
    sys.modules.pop("own_writers", None)


def written(name, picks, chosen):
    return build_query_writer(name).write([QUESTION], [picks], [chosen])[0]


@pytest.mark.parametrize("name", QUERY_WRITERS)
def test_built_in_writers_keep_the_contract(name):
    writer = build_query_writer(name)
    assert isinstance(writer, QueryWriter)
    check_query_writer(writer)


@pytest.mark.parametrize(
    ("name", "picks", "chosen", "query"),
    [
        ("title", [FILM], FILM, f"{QUESTION.question} Harvest Moon"),
        ("title", [FILM, PERSON], PERSON, f"{QUESTION.question} Ida Brandt"),
        ("title", [UNTITLED], UNTITLED, None),
        ("title", [FILM], None, None),
        ("text", [FILM, PERSON], FILM, FILM.text),
        ("text", [BLANK], BLANK, None),
        ("text", [FILM], None, None),
        ("uncovered", [FILM], FILM, "where did study Harvest Moon"),
        ("uncovered", [FILM, PERSON], FILM, "where did Harvest Moon"),
        ("uncovered", [UNTITLED], UNTITLED, "where did director harvest moon study"),
        ("uncovered", [Passage("all", "", QUESTION.question)], FILM, None),
        ("uncovered", [FILM], None, None),
    ],
)
def test_what_the_built_in_writers_write(name, picks, chosen, query):
    assert written(name, picks, chosen) == query


@pytest.mark.parametrize(
    ("query", "issued", "fresh"),
    [
        ("who is  Ida\nBrandt ", [], "who is Ida Brandt"),
        ("", [], None),
        (" \n", [], None),
        ("Who is Ida?", ["Who is Ida?"], None),
        (" who IS\tida?", ["x", "Who is Ida?"], None),
        ("STRASSE", ["straße"], None),
        ("who is Ida", ["Who is Ida?"], "who is Ida"),
    ],
)
def test_a_query_is_fresh_when_it_was_not_searched_before(query, issued, fresh):
    assert fresh_query(query, issued) == fresh


def test_a_long_query_is_cut_at_a_word():
    words = ["word"] * 200  # 999 characters with the spaces between them
    exact = " ".join(words)
    assert len(exact) == MAX_QUERY_CHARACTERS - 1
    assert (fresh_query(exact, []), is_cut(exact)) == (exact, False)
    assert (fresh_query(f"{exact} more", []), is_cut(f"{exact} more")) == (exact, True)
    full = f"{exact[:-4]}words and"  # 1,000 characters up to the end of "words"
    assert fresh_query(full, []) == full[:MAX_QUERY_CHARACTERS]
    assert fresh_query("x" * 1200, []) == "x" * MAX_QUERY_CHARACTERS
    # What was cut before is the same query again.
    assert fresh_query(f"{exact} other", [f"{exact} more"]) is None


def test_queries_of_many_episodes_are_held_to_the_rules():
    long = Passage("long", "", "word " * 400)
    found = write_queries(
        build_query_writer("text"),
        [QUESTION] * 5,
        [[FILM], [long], [long], [], [FILM]],
        [FILM, long, long, None, Passage("same", "", QUESTION.question)],
        [[], [], ["word " * 400], [], []],
    )
    assert found.queries == (FILM.text, " ".join(["word"] * 200), None, None, None)
    assert found.num_cut == 1


def test_a_writer_of_ones_own_has_options(module):
    writer = build_query_writer(f"{module}:Shouts", ["mark=?", "times=2"])
    assert writer.write([QUESTION], [[]], [None]) == [QUESTION.question.upper() + "??"]
    check_query_writer(writer)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("titel", [], "query writer 'titel' is unknown; did you mean 'title'?"),
        ("title", ["mark=?"], "query writer 'title' has no option 'mark=.'; leave it out"),
        ("own_writers:Shouts", ["mrak=?"], "has no option 'mrak'; did you mean 'mark'?"),
        ("own_writers:Undecided", [], "made a Undecided without the attribute needs_pick"),
        ("own_writers:Silent", [], "has no method 'write'; rlrag.testing.check_query_writer"),
    ],
)
def test_a_writer_that_cannot_be_made_is_one_error(module, name, options, error):
    with pytest.raises(ConfigError, match=error):
        build_query_writer(name, options)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("few", "wrote 0 queries for 1 episodes"),
        ("number", "wrote 7; a query is a text or None"),
        ("raise", "query writer Breaks failed with KeyError: 'gone'"),
    ],
)
def test_a_writer_that_breaks_its_contract_is_named(module, what, error):
    writer = build_query_writer(f"{module}:Breaks")
    writer.what = what
    with pytest.raises(EpisodeError, match=error):
        write_queries(writer, [QUESTION], [[]], [None], [[]])


class Remembers:
    """Writes the number of episodes it has seen, which is no function of an episode."""

    needs_pick = False

    def __init__(self, keep: bool) -> None:
        self._seen = 0
        self._keep = keep

    def write(self, questions, picks, chosen):
        self._seen = (self._seen if self._keep else 0) + len(questions)
        return [str(self._seen)] * len(questions)


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        (Remembers(keep=True), "other queries when it is asked again"),
        (Remembers(keep=False), "depends on the others"),
    ],
)
def test_the_contract_finds_what_depends_on_more_than_the_episode(writer, error):
    with pytest.raises(AssertionError, match=error):
        check_query_writer(writer)


def test_the_contract_finds_a_query_without_the_pick_that_it_needs():
    writer = Remembers(keep=False)
    writer.needs_pick = True
    with pytest.raises(AssertionError, match="needs a pick but writes without one"):
        check_query_writer(writer)
