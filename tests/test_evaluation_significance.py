"""Intervals and p-values against scipy, enumeration, closed forms and edges."""

from __future__ import annotations

import itertools
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlrag.errors import ConfigError, DataError
from rlrag.evaluation import significance
from rlrag.evaluation.significance import (
    bootstrap_ci,
    holm_correction,
    paired_randomization_ci,
    paired_randomization_test,
)


def random_metrics(seed: int, num_questions: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    theirs = (rng.random(num_questions) < 0.3).astype(float)
    ours = np.where(rng.random(num_questions) < 0.2, rng.random(num_questions), theirs)
    return ours, theirs


def test_interval_of_a_share_is_the_binomial_one() -> None:
    # The bootstrap sum of 60 ones and 140 zeros is Binomial(200, .3).
    values = np.array([1.0] * 60 + [0.0] * 140)
    expected = stats.binom.ppf([0.025, 0.975], 200, 0.3) / 200
    assert bootstrap_ci(values, num_resamples=40_000) == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_agrees_with_scipy(confidence: float) -> None:
    ours, theirs = random_metrics(1)
    expected = stats.bootstrap(
        (ours,),
        np.mean,
        n_resamples=20_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert bootstrap_ci(ours, 20_000, 0, confidence) == pytest.approx(tuple(expected), abs=2e-3)
    paired = stats.bootstrap(
        (ours, theirs),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        n_resamples=20_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = paired_randomization_ci(ours, theirs, 20_000, 0, confidence)
    # Another construction: with 200 questions it ends at nearly the same places.
    assert found == pytest.approx(tuple(paired), abs=6e-3)


@pytest.mark.parametrize(
    ("won", "lost", "num_same"), [(4, 0, 25), (5, 0, 95), (6, 0, 94), (7, 1, 92), (9, 1, 90)]
)
def test_interval_and_test_say_the_same_of_wins_and_losses(won, lost, num_same) -> None:
    """Four wins of 29 without a loss: p is 2 / 2^4, and the interval must not exclude 0."""
    ours, theirs = (
        np.array([a] * won + [b] * lost + [1.0] * num_same) for a, b in ((1, 0), (0, 1))
    )
    p_value = stats.binomtest(won, won + lost).pvalue
    low, high = paired_randomization_ci(ours, theirs)
    assert (low <= 0 <= high) == (p_value > 0.05)
    assert low <= (won - lost) / len(ours) <= high
    low, high = paired_randomization_ci(theirs, ours)
    assert (low <= 0 <= high) == (p_value > 0.05)


@given(st.lists(st.sampled_from([-1.0, -0.4, 0.0, 0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=30))
def test_interval_and_test_never_contradict_each_other(differences: list[float]) -> None:
    zeros = np.zeros(len(differences))
    for confidence in (0.8, 0.95):
        low, high = paired_randomization_ci(differences, zeros, 400, 3, confidence)
        p_value = paired_randomization_test(differences, zeros, 400, 3)
        assert (low <= 0 <= high) == (p_value > 1 - confidence + 1e-12)
        assert low - 1e-9 <= np.mean(differences) <= high + 1e-9


def test_the_interval_holds_what_the_test_of_shifted_values_does_not_reject() -> None:
    """By enumeration: eight differences, each candidate difference tested by itself."""
    differences = np.array([0.9, 0.4, -0.2, 0.7, 0.1, 0.35, -0.05, 0.6])
    low, high = paired_randomization_ci(differences, np.zeros(8))
    for shift in np.linspace(-0.5, 1.5, 401):
        kept = paired_randomization_test(differences - shift, np.zeros(8)) > 0.05
        if min(abs(shift - low), abs(shift - high)) > 0.005:
            assert (low <= shift <= high) == kept, shift


@pytest.mark.parametrize(
    ("num_questions", "won", "lost"), [(29, 0.15, 0.0), (60, 0.05, 0.0), (60, 0.15, 0.05)]
)
def test_the_paired_interval_covers_the_true_difference(num_questions, won, lost) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for seed in range(300):
        drawn = rng.random(num_questions)
        low, high = paired_randomization_ci(drawn < won, drawn > 1 - lost, 400, seed)
        covered += low <= won - lost <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_pairing_narrows_the_interval_where_the_values_go_together() -> None:
    theirs = np.random.default_rng(0).random(100)
    low, high = paired_randomization_ci(theirs + 0.1, theirs)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)


def test_chunks_cover_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = random_metrics(2, num_questions=50)
    whole = bootstrap_ci(ours, 1000), paired_randomization_test(ours, theirs, 1000)
    monkeypatch.setattr(significance, "_CHUNK_ELEMENTS", 64)
    assert sum(significance._chunks(1000, 50)) == 1000
    low, high = bootstrap_ci(ours, 1000)
    assert (low, high) == pytest.approx(whole[0], abs=0.03)
    assert paired_randomization_test(ours, theirs, 1000) == pytest.approx(whole[1], abs=0.06)


def test_one_seed_repeats_and_two_differ() -> None:
    ours, theirs = random_metrics(3)
    assert bootstrap_ci(ours, 500, seed=1) == bootstrap_ci(ours, 500, seed=1)
    assert bootstrap_ci(ours, 500, seed=1) != bootstrap_ci(ours, 500, seed=2)
    first = paired_randomization_test(ours, theirs, 500, seed=1)
    assert first == paired_randomization_test(ours, theirs, 500, seed=1)
    assert len({paired_randomization_test(ours, theirs, 500, seed=s) for s in range(5)}) > 1


def test_an_interval_without_spread_has_no_width() -> None:
    assert bootstrap_ci([0.25]) == (0.25, 0.25)
    assert bootstrap_ci([0.5, 0.5, 0.5]) == (0.5, 0.5)


@given(st.lists(st.sampled_from([-1.0, -0.4, 0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=8))
def test_few_differences_are_enumerated_exactly(differences: list[float]) -> None:
    signs = itertools.product([1, -1], repeat=len(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(p, differences, strict=True))) for p in signs]
    expected = sum(value >= sums[0] - 1e-9 for value in sums) / len(sums)
    zeros = [0.0] * len(differences)
    assert paired_randomization_test(differences, zeros) == pytest.approx(expected)


def test_enumeration_agrees_with_scipy() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = rng.random(11), rng.random(11)
    exact = stats.permutation_test(
        (ours, theirs), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_randomization_test(ours, theirs) == pytest.approx(exact.pvalue)


@pytest.mark.parametrize(("num_won", "num_lost"), [(15, 5), (9, 4), (30, 28), (20, 0)])
def test_wins_and_losses_give_the_sign_test(num_won: int, num_lost: int) -> None:
    ours = np.array([1.0] * num_won + [0.0] * num_lost + [1.0] * 50)
    theirs = np.array([0.0] * num_won + [1.0] * num_lost + [1.0] * 50)
    exact = stats.binomtest(num_won, num_won + num_lost).pvalue
    found = paired_randomization_test(ours, theirs, num_resamples=40_000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-4)


def test_a_drawn_p_value_is_never_zero() -> None:
    ours = np.ones(60)
    assert paired_randomization_test(ours, np.zeros(60), num_resamples=999) == 1 / 1000


def test_both_directions_and_no_difference() -> None:
    ours, theirs = random_metrics(6)
    for a, b in ((ours, theirs), (ours[:10], theirs[:10])):
        assert paired_randomization_test(a, b) == paired_randomization_test(b, a)
    assert paired_randomization_test(ours, ours) == 1.0
    assert paired_randomization_ci(ours, ours) == (0.0, 0.0)


def test_sums_that_differ_by_rounding_alone_are_ties() -> None:
    # .1 + .2 - .3 is 5.6e-17 in floats and 0 on paper, where every pattern is as extreme.
    assert paired_randomization_test([0.1, 0.2, 0.0], [0.0, 0.0, 0.3]) == 1.0
    # .1 + .2 + .3 in another order loses its last bit and still is the other extreme.
    assert paired_randomization_test([0.3, 0.2, 0.1], [0.0, 0.0, 0.0]) == 0.25


def test_rounding_does_not_move_an_interval_off_zero() -> None:
    """Without the 0 all five go one way: p is 2 / 2^5. The flipped five sum to 2e-16 less."""
    differences = [0.4, 0.3, 0.4, 0.0, 0.3, 0.4]
    assert paired_randomization_test(differences, [0.0] * 6) == 0.0625
    assert paired_randomization_ci(differences, [0.0] * 6, 200)[0] == 0.0


def test_p_values_under_the_null_are_spread_evenly() -> None:
    rng = np.random.default_rng(7)
    p_values = [
        paired_randomization_test(rng.random(40), rng.random(40), 400, seed) for seed in range(300)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_correction_is_closed_testing_with_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected if every set of hypotheses that holds it is (Marcus et al. 1976)."""
    places = range(len(p_values))
    sets = [s for size in places for s in combinations(places, size + 1)]
    expected = [
        max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if place in s)
        for place in places
    ]
    assert holm_correction(p_values).tolist() == pytest.approx(expected, abs=1e-12)


def test_bad_values_are_refused() -> None:
    for p_values in ([], [0.5, 1.5], [-0.1], [float("nan")]):
        with pytest.raises(DataError, match="p_values"):
            holm_correction(p_values)
    with pytest.raises(DataError, match=r"values\[1\] is nan \(2 of 3"):
        bootstrap_ci([0.0, math.nan, math.inf])
    with pytest.raises(DataError, match="shape"):
        bootstrap_ci([])
    with pytest.raises(DataError, match="shape"):
        bootstrap_ci([[1.0, 2.0]])
    for paired in (paired_randomization_ci, paired_randomization_test):
        with pytest.raises(DataError, match="2 values against 3"):
            paired([1.0, 2.0], [1.0, 2.0, 3.0])
        with pytest.raises(DataError, match=r"theirs\[0\] is nan"):
            paired([1.0], [math.nan])
        with pytest.raises(ConfigError, match="num_resamples is 0"):
            paired([1.0], [2.0], 0)
    with pytest.raises(ConfigError, match="confidence is 95"):
        bootstrap_ci([1.0], confidence=95)
