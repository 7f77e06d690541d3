"""Hybrid retrieval: combines two rankings by reciprocal rank fusion.

    score(q, d) = sum over rankings of 1 / (k + rank of d),  ranks from 1

(Cormack, Clarke and Buettcher, SIGIR 2009.) A passage that a ranking does not hold adds nothing.

Shape letters: B questions, K hits, N given rows or hits of one ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlrag.retrieval.protocol import Hits, Retriever, check_num_hits

RRF_K = 60  # of the paper; ranks hardly depend on it
_MIN_DEPTH = 100
_DEPTH_PER_HIT = 5


def fuse(rankings: Sequence[Sequence[int]], rrf_k: int) -> dict[int, float]:
    """Fused score of every row that stands in a ranking.

    Example:
        >>> fuse([[7, 4], [4]], rrf_k=60) == {7: 1 / 61, 4: 1 / 62 + 1 / 61}
        True
    """
    fused: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            fused[row] = fused.get(row, 0.0) + 1.0 / (rrf_k + rank)
    return fused


class HybridRetriever:
    """BM25 and dense retrieval fused by rank.

    Each ranking is read to a depth of max(100, 5 k), or to the end of a smaller corpus. BM25 ranks
    only the passages that share a word with the question: the order of the others means nothing.
    """

    name = "hybrid"

    def __init__(
        self, bm25: Retriever, dense: Retriever, num_passages: int, rrf_k: int = RRF_K
    ) -> None:
        self._bm25 = bm25
        self._dense = dense
        self._num_passages = num_passages
        self._rrf_k = rrf_k

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question."""
        check_num_hits(k, self._num_passages)
        rows_BK = np.zeros((len(questions), k), dtype=np.int64)
        scores_BK = np.zeros((len(questions), k), dtype=np.float32)
        for position, fused in enumerate(self._fused(questions, k)):
            rows_N = np.fromiter(fused, dtype=np.int64)
            scores_N = np.fromiter(fused.values(), dtype=np.float32)
            order_K = np.lexsort((rows_N, -scores_N))[:k]
            rows_BK[position], scores_BK[position] = rows_N[order_K], scores_N[order_K]
        return Hits(rows_BK, scores_BK)

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The score of each given row for its question, as a search for N rows would give it."""
        fused = self._fused(questions, rows_BN.shape[1])
        return np.array(
            [
                [scores.get(int(row), 0.0) for row in rows]
                for scores, rows in zip(fused, rows_BN, strict=True)
            ],
            dtype=np.float32,
        ).reshape(rows_BN.shape)

    def _fused(self, questions: Sequence[str], k: int) -> list[dict[int, float]]:
        depth = min(max(_MIN_DEPTH, _DEPTH_PER_HIT * k), self._num_passages)
        lexical = self._bm25.search(questions, depth)
        dense = self._dense.search(questions, depth)
        return [
            fuse([lexical_rows[lexical_scores > 0].tolist(), dense_rows.tolist()], self._rrf_k)
            for lexical_rows, lexical_scores, dense_rows in zip(
                lexical.rows_BK, lexical.scores_BK, dense.rows_BK, strict=True
            )
        ]
