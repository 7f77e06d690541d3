"""Draws without replacement against brute force, enumeration and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlrag.errors import ConfigError
from rlrag.selection.gumbel_top_k import log_inclusion, perturb_below, sample_distinct
from rlrag.selection.plackett_luce import next_action

LOGITS_N = np.random.default_rng(0).normal(size=4)
SELECTIONS = list(itertools.permutations(range(4), 2))
NUM_REPEATS = 5_000


def next_pick_of(logits_N: np.ndarray):
    """What follows given picks where all picks share their logits."""
    return next_action(logits_N[None], may_stop=False)


def probability(selection: tuple[int, ...]) -> float:
    """p(z) from the definition, one pick after another."""
    left, product = list(range(len(LOGITS_N))), 1.0
    for pick in selection:
        product *= math.exp(LOGITS_N[pick]) / sum(math.exp(LOGITS_N[j]) for j in left)
        left.remove(pick)
    return product


PROBABILITY_Z = np.array([probability(selection) for selection in SELECTIONS])
VALUE_Z = np.random.default_rng(1).uniform(-1, 1, size=len(SELECTIONS))


def which(positions_MK: np.ndarray) -> list[int]:
    return [SELECTIONS.index(tuple(row)) for row in positions_MK.tolist()]


def draws(num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices into SELECTIONS and sample weights of many draws, each of shape (R, M)."""
    drawn = [
        sample_distinct(next_pick_of(LOGITS_N), num_samples, 2, [num_samples, seed])
        for seed in range(NUM_REPEATS)
    ]
    indices_RM = np.array([which(d.positions_MK) for d in drawn])
    return indices_RM, np.exp([d.logp_M - d.log_inclusion_M for d in drawn])


def brute_force(num_samples: int) -> np.ndarray:
    """The same draws by perturbing the log-probability of every selection, shape (R, M)."""
    noise_RZ = np.random.default_rng(5).gumbel(size=(100_000, len(SELECTIONS)))
    return np.argsort(-(np.log(PROBABILITY_Z) + noise_RZ), axis=1)[:, :num_samples]


@pytest.mark.parametrize("num_samples", [1, 3, 8])
def test_draws_follow_brute_force_and_their_weights_are_unbiased(num_samples):
    indices_RM, weights_RM = draws(num_samples)
    assert all(len(set(row)) == num_samples for row in indices_RM.tolist())
    expected_RM = brute_force(num_samples)
    for column in {0, num_samples - 1}:  # the order of the draws, not only their set
        share_Z = np.bincount(indices_RM[:, column], minlength=12) / NUM_REPEATS
        expected_Z = np.bincount(expected_RM[:, column], minlength=12) / len(expected_RM)
        error_Z = np.sqrt(expected_Z * (1 - expected_Z) * (1 / NUM_REPEATS + 1 / len(expected_RM)))
        assert np.all(np.abs(share_Z - expected_Z) <= 4 * error_Z)
    share_Z = np.bincount(indices_RM.ravel(), minlength=12) / NUM_REPEATS
    expected_Z = np.bincount(expected_RM.ravel(), minlength=12) / len(expected_RM)
    error_Z = np.sqrt(expected_Z * (1 - expected_Z) * (1 / NUM_REPEATS + 1 / len(expected_RM)))
    assert np.all(np.abs(share_Z - expected_Z) <= 4 * error_Z)
    for value_Z in (VALUE_Z, np.ones(12), *np.eye(12)):
        estimate_R = (weights_RM * value_Z[indices_RM]).sum(axis=1)
        error = estimate_R.std() / math.sqrt(NUM_REPEATS)
        assert abs(estimate_R.mean() - PROBABILITY_Z @ value_Z) < 4 * error


def test_the_first_draw_follows_the_distribution():
    first_R = draws(1)[0][:, 0]
    share_Z = np.bincount(first_R, minlength=12) / NUM_REPEATS
    error_Z = np.sqrt(PROBABILITY_Z * (1 - PROBABILITY_Z) / NUM_REPEATS)
    assert np.all(np.abs(share_Z - PROBABILITY_Z) < 4 * error_Z)


@pytest.mark.parametrize("num_samples", [12, 15])
def test_where_all_selections_fit_each_weighs_its_probability_and_the_rest_nothing(num_samples):
    drawn = sample_distinct(next_pick_of(LOGITS_N), num_samples, 2, seed=0)
    assert drawn.positions_MK.shape == (num_samples, 2)
    indices = which(drawn.positions_MK)
    assert sorted(indices[:12]) == list(range(12))
    weights = np.exp(drawn.logp_M - drawn.log_inclusion_M)
    assert weights[:12] == pytest.approx(PROBABILITY_Z[indices[:12]], rel=1e-12)
    assert weights[12:].tolist() == [0.0] * (num_samples - 12)
    assert set(indices[12:]) <= {indices[11]}


def test_eleven_of_twelve_leave_one_out():
    drawn = sample_distinct(next_pick_of(LOGITS_N), 11, 2, seed=0)
    assert len(set(which(drawn.positions_MK))) == 11
    assert np.all(drawn.log_inclusion_M < 0)


def test_one_seed_repeats_and_two_differ():
    first, again, other = (
        sample_distinct(next_pick_of(LOGITS_N), 4, 2, seed) for seed in ([7, 1], [7, 1], [7, 2])
    )
    assert np.array_equal(first.positions_MK, again.positions_MK)
    assert np.array_equal(first.log_inclusion_M, again.log_inclusion_M)
    assert not np.array_equal(first.log_inclusion_M, other.log_inclusion_M)


def test_logits_far_apart_neither_overflow_nor_repeat():
    steep_N = np.array([0.0, -900.0, -1800.0, -2700.0])
    drawn = sample_distinct(next_pick_of(steep_N), 6, 2, seed=3)
    assert drawn.positions_MK[0].tolist() == [0, 1], "the only one of noticeable probability"
    assert len(set(which(drawn.positions_MK))) == 6
    assert np.all(np.isfinite(drawn.logp_M))
    weights = drawn.logp_M - drawn.log_inclusion_M
    assert np.all(np.isfinite(weights))
    assert weights[0] == pytest.approx(0.0, abs=1e-12)


def test_selections_of_probability_zero_are_never_drawn():
    drawn = sample_distinct(next_pick_of(np.array([0.0, 0.0, -np.inf])), 3, 2, seed=0)
    assert sorted(drawn.positions_MK[:2].tolist()) == [[0, 1], [1, 0]]
    assert drawn.log_inclusion_M.tolist() == [0.0, 0.0, math.inf]
    with pytest.raises(ConfigError, match="no selection of 3 different candidates"):
        sample_distinct(next_pick_of(np.zeros(2)), 1, 3, seed=0)
    nothing = sample_distinct(next_pick_of(np.zeros(2)), 2, 0, seed=0)
    assert nothing.positions_MK.shape == (2, 0)
    assert nothing.log_inclusion_M.tolist() == [0.0, math.inf]


def test_next_picks_are_those_left_in_proportion():
    logp_PN = next_pick_of(np.log([4.0, 2.0, 1.0]))(np.array([[0], [2]]))
    assert np.exp(logp_PN) == pytest.approx(np.array([[0, 2 / 3, 1 / 3], [2 / 3, 1 / 3, 0]]))


def test_children_keep_their_parents_maximum_and_the_formula_as_written():
    rng = np.random.default_rng(2)
    logp_PN = np.log(rng.dirichlet(np.ones(5), size=6))
    maximum_P, noise_PN = rng.normal(size=6), rng.gumbel(size=(6, 5))
    found_PN = perturb_below(logp_PN, maximum_P, noise_PN)
    noisy_PN = logp_PN + noise_PN
    largest_P1 = noisy_PN.max(axis=1, keepdims=True)
    written_PN = -np.log(np.exp(-maximum_P[:, None]) - np.exp(-largest_P1) + np.exp(-noisy_PN))
    assert found_PN == pytest.approx(written_PN, abs=1e-9)
    assert found_PN.max(axis=1).tolist() == maximum_P.tolist()
    shut = perturb_below(np.array([[-0.7, -np.inf]]), np.zeros(1), np.zeros((1, 2)))
    assert shut.tolist() == [[0.0, -math.inf]]


def test_inclusion_is_the_chance_that_a_perturbed_log_probability_exceeds_the_threshold():
    noise = np.random.default_rng(0).gumbel(size=200_000)
    for logp, threshold in ((-1.0, 0.5), (-3.0, -4.0)):
        share = np.mean(logp + noise > threshold)
        assert np.exp(log_inclusion(np.array([logp]), threshold)) == pytest.approx(share, abs=0.005)
    found = log_inclusion(np.array([-0.5, -29.999, -30.001, -50.0, 900.0]), 0.0)
    assert found[1:4] == pytest.approx([-29.999, -30.001, -50.0], rel=1e-12)
    assert found[4] == 0.0
    assert log_inclusion(np.array([-5.0]), -np.inf).tolist() == [0.0]
