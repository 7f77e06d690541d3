"""Resamples each question's samples in proportion to their weights.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def resample(
    weights_BM: torch.Tensor, num: int, seeds: Sequence[int | Sequence[int]]
) -> torch.Tensor:
    """Draw `num` samples of each question with probabilities in proportion to their weights.

    Returns how often each was drawn, int64 of shape (B, M). Where W is the sum of a question's
    weights w (1 when they are normalised), E[W * count_i / num] = w_i: training on the drawn
    samples with weight W * count / num has the same mean loss and gradient as training on all of
    them with w. Each question draws from its own seed, so a batch changes nothing.

    Weights are finite and not negative. A question whose weights are all 0 draws nothing; a sample
    of weight 0 is never drawn.

    Example:
        >>> resample(torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]), 4, seeds=[0, 1])
        tensor([[2, 0, 2],
                [0, 0, 0]])
    """
    counts_BM = np.zeros(tuple(weights_BM.shape), dtype=np.int64)
    for row, seed in enumerate(seeds):
        weights_M = weights_BM[row].double().cpu().numpy()
        if weights_M.sum() > 0:
            counts_BM[row] = systematic_counts(weights_M, num, np.random.default_rng(seed).random())
    return torch.from_numpy(counts_BM)


def systematic_counts(weights_M: np.ndarray, num: int, offset: float) -> np.ndarray:
    """Systematic resampling: `num` evenly spaced points on the stacked weights, moved by `offset`.

    With an offset that is uniform in [0, 1) the mean of count_i is num * w_i / sum(w), as for
    independent draws, yet count_i is never further than 1 from it: less variance at the same price.

    Example:
        >>> systematic_counts(np.array([0.7, 0.3]), 2, offset=0.0).tolist()
        [2, 0]
        >>> systematic_counts(np.array([0.7, 0.3]), 2, offset=0.5).tolist()
        [1, 1]
    """
    edges_M = weights_M.cumsum()
    points = (offset + np.arange(num)) / num
    drawn = np.searchsorted(edges_M / edges_M[-1], points, side="right")
    return np.bincount(drawn, minlength=len(weights_M))
