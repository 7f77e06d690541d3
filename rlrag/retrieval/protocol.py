"""The retriever protocol: the best corpus rows for each question, with scores.

Shape letters: B questions, P passages of the corpus, K hits, N given rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rlrag.errors import ConfigError
from rlrag.records import Passage


@dataclass(frozen=True, slots=True)
class Hits:
    """The best K rows of B questions, best first; equal scores stand in the order of their rows."""

    rows_BK: np.ndarray
    """Rows of the corpus, int64."""
    scores_BK: np.ndarray
    """Their scores, float32, non-increasing along K."""
    brought: tuple[Passage, ...] = ()
    """Passages that the corpus of P passages lacks; the row of the first of them is P."""


@runtime_checkable
class Retriever(Protocol):
    """Finds the passages of one corpus that fit a question."""

    @property
    def name(self) -> str:
        """Short name of the retriever, which names its column of scores."""
        ...

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question; raises `ConfigError` when the corpus has fewer."""
        ...

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The score of each given row for its question, float32 of the shape of `rows_BN`."""
        ...


def check_num_hits(k: int, num_passages: int) -> None:
    """Refuse to search for no passage, or for more than there are.

    Raises:
        ConfigError: naming both numbers.
    """
    if not 1 <= k <= num_passages:
        raise ConfigError(
            f"{k} candidates were requested from a corpus of {num_passages} passages; set "
            f"retrieval.num_candidates to a number from 1 to {num_passages}"
        )


def best_rows(scores_P: np.ndarray, k: int) -> np.ndarray:
    """Rows of the `k` highest scores, best first, the lower row first among equals.

    Example:
        >>> best_rows(np.array([0.5, 2.0, 0.5, 0.5]), 3).tolist()
        [1, 0, 2]
    """
    threshold = np.partition(scores_P, -k)[-k]
    above = np.flatnonzero(scores_P > threshold)
    # flatnonzero ascends, so a cut among equal scores keeps the lowest rows.
    equal = np.flatnonzero(scores_P == threshold)[: k - len(above)]
    rows = np.concatenate([above, equal])
    return rows[np.lexsort((rows, -scores_P[rows]))]


def in_order(rows_BN: np.ndarray, scores_BN: np.ndarray, k: int) -> Hits:
    """Sort scored rows, best first and the lower row first among equals, and keep `k`.

    Example:
        >>> in_order(np.array([[7, 3, 5]]), np.array([[0.5, 0.5, 0.9]]), 2).rows_BK.tolist()
        [[5, 3]]
    """
    scores_BN = np.asarray(scores_BN, dtype=np.float32)
    order_BK = np.lexsort((rows_BN, -scores_BN), axis=-1)[:, :k]
    return Hits(
        rows_BK=np.take_along_axis(rows_BN, order_BK, axis=1).astype(np.int64, copy=False),
        scores_BK=np.take_along_axis(scores_BN, order_BK, axis=1),
    )
