"""Fixed rules that hop: the retriever's first passage, then the neighbours likest the question.

They follow the same kinds of edges as the policy, all of a passage's and not only those that an
episode reveals, and need no training: what a learned path has to beat.

Shape letters: Q questions, M neighbours, U different rows, D vector length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable, Sources, vectors_at
from rlrag.selection.features import content_words
from rlrag.selection.slot_features import EDGE_KINDS

HOP_RULES = ("hop_text", "hop_title", "hop_both")
"""By what a neighbour is likened to the question: its text, its title, or the sum of both."""


def hop_selections(
    rule: str, table: CandidateTable, edges: Sequence[str], num_selected: int
) -> list[tuple[Passage, ...]]:
    """What a rule shows for each question of a table: the first passage, then K - 1 neighbours.

    Likeness is the inner product of vectors where there is an encoder, else the share of the
    question's words. A title such as `Mongolia - Economy: Exports` counts from behind its last dash
    on, as passages of one document share what stands before.

    Args:
        rule: One of `HOP_RULES`.
        table: The questions, with sources.
        edges: Kinds of edges to follow.
        num_selected: The most passages (K).
    """
    assert table.sources is not None
    first_Q = table.rows_QN[:, 0].tolist()
    near = [_neighbours(table.sources, row, edges) for row in first_Q]
    parts = []
    if rule in ("hop_text", "hop_both"):
        parts.append(_by_text(table, near))
    if rule in ("hop_title", "hop_both"):
        parts.append(_by_title(table, near))
    selections = []
    for first, rows_M, *values in zip(first_Q, near, *parts, strict=True):
        best = np.lexsort((rows_M, -np.sum(values, axis=0)))[: num_selected - 1]
        selections.append(tuple(table.corpus[int(row)] for row in (first, *rows_M[best])))
    return selections


def _neighbours(sources: Sources, row: int, edges: Sequence[str]) -> np.ndarray:
    """Rows that these kinds of edges lead to, ascending, int64 (M,)."""
    if sources.graph is None:
        return np.zeros(0, dtype=np.int64)
    near = sources.graph.neighbours(row)
    rows_M = np.asarray(near.rows)[np.isin(np.array(EDGE_KINDS)[near.kinds], edges)]
    return np.unique(rows_M[rows_M != row])


def _by_text(table: CandidateTable, near: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How like each question the texts of its neighbours are, (M,) each."""
    if not table.vector_size:
        return [
            _shared_words(table, q, [table.corpus[int(row)].contents for row in rows_M])
            for q, rows_M in enumerate(near)
        ]
    return [
        vectors_at(rows_M, table.passage_vectors_PD, table.brought_vectors_XD) @ _vector(table, q)
        for q, rows_M in enumerate(near)
    ]


def _by_title(table: CandidateTable, near: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same of their titles."""
    titles = [[table.corpus[int(row)].title.rpartition(" - ")[2] for row in rows] for rows in near]
    encoder = table.sources.encoder if table.sources is not None else None
    different = sorted({title for texts in titles for title in texts})
    if encoder is None or not table.vector_size or not different:
        return [_shared_words(table, q, texts) for q, texts in enumerate(titles)]
    vectors_UD = encoder.encode(different)
    place_of = {title: place for place, title in enumerate(different)}
    return [
        vectors_UD[[place_of[title] for title in texts]] @ _vector(table, q)
        for q, texts in enumerate(titles)
    ]


def _vector(table: CandidateTable, question: int) -> np.ndarray:
    return np.asarray(table.question_vectors_QD[question], dtype=np.float32)


def _shared_words(table: CandidateTable, question: int, texts: Sequence[str]) -> np.ndarray:
    """The share of a question's words that each text has."""
    asked = content_words(table.questions[question].question)
    return np.array([len(asked & content_words(text)) / max(len(asked), 1) for text in texts])
