"""Dense retrieval: finds the passages with the nearest vectors.

Shape letters: B questions, P passages, D vector length, K hits, N given rows or vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.retrieval.dense.encoder import Encoder
from rlrag.retrieval.dense.index import VectorIndex, exact_products
from rlrag.retrieval.dense.shards import Shards, merge
from rlrag.retrieval.protocol import Hits, check_num_hits


class DenseRetriever(VectorIndex):
    """Ranks passages by the inner product of their vector with the question's.

    Args:
        encoder: Encodes questions; the last batch of questions is remembered, so that `search`,
            `scores` and `question_vectors` of one batch encode it once.
        vectors_PD: Vectors of all passages, usually a memory map.
        config: `index`, and how thoroughly an approximate index is searched.
        index: What `open_index` gave; None for `flat`.
    """

    name = "dense"

    def __init__(
        self,
        encoder: Encoder,
        vectors_PD: np.ndarray,
        config: RetrievalConfig,
        index: Any | None = None,
    ) -> None:
        super().__init__(vectors_PD, config, index)
        self._encoder = encoder
        self._last: tuple[tuple[str, ...], np.ndarray] | None = None

    def question_vectors(self, questions: Sequence[str]) -> np.ndarray:
        """Vectors of the questions, shape (B, D), float32."""
        texts = tuple(questions)
        last = self._last
        if last is None or last[0] != texts:
            last = self._last = (texts, self._encoder.encode(texts, "question"))
        return last[1]

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question."""
        return self.search_vectors(self.question_vectors(questions), k)

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The inner product of each given row with its question."""
        return self.inner_products(self.question_vectors(questions), rows_BN)

    def scores_of(self, questions: Sequence[str], vectors_BND: np.ndarray) -> np.ndarray:
        """The inner product of each given vector with its question, as `scores` has it."""
        return exact_products(self.question_vectors(questions), vectors_BND)


class ShardedDenseRetriever(DenseRetriever):
    """The same ranking, searched part by part.

    The vectors are read here only where single rows are scored.

    Args:
        encoder: Encodes questions.
        vectors_PD: Vectors of all passages, a memory map.
        config: `index` and its parameters, with which each part is searched.
        shards: Searches the parts.
    """

    def __init__(
        self, encoder: Encoder, vectors_PD: np.ndarray, config: RetrievalConfig, shards: Shards
    ) -> None:
        super().__init__(encoder, vectors_PD, config)
        self._shards = shards

    def search_vectors(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """The best `k` rows for each question vector."""
        check_num_hits(k, len(self._vectors_PD))
        return merge(self._shards.search(vectors_BD, k), k)
