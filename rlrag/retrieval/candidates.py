"""Candidates of a fixed question set: rows of the corpus, retriever scores and vectors.

Shape letters: Q questions, B questions of a batch, N candidates, C retriever scores, D vector
length, P passages of the corpus, X passages that a search brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.records import Passage, Question
from rlrag.retrieval.dense.encoder import Encoder
from rlrag.retrieval.graph import PassageGraph
from rlrag.retrieval.protocol import Retriever


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
class Sources:
    """Where an episode looks for more than its question's candidates, over the same corpus.

    `graph` is None where no edges are followed, `encoder` where passages have no vectors.
    """

    retriever: Retriever
    graph: PassageGraph | None = None
    encoder: Encoder | None = None


@dataclass(frozen=True)
class CandidateTable:
    """The top N candidates of every question of a set, in the retriever's order.

    `corpus` is that of the run, and behind it what the retriever brought with its text.
    `passage_vectors_PD` holds a vector for each row of the run's corpus (a memory map where it is
    large) and `brought_vectors_XD` for each row behind it; all vector arrays have length 0 along D
    when there is no encoder. `sources` is None where episodes end with their candidates.
    """

    questions: tuple[Question, ...]
    corpus: Corpus
    rows_QN: np.ndarray
    scores_QNC: np.ndarray
    score_names: tuple[str, ...]
    question_vectors_QD: np.ndarray
    passage_vectors_PD: np.ndarray
    brought_vectors_XD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    sources: Sources | None = None

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

    def passage_vectors(self, question_rows: np.ndarray) -> np.ndarray:
        """Vectors of the candidates of B questions, float32 of shape (B, N, D)."""
        rows_BN = self.rows_QN[question_rows]
        return vectors_at(rows_BN, self.passage_vectors_PD, self.brought_vectors_XD)

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
            passage_vectors_BND=self.passage_vectors(rows),
        )


def vectors_at(rows: np.ndarray, passages_PD: np.ndarray, brought_XD: np.ndarray) -> np.ndarray:
    """Vectors of rows that go on from a corpus to what a search brought, float32.

    Example:
        >>> vectors_at(np.array([[1, 0]]), np.array([[0.5]]), np.array([[2.0]])).tolist()
        [[[2.0], [0.5]]]
    """
    if not len(brought_XD):
        return np.asarray(passages_PD[rows], dtype=np.float32)
    vectors = np.empty((*rows.shape, brought_XD.shape[1]), dtype=np.float32)
    is_brought = rows >= len(passages_PD)
    vectors[is_brought] = brought_XD[rows[is_brought] - len(passages_PD)]
    if not is_brought.all():
        vectors[~is_brought] = passages_PD[rows[~is_brought]]
    return vectors
