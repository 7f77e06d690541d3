"""Drawing samples by weight changes no mean: shown by enumerating every draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlrag.algorithms.resampling import resample, systematic_counts


@pytest.mark.parametrize("num", [1, 2, 3, 7])
@pytest.mark.parametrize("weights", [(1, 4, 0, 15), (20, 0, 0, 0), (5, 5, 5, 5), (19, 0, 0, 1)])
def test_the_mean_count_is_the_weight(weights, num):
    """Weights in twentieths: counts are constant for offsets within each twentieth of [0, 1).

    A point (offset + j) / num meets an edge k / 20 at offset = num k / 20 - j, a twentieth, so the
    mean over the middles of the twentieths is the integral.
    """
    weights_M = np.array(weights) / 20
    counts = [systematic_counts(weights_M, num, (cell + 0.5) / 20) for cell in range(20)]
    assert np.mean(counts, axis=0) / num == pytest.approx(weights_M, abs=1e-12)
    assert all(count.sum() == num for count in counts)


def test_the_mean_loss_and_gradient_stay_the_same():
    """E[sum_i W count_i / num * grad_i] = sum_i w_i grad_i, for raw weights as well (W = 0.4)."""
    weights_M, gradients_MD = np.array([0.3, 0.1]), np.array([[1.0, -2.0], [5.0, 3.0]])
    drawn = [systematic_counts(weights_M, 1, (cell + 0.5) / 20) * 0.4 for cell in range(20)]
    assert np.mean([w @ gradients_MD for w in drawn], axis=0) == pytest.approx(
        weights_M @ gradients_MD
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 9), st.floats(0, 0.999999))
def test_counts_are_within_one_of_their_mean(weights, num, offset):
    weights_M = np.array(weights)
    if weights_M.sum() < 1e-6:
        return
    counts_M = systematic_counts(weights_M, num, offset)
    assert counts_M.sum() == num
    assert np.abs(counts_M - num * weights_M / weights_M.sum()).max() < 1 + 1e-6
    assert (counts_M[weights_M == 0] == 0).all()


def test_each_question_draws_from_its_own_seed():
    weights_BM = torch.softmax(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), 1)
    seeds = [[7, place] for place in range(6)]
    together = resample(weights_BM, 3, seeds)
    alone = [resample(weights_BM[i : i + 1], 3, seeds[i : i + 1])[0] for i in range(6)]
    assert torch.equal(together, torch.stack(alone))
    assert together.dtype == torch.int64
    assert together.sum(dim=1).tolist() == [3] * 6
    others = [resample(weights_BM, 3, [[8 + run, p] for p in range(6)]) for run in range(4)]
    assert any(not torch.equal(together, other) for other in others)


def test_a_question_without_weight_draws_nothing():
    weights_BM = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert resample(weights_BM, 2, [0, 1]).tolist() == [[0, 0], [0, 2]]
