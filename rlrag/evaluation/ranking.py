"""Recall and nDCG of ranked passages.

Relevance is binary and the definitions are those of trec_eval. A question without gold passages
gives 0.0 everywhere, as there; leave it out of a mean where the measure says nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from rlrag.errors import DataError


def recall_at_k(ranked_ids: Sequence[str], gold_ids: Collection[str], k: int) -> float:
    """Share of the gold passages that stand among the first k.

    Edges: fewer than k ranked passages count as they are; no gold passage gives 0.0.

    Raises:
        DataError: k is below 1 or a passage is ranked twice.

    Example:
        >>> recall_at_k(["p3", "p1", "p2"], {"p1", "p9"}, k=2)
        0.5
    """
    hits = _hits(ranked_ids, gold_ids, k)
    return sum(hits) / len(set(gold_ids)) if gold_ids else 0.0


def ndcg_at_k(ranked_ids: Sequence[str], gold_ids: Collection[str], k: int) -> float:
    """Normalised discounted cumulative gain of the first k (Järvelin and Kekäläinen 2002).

    DCG = sum over ranks r <= k of [passage r is gold] / log2(r + 1), divided by the DCG of an order
    that has all gold passages first.

    Edges: no gold passage gives 0.0; the ideal has min(k, number of gold passages) terms.

    Raises:
        DataError: k is below 1 or a passage is ranked twice.

    Example:
        One gold passage, found at rank 2: 1 / log2(3).

        >>> round(ndcg_at_k(["p3", "p1"], {"p1"}, k=2), 4)
        0.6309
    """
    hits = _hits(ranked_ids, gold_ids, k)
    ideal = _discounted([True] * min(k, len(set(gold_ids))))
    return _discounted(hits) / ideal if ideal else 0.0


def _hits(ranked_ids: Sequence[str], gold_ids: Collection[str], k: int) -> list[bool]:
    if k < 1:
        raise DataError(f"k is {k}; give at least 1")
    if len(set(ranked_ids)) < len(ranked_ids):
        twice = next(id_ for id_ in ranked_ids if ranked_ids.count(id_) > 1)
        raise DataError(f"passage {twice!r} is ranked more than once; rank each passage once")
    gold = set(gold_ids)
    return [passage_id in gold for passage_id in ranked_ids[:k]]


def _discounted(hits: Sequence[bool]) -> float:
    return sum(hit / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1))
