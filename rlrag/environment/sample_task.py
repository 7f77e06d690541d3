"""A small built-in selection task for examples and tests.

No model is involved: candidates are ranked by the words that they share with the question, and a
vector counts words in hashed buckets. Everything is deterministic and takes milliseconds.
Shape letters: Q questions, P passages, W distinct words, N candidates, D vector length.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlrag.data.sample import sample_corpus, sample_questions
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Hits, in_order
from rlrag.selection.slot_features import EDGE_KINDS

_find_names = re.compile(r"[A-Z]\w+").findall

NUM_CANDIDATES = 8
VECTOR_SIZE = 32


@functools.cache
def sample_candidates() -> CandidateTable:
    """The candidates of the built-in questions; built once a process."""
    corpus, questions = sample_corpus(), sample_questions()
    passage_words = [_words(passage.contents) for passage in corpus]
    question_words = [_words(question.question) for question in questions]
    scores_QP = overlap_scores(question_words, passage_words)
    # A stable sort: passages with equal scores keep the order of the corpus.
    rows_QN = np.argsort(-scores_QP, axis=1, kind="stable")[:, :NUM_CANDIDATES]
    scores_QN = np.take_along_axis(scores_QP, rows_QN, axis=1)
    return CandidateTable(
        questions=questions,
        corpus=corpus,
        rows_QN=rows_QN,
        scores_QNC=scores_QN[:, :, None].astype(np.float32),
        score_names=("overlap",),
        question_vectors_QD=hashed_vectors(question_words),
        passage_vectors_PD=hashed_vectors(passage_words),
    )


@dataclass(frozen=True, slots=True)
class SampleNeighbours:
    """The edges of one passage, each array of shape (M,)."""

    rows: np.ndarray
    kinds: np.ndarray
    weights: np.ndarray


class SampleEdges:
    """The graph of the built-in passages: who names whose title, and who shares rare names.

    An edge for a title weighs 1, one for shared names the sum of log(P / passages with the name)
    over log P.
    """

    def __init__(self) -> None:
        passages = list(sample_corpus())
        self._titles = [_words(passage.title) for passage in passages]
        names = [set(_find_names(passage.contents)) for passage in passages]
        counts = Counter(name for each in names for name in each)
        rarity = {
            name: 1 - math.log(count) / math.log(len(names)) for name, count in counts.items()
        }
        self._edges: list[list[tuple[int, int, float]]] = [[] for _ in passages]
        out, into, shared = (EDGE_KINDS.index(k) for k in ("title_out", "title_in", "shared"))
        for row, passage in enumerate(passages):
            for other in self.named_in(passage.text).tolist():
                if other != row:
                    self._edges[row].append((other, out, 1.0))
                    self._edges[other].append((row, into, 1.0))
            for other, theirs in enumerate(names):
                weight = sum(rarity[name] for name in names[row] & theirs)
                if other != row and weight > 0:
                    self._edges[row].append((other, shared, weight))

    def __deepcopy__(self, memo: dict[int, object]) -> SampleEdges:
        """Itself: it never changes."""
        return self

    def neighbours(self, row: int) -> SampleNeighbours:
        """The edges of a passage."""
        edges = np.array(self._edges[row], dtype=np.float32).reshape(-1, 3)
        return SampleNeighbours(
            edges[:, 0].astype(np.int64), edges[:, 1].astype(np.int8), edges[:, 2]
        )

    def named_in(self, text: str) -> np.ndarray:
        """Rows of the passages whose titles stand in a text."""
        padded = f" {' '.join(_words(text))} "
        rows = [row for row, title in enumerate(self._titles) if f" {' '.join(title)} " in padded]
        return np.array(rows, dtype=np.int64)


class SampleSearch:
    """Searches the built-in passages by the words that they share with a query."""

    def __init__(self) -> None:
        self._passage_words = [_words(passage.contents) for passage in sample_corpus()]

    def __deepcopy__(self, memo: dict[int, object]) -> SampleSearch:
        """Itself: it never changes."""
        return self

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each query."""
        scores_QP = overlap_scores([_words(query) for query in questions], self._passage_words)
        rows_QP = np.broadcast_to(np.arange(scores_QP.shape[1]), scores_QP.shape)
        return in_order(rows_QP, scores_QP, k)


class SampleWriter:
    """Asks the question again with the title of a pick."""

    needs_pick = True

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """A query for each episode of the call."""
        asked = zip(questions, chosen, strict=True)
        return [None if pick is None else f"{q.question} {pick.title}" for q, pick in asked]


def overlap_scores(question_words: list[list[str]], passage_words: list[list[str]]) -> np.ndarray:
    """Share of each question's distinct words that each passage has, rare words counting more.

    score = sum of idf over shared words / sum of idf over the question's words, float64 [Q, P] in
    [0, 1], with idf(w) = log(1 + P / (1 + passages with w)), in nats. A question without words
    scores 0 everywhere.

    Example:
        >>> overlap_scores([["a", "b"]], [["a", "b"], ["c"]]).tolist()
        [[1.0, 0.0]]
    """
    index = {word: i for i, word in enumerate(sorted({w for row in question_words for w in row}))}
    has_QW = _presence(question_words, index)
    has_PW = _presence(passage_words, index)
    idf_W = np.log1p(len(passage_words) / (1.0 + has_PW.sum(axis=0)))
    total_Q = has_QW @ idf_W
    return (has_QW * idf_W) @ has_PW.T / np.where(total_Q > 0, total_Q, 1.0)[:, None]


def hashed_vectors(texts: list[list[str]]) -> np.ndarray:
    """Unit vectors of word counts in `VECTOR_SIZE` buckets, float32; zero for no words.

    The bucket is CRC-32 of the word, which, unlike Python's `hash`, is the same in every process.

    Example:
        >>> hashed_vectors([["paris", "paris"]]).max().item()
        1.0
    """
    vectors = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float64)
    for row, words in enumerate(texts):
        for word in words:
            vectors[row, zlib.crc32(word.encode()) % VECTOR_SIZE] += 1.0
        vectors[row] /= math.sqrt(float(vectors[row] @ vectors[row])) or 1.0
    return vectors.astype(np.float32)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _presence(texts: Iterable[list[str]], index: dict[str, int]) -> np.ndarray:
    rows = [[index[word] for word in set(words) if word in index] for words in texts]
    presence = np.zeros((len(rows), len(index)), dtype=np.float64)
    for row, columns in enumerate(rows):
        presence[row, columns] = 1.0
    return presence
