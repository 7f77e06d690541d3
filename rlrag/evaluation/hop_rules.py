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
    likeness = np.zeros((len(near),), dtype=object)
    for place, found in enumerate(near):
        likeness[place] = np.zeros(len(found))
    if rule in ("hop_text", "hop_both"):
        likeness += _likeness(table, near, [])
    if rule in ("hop_title", "hop_both"):
        titles = sorted({row for rows in near for row in rows.tolist()})
        likeness += _likeness(table, near, titles)
    selections = []
    for first, rows_M, values_M in zip(first_Q, near, likeness, strict=True):
        best = np.lexsort((rows_M, -values_M))[: num_selected - 1]
        selections.append(tuple(table.corpus[int(row)] for row in (first, *rows_M[best])))
    return selections


def _neighbours(sources: Sources, row: int, edges: Sequence[str]) -> np.ndarray:
    """Rows that these kinds of edges lead to, ascending, int64 (M,)."""
    if sources.graph is None:
        return np.zeros(0, dtype=np.int64)
    near = sources.graph.neighbours(row)
    rows_M = np.asarray(near.rows)[np.isin(np.array(EDGE_KINDS)[near.kinds], edges)]
    return np.unique(rows_M[rows_M != row])


def _likeness(
    table: CandidateTable, near: Sequence[np.ndarray], titles: Sequence[int]
) -> np.ndarray:
    """How like each question its neighbours are, an array (M,) each; by titles of these rows."""
    assert table.sources is not None
    found = np.zeros(len(near), dtype=object)
    encoder = table.sources.encoder
    if encoder is None or not table.vector_size:
        for place, rows_M in enumerate(near):
            asked = content_words(table.questions[place].question)
            texts = [table.corpus[int(row)] for row in rows_M]
            words = [content_words(_title(p) if titles else p.contents) for p in texts]
            found[place] = np.array([len(asked & w) / max(len(asked), 1) for w in words])
        return found
    if titles:
        row_of = {row: place for place, row in enumerate(titles)}
        vectors_UD = encoder.encode([_title(table.corpus[row]) for row in titles])
    for place, rows_M in enumerate(near):
        question_D = np.asarray(table.question_vectors_QD[place], dtype=np.float32)
        if titles:
            vectors_MD = vectors_UD[[row_of[row] for row in rows_M.tolist()]]
        else:
            vectors_MD = vectors_at(rows_M, table.passage_vectors_PD, table.brought_vectors_XD)
        found[place] = vectors_MD @ question_D
    return found


def _title(passage: Passage) -> str:
    return passage.title.rpartition(" - ")[2]
