"""The contract test of query writers."""

from __future__ import annotations

from collections.abc import Sequence

from rlrag.environment.sample_task import sample_candidates
from rlrag.records import Passage, Question
from rlrag.selection.queries.protocol import QueryWriter

_NUM_QUESTIONS = 4


def check_query_writer(writer: QueryWriter) -> None:
    """Whether a query writer can be asked in episodes: one text or None each, the same each time.

    What it writes for an episode depends on nothing but that episode. One that needs a pick has
    nothing to ask without.

    Args:
        writer: The writer; one of your own is made by `build_query_writer`.

    Raises:
        AssertionError: what is broken.
    """
    assert isinstance(writer.needs_pick, bool), "needs_pick is neither True nor False"
    assert list(writer.write([], [], [])) == [], "no episodes have queries"
    questions, picks, chosen = _episodes()
    queries = _queries(writer, questions, picks, chosen)
    for query, pick in zip(queries, chosen, strict=True):
        if query is None:
            continue
        assert isinstance(query, str), f"a query is a {type(query).__name__}"
        assert query.strip(), "a query is empty; None says that there is nothing to ask"
        assert pick is not None or not writer.needs_pick, "it needs a pick but writes without one"
    assert any(query is not None for query in queries), "it never writes a query"
    assert _queries(writer, questions, picks, chosen) == queries, (
        "the same episodes get other queries when it is asked again"
    )
    backwards = _queries(writer, questions[::-1], picks[::-1], chosen[::-1])
    assert backwards[::-1] == queries, "queries depend on the order of the episodes"
    alone = [
        _queries(writer, [question], [picked], [pick])[0]
        for question, picked, pick in zip(questions, picks, chosen, strict=True)
    ]
    assert alone == queries, "what is written for an episode depends on the others"


def _queries(
    writer: QueryWriter,
    questions: Sequence[Question],
    picks: Sequence[Sequence[Passage]],
    chosen: Sequence[Passage | None],
) -> list[str | None]:
    """What it writes, one an episode, into lists that it leaves as they are."""
    given = (list(questions), [list(picked) for picked in picks], list(chosen))
    queries = list(writer.write(*given))
    assert given == (list(questions), [list(picked) for picked in picks], list(chosen)), (
        "it changes what it is given"
    )
    assert len(queries) == len(questions), f"{len(questions)} episodes have {len(queries)} queries"
    return queries


def _episodes() -> tuple[list[Question], list[list[Passage]], list[Passage | None]]:
    """Of the built-in questions: without a pick, with one, with two, and without title or text."""
    table = sample_candidates()
    questions: list[Question] = []
    picks: list[list[Passage]] = []
    chosen: list[Passage | None] = []
    for row, question in enumerate(table.questions[:_NUM_QUESTIONS]):
        first, second = table.passages(row)[:2]
        untitled, blank = Passage("untitled", "", first.text), Passage("blank", first.title, "")
        for picked, pick in (
            ([], None),
            ([first], first),
            ([first, second], second),
            ([first, second], None),
            ([untitled], untitled),
            ([blank], blank),
        ):
            questions.append(question)
            picks.append(list(picked))
            chosen.append(pick)
    return questions, picks, chosen
