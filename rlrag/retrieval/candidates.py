"""Candidates of a fixed question set: rows of the corpus, retriever scores and vectors.

Shape letters: Q questions, B questions of a batch, N candidates, C retriever scores, D vector
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.records import Passage, Question


@dataclass(frozen=True)
class CandidateBatch:
    """What a selection policy sees of B questions.

    Candidates stand in the retriever's order, so position 0 is its first passage.
    `scores_BNC[..., 0]` is the ranking score (non-increasing along N); the further columns are the
    component retrievers' scores, named by `CandidateTable.score_names`.
    """

    question_texts: tuple[str, ...]
    passage_texts: tuple[tuple[str, ...], ...]
    scores_BNC: np.ndarray
    question_vectors_BD: np.ndarray
    passage_vectors_BND: np.ndarray

    def __len__(self) -> int:
        return len(self.scores_BNC)

    def of(self, questions: Sequence[int] | np.ndarray | slice) -> CandidateBatch:
        """Some of the questions, in this order."""
        rows = np.arange(len(self))[questions]
        return CandidateBatch(
            question_texts=tuple(self.question_texts[row] for row in rows),
            passage_texts=tuple(self.passage_texts[row] for row in rows),
            scores_BNC=self.scores_BNC[rows],
            question_vectors_BD=self.question_vectors_BD[rows],
            passage_vectors_BND=self.passage_vectors_BND[rows],
        )


@dataclass(frozen=True)
class CandidateTable:
    """The top N candidates of every question of a set, in the retriever's order.

    `passage_vectors_PD` holds a vector for each row of the corpus (a memory map where the corpus
    is large); both vector arrays have length 0 along D when there is no encoder.
    """

    questions: tuple[Question, ...]
    corpus: Corpus
    rows_QN: np.ndarray
    scores_QNC: np.ndarray
    score_names: tuple[str, ...]
    question_vectors_QD: np.ndarray
    passage_vectors_PD: np.ndarray

    def __len__(self) -> int:
        return len(self.questions)

    def __deepcopy__(self, memo: dict[int, object]) -> CandidateTable:
        """Itself: it never changes, and a copy would load memory-mapped vectors."""
        return self

    @property
    def has_golden_answers(self) -> bool:
        """Whether any question says what is right, so that answers can be measured.

        Where only some do, the others are unanswerable, and saying nothing is right.
        """
        return any(question.golden_answers for question in self.questions)

    @property
    def num_candidates(self) -> int:
        """Candidates a question (N)."""
        return self.rows_QN.shape[1]

    @property
    def vector_size(self) -> int:
        """Length of an embedding (D); 0 without an encoder."""
        return self.question_vectors_QD.shape[1]

    def passages(self, question_row: int) -> tuple[Passage, ...]:
        """The candidates of one question, in the retriever's order."""
        return tuple(self.corpus[int(row)] for row in self.rows_QN[question_row])

    def batch(self, question_rows: Sequence[int] | np.ndarray) -> CandidateBatch:
        """What a policy needs for these questions, in this order."""
        rows = np.asarray(question_rows, dtype=np.int64)
        return CandidateBatch(
            question_texts=tuple(self.questions[row].question for row in rows),
            passage_texts=tuple(
                tuple(passage.contents for passage in self.passages(row)) for row in rows
            ),
            scores_BNC=np.asarray(self.scores_QNC[rows], dtype=np.float32),
            question_vectors_BD=np.asarray(self.question_vectors_QD[rows], dtype=np.float32),
            passage_vectors_BND=np.asarray(
                self.passage_vectors_PD[self.rows_QN[rows]], dtype=np.float32
            ),
        )
