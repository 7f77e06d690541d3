from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rlrag.errors import ConfigError
from rlrag.retrieval.hybrid import HybridRetriever, fuse
from rlrag.retrieval.protocol import Hits, Retriever, best_rows


class FixedRetriever:
    """Gives every question the same scores, one a passage."""

    def __init__(self, name: str, scores_P: Sequence[float]) -> None:
        self.name = name
        self._scores_P = np.array(scores_P, dtype=np.float32)
        self.depths: list[int] = []

    def search(self, questions: Sequence[str], k: int) -> Hits:
        self.depths.append(k)
        rows_BK = np.tile(best_rows(self._scores_P, k), (len(questions), 1))
        return Hits(rows_BK, self._scores_P[rows_BK])

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        return self._scores_P[rows_BN]


def hybrid(
    bm25: Sequence[float], dense: Sequence[float], rrf_k: int = 60
) -> tuple[HybridRetriever, FixedRetriever]:
    lexical = FixedRetriever("bm25", bm25)
    return HybridRetriever(lexical, FixedRetriever("dense", dense), len(bm25), rrf_k), lexical


def test_fusion_by_hand() -> None:
    # BM25 ranks 2, 0, 1; dense ranks 0, 2, 1.
    retriever, _ = hybrid([2.0, 1.0, 3.0], [0.9, 0.1, 0.5])
    assert isinstance(retriever, Retriever)
    hits = retriever.search(["q"], 3)
    # Rows 0 and 2 both have 1/61 + 1/62: the lower row comes first.
    assert hits.rows_BK.tolist() == [[0, 2, 1]]
    expected = [[1 / 61 + 1 / 62, 1 / 61 + 1 / 62, 2 / 63]]
    np.testing.assert_allclose(hits.scores_BK, expected, rtol=1e-6)


def test_a_passage_without_a_shared_word_has_no_bm25_rank() -> None:
    retriever, _ = hybrid([0.0, 0.0, 1.5], [0.1, 0.9, 0.5], rrf_k=1)
    hits = retriever.search(["q"], 3)
    # Row 2: 1/2 + 1/3; row 1: 1/2 from dense alone; row 0: 1/4 from dense alone.
    assert hits.rows_BK.tolist() == [[2, 1, 0]]
    np.testing.assert_allclose(hits.scores_BK, [[5 / 6, 1 / 2, 1 / 4]], rtol=1e-6)


def test_fusion_equals_a_loop_over_all_passages() -> None:
    rng = np.random.default_rng(3)
    bm25, dense = rng.random(40) + 0.1, rng.random(40)
    retriever, _ = hybrid(bm25.tolist(), dense.tolist(), rrf_k=7)
    rank = [np.argsort(np.argsort(-scores)) + 1 for scores in (bm25, dense)]
    expected = 1 / (7 + rank[0]) + 1 / (7 + rank[1])
    hits = retriever.search(["q"], 40)
    np.testing.assert_allclose(hits.scores_BK[0], np.sort(expected)[::-1], rtol=1e-6)
    np.testing.assert_allclose(hits.scores_BK[0], expected[hits.rows_BK[0]], rtol=1e-6)


def test_scores_of_the_hits_equal_the_search() -> None:
    rng = np.random.default_rng(4)
    retriever, _ = hybrid(rng.random(300).tolist(), rng.random(300).tolist())
    hits = retriever.search(["a", "b"], 10)
    np.testing.assert_array_equal(retriever.scores(["a", "b"], hits.rows_BK), hits.scores_BK)
    assert retriever.search([], 10).rows_BK.shape == (0, 10)
    assert retriever.scores([], np.zeros((0, 10), np.int64)).shape == (0, 10)


def test_rankings_are_read_to_five_times_the_hits_at_least_to_a_hundred() -> None:
    retriever, lexical = hybrid([1.0] * 300, [1.0] * 300)
    retriever.search(["q"], 3)
    retriever.search(["q"], 50)
    retriever.search(["q"], 90)
    assert lexical.depths == [100, 250, 300]


def test_equal_scores_stand_in_row_order() -> None:
    retriever, _ = hybrid([1.0] * 8, [1.0] * 8)
    assert retriever.search(["q"], 5).rows_BK.tolist() == [[0, 1, 2, 3, 4]]


def test_more_hits_than_passages_is_refused() -> None:
    retriever, _ = hybrid([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"3 candidates .* 2 passages"):
        retriever.search(["q"], 3)


def test_fusing_nothing_gives_nothing() -> None:
    assert fuse([[], []], rrf_k=60) == {}
