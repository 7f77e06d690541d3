"""The query writer protocol, and the rules that hold for what any writer writes.

Shape letters: E episodes, K picks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlrag.errors import EpisodeError, RlragError
from rlrag.records import Passage, Question

MAX_QUERY_CHARACTERS = 1000
"""Characters of a query that are searched; what a writer writes beyond them is cut."""


@runtime_checkable
class QueryWriter(Protocol):
    """Writes what an episode searches next."""

    needs_pick: bool
    """Whether it writes about one of the picks: where none is chosen, there is no query then."""

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """One query for each of E episodes; None where there is nothing to ask.

        All episodes that search at once are asked together, so that a language model can write for
        them in one batch. What is written for one does not depend on the others.

        Args:
            questions: The question of each episode.
            picks: What was picked in it so far, in order.
            chosen: The pick that the query is to be about; None where there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """The queries of E episodes, None where there is nothing to search.

    `num_cut` counts the queries that were longer than `MAX_QUERY_CHARACTERS`.
    """

    queries: tuple[str | None, ...]
    num_cut: int


def fresh_query(query: str, issued: Sequence[str]) -> str | None:
    r"""A query as it is searched, or None where that would find nothing new.

    White space is normalised, and what is longer than `MAX_QUERY_CHARACTERS` is cut at the end of
    a word. There is nothing to search where no text is left, or where it was searched before, in
    whichever case and white space. The question is what an episode searches first, so it belongs to
    `issued` too.

    Args:
        query: What was written.
        issued: What the episode has searched so far, the question included.

    Example:
        >>> fresh_query("  capital of\nFrance", ["Where is Paris?"])
        'capital of France'
        >>> fresh_query("where is  paris?", ["Where is Paris?"]) is None
        True
    """
    text = _cut(_one_line(query))
    known = {_cut(_one_line(each)).casefold() for each in issued}
    return text if text and text.casefold() not in known else None


def is_cut(query: str) -> bool:
    """Whether `fresh_query` would leave out the end of a query."""
    return len(_one_line(query)) > MAX_QUERY_CHARACTERS


def write_queries(
    writer: QueryWriter,
    questions: Sequence[Question],
    picks: Sequence[Sequence[Passage]],
    chosen: Sequence[Passage | None],
    issued: Sequence[Sequence[str]],
    number: int | None = None,
) -> Written:
    """Ask a writer, and hold what it wrote to the rules of `fresh_query`.

    Args:
        writer: The writer.
        questions: The question of each episode.
        picks: What was picked in it so far, in order.
        chosen: The pick that the query is to be about; None where there is none.
        issued: What each episode has searched besides its question.
        number: Which of several writers it is, for the error.

    Raises:
        EpisodeError: when the writer failed, or gave something else than a text or None each.
    """
    who = f"query writer {'' if number is None else f'{number}, '}{type(writer).__name__}"
    try:
        found = list(writer.write(questions, picks, chosen))
    except RlragError:
        raise
    except Exception as error:
        raise EpisodeError(f"{who} failed with {type(error).__name__}: {error}") from error
    if len(found) != len(questions):
        raise EpisodeError(
            f"{who} wrote {len(found)} queries for "
            f"{len(questions)} episodes; let it write one each, None where there is nothing to ask"
        )
    for query in found:
        if query is not None and not isinstance(query, str):
            raise EpisodeError(f"{who} wrote {query!r}; a query is a text or None")
    queries = [
        None if query is None else fresh_query(query, [question.question, *before])
        for query, question, before in zip(found, questions, issued, strict=True)
    ]
    num_cut = sum(
        fresh is not None and is_cut(query or "")
        for query, fresh in zip(found, queries, strict=True)
    )
    return Written(tuple(queries), num_cut)


def _one_line(query: str) -> str:
    return " ".join(query.split())


def _cut(text: str) -> str:
    """At most `MAX_QUERY_CHARACTERS` of a line, up to the end of a word where there is one."""
    if len(text) <= MAX_QUERY_CHARACTERS:
        return text
    end = text.rfind(" ", 0, MAX_QUERY_CHARACTERS + 1)
    return text[: end if end > 0 else MAX_QUERY_CHARACTERS]
