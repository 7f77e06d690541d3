"""A task that can be learned, as a corpus with retrievers; logs of a service that answered it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from stand_ins import make_table

from rlrag.data.feedback import FeedbackStore, SelectionEvent
from rlrag.pipeline import Library
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Hits


class TableRetriever:
    """Knows the scores of a table's candidates and of nothing else."""

    def __init__(self, table: CandidateTable, column: int) -> None:
        self.name = table.score_names[column]
        self._rows = {q.question: table.rows_QN[i] for i, q in enumerate(table.questions)}
        self._scores = {
            (q.question, int(row)): table.scores_QNC[i, n, column]
            for i, q in enumerate(table.questions)
            for n, row in enumerate(table.rows_QN[i])
        }

    def search(self, questions: Sequence[str], k: int) -> Hits:
        rows_BK = np.stack([self._rows[text][:k] for text in questions])
        return Hits(rows_BK, self.scores(questions, rows_BK))

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        return np.array(
            [
                [self._scores[text, int(row)] for row in rows]
                for text, rows in zip(questions, rows_BN, strict=True)
            ],
            dtype=np.float32,
        )


@dataclass(frozen=True)
class TableRetrievers(RetrieverSet):
    """The retrievers of a table, with its vectors."""

    vector_of: dict[str, np.ndarray]

    def question_vectors(self, questions: Sequence[str]) -> np.ndarray:
        return np.stack([self.vector_of[text] for text in questions])


def library_of(table: CandidateTable) -> Library:
    """What retrieves this table."""
    primary, other = TableRetriever(table, 0), TableRetriever(table, 1)
    texts = [question.question for question in table.questions]
    return Library(
        table.corpus,
        TableRetrievers(
            primary=primary,
            components={primary.name: primary, other.name: other},
            encoder=None,
            passage_vectors=table.passage_vectors_PD,
            manifest_hash="table",
            vector_of=dict(zip(texts, table.question_vectors_QD, strict=True)),
        ),
    )


def part_of(table: CandidateTable, rows: slice) -> CandidateTable:
    """Some questions of a table, over the same corpus."""
    return replace(
        table,
        questions=table.questions[rows],
        rows_QN=table.rows_QN[rows],
        scores_QNC=table.scores_QNC[rows],
        question_vectors_QD=table.question_vectors_QD[rows],
    )


def event(table: CandidateTable, row: int, number: int, **changes: Any) -> SelectionEvent:
    """A selection of one passage, drawn evenly from the question's candidates."""
    ids = tuple(passage.id for passage in table.passages(row))
    values: dict[str, Any] = {
        "request_id": f"request-{number}",
        "time_s": time.time(),
        "version": "v1",
        "question": table.questions[row].question,
        "candidate_ids": ids,
        "actions": (number % len(ids),),
        "propensity_logp": -float(np.log(len(ids))),
        "explored": True,
        "answer": "",
        "answer_logp": 0.0,
    }
    return SelectionEvent(**(values | changes))


def write_log(path: Path, events: Sequence[SelectionEvent], **feedback: Any) -> Path:
    """A log of these selections; all have the same feedback, a reward of 1 where none is given."""
    store = FeedbackStore(path)
    for each in events:
        assert store.record_selection(each)
        assert store.record_feedback(each.request_id, **(feedback or {"reward": 1.0}))
    return path


def even_log(path: Path, num_questions: int = 24, times: int = 10) -> tuple[Path, CandidateTable]:
    """Every candidate of every question equally often; 1 for the passage that answers."""
    table = make_table(num_questions)
    store = FeedbackStore(path)
    for number in range(num_questions * times):
        row, place = divmod(number, times)
        found = event(table, row, number, actions=(place % table.num_candidates,))
        store.record_selection(found)
        gold = found.candidate_ids[found.actions[0]] in table.questions[row].gold_ids
        store.record_feedback(found.request_id, thumbs="up" if gold else "down")
    return path, table
