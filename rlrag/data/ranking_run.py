"""Reads the rankings of a TREC run file.

A line is `query-id Q0 passage-id rank score tag`, its columns separated by white space; the file is
plain or gzip. As in trec_eval the score decides and the highest comes first. Where scores are equal
the lower rank comes first, which trec_eval does not read, and then the earlier line.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from rlrag.data.lines import read_lines
from rlrag.errors import DataError

_EXPECTED = (
    "expected six columns, 'query-id Q0 passage-id rank score tag', with an integer rank and a "
    "finite score"
)


def read_ranking_run(
    path: Path, wanted: Mapping[str, Collection[str]]
) -> dict[str, tuple[str, ...]]:
    """The wanted passages of each question that the run names, best first.

    The lines stream by: what is kept in memory is what is wanted. A question of the run that names
    none of its wanted passages has an empty order.

    Args:
        path: The run file.
        wanted: Ids of passages by question id; every other line is read over.

    Raises:
        DataError: naming file and line, for a line that is none of a run or ranks a wanted passage
            twice; when the run is empty, names no question that is wanted, or no wanted passage.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    first_question, strange_passage = None, None
    for place, line in read_lines(path):
        question_id, passage_id, place_in_order = _parse(line, place)
        first_question = first_question or question_id
        if question_id not in wanted:
            continue
        ranked = found.setdefault(question_id, {})
        if passage_id not in wanted[question_id]:
            strange_passage = strange_passage or (question_id, passage_id)
            continue
        if passage_id in ranked:
            raise DataError(
                f"{place}: passage {passage_id!r} is ranked twice for question {question_id!r}; "
                "expected each passage once per question"
            )
        ranked[passage_id] = place_in_order
    if first_question is None:
        raise DataError(f"{path} has no lines; {_EXPECTED}")
    if not found:
        raise DataError(
            f"{path} ranks passages for other questions: its first question is "
            f"{first_question!r}, but the first of the {len(wanted)} questions of this run is "
            f"{next(iter(wanted), None)!r}; give a ranking for the same questions"
        )
    if strange_passage and not any(found.values()):
        question_id, passage_id = strange_passage
        raise DataError(
            f"{path} ranks none of the wanted passages: for question {question_id!r} it names "
            f"{passage_id!r}, where {next(iter(wanted[question_id]), None)!r} is wanted; give a "
            "ranking over the same corpus"
        )
    return {
        question_id: tuple(sorted(ranked, key=ranked.__getitem__))
        for question_id, ranked in found.items()
    }


def _parse(line: str, place: str) -> tuple[str, str, tuple[float, int]]:
    """Question, passage, and what a smaller value of puts the passage further in front."""
    columns = line.split()
    if len(columns) != 6:
        raise DataError(f"{place}: {len(columns)} columns; {_EXPECTED}")
    question_id, _, passage_id, rank, score, _ = columns
    try:
        place_in_order = -float(score), int(rank)
    except ValueError as error:
        raise DataError(f"{place}: rank {rank!r}, score {score!r}; {_EXPECTED}") from error
    if not math.isfinite(place_in_order[0]):
        raise DataError(f"{place}: score {score!r}; {_EXPECTED}")
    return question_id, passage_id, place_in_order
