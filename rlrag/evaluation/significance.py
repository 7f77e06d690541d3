"""Bootstrap confidence intervals, and the paired randomisation test with a matching interval.

Questions are the sampling unit. Shape letters: Q questions, B resamples, P sign patterns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlrag.errors import ConfigError, DataError

NUM_RESAMPLES = 10_000
"""Of an interval or a p-value: an end of a 95 % interval then varies by a percent of its width."""
MAX_ENUMERATED = 12
"""Up to this many non-zero differences all sign patterns (2 to this power) are enumerated."""

_CHUNK_ELEMENTS = 1 << 20
_RELATIVE_TOLERANCE = 1e-9


def bootstrap_ci(
    values: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron and Tibshirani 1993, section 13.3).

    The mean is computed for `num_resamples` samples of Q questions drawn with replacement; the
    interval runs from the (1 - confidence) / 2 quantile of these means to its mirror image.

    Edges: one question, or equal values, give an interval of width zero.

    Raises:
        DataError: no values, or one that is not finite.
        ConfigError: no resamples, or a confidence outside (0, 1).

    Example:
        Three of four questions right; the mean of a resample is at least 1/4 nearly always.

        >>> bootstrap_ci([1.0, 1.0, 1.0, 0.0], num_resamples=2000)
        (0.25, 1.0)
    """
    values_Q = _checked(values, "values")
    _check_resamples(num_resamples)
    _check_confidence(confidence)
    rng = np.random.default_rng(seed)
    num_questions = len(values_Q)
    means_B = np.concatenate(
        [
            values_Q[rng.integers(num_questions, size=(rows, num_questions))].mean(axis=1)
            for rows in _chunks(num_resamples, num_questions)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_B, [tail, 1 - tail])
    return float(low), float(high)


def paired_randomization_ci(
    ours: ArrayLike,
    theirs: ArrayLike,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Interval of mean(ours) - mean(theirs): all differences that the paired test does not reject.

    It holds 0 exactly where `paired_randomization_test` of the same arguments gives more than
    1 - confidence, so that interval and test never contradict each other. A difference delta is
    tested by the sign patterns of d_i - delta, with d_i the differences: a pattern that
    flips the set F is at least as extreme as the observed one exactly where delta lies between the
    means of d over F and over the rest (Hartigan's typical values, 1969), so that the bounds are
    quantiles of these means.

    Edges: equal differences give an interval of width zero. Where so few differ that the test could
    never reject 0, 5 at 95 %, the interval is no narrower than the bootstrap's, as the means of so
    few hardly vary; and of so few questions altogether, it reaches as far as the values lie apart.

    Raises:
        DataError: the arrays differ in length, are empty or hold a value that is not finite.
        ConfigError: no resamples, or a confidence outside (0, 1).

    Example:
        Four questions of 29 won and none lost: 2 of 16 patterns are as extreme, p = .125.

        >>> low, high = paired_randomization_ci([1] * 4 + [0] * 25, [0] * 29)
        >>> low, round(high, 2)
        (0.0, 0.28)
    """
    differences_Q = _differences(ours, theirs)
    _check_resamples(num_resamples)
    _check_confidence(confidence)
    num, total = len(differences_Q), float(differences_Q.sum())
    if not differences_Q.any():
        return 0.0, 0.0
    flips = _SignFlips.of(differences_Q, num_resamples, seed)
    # The zeros decide nothing about a difference of 0, and about others by how many are flipped.
    num_zeros = num - len(flips.nonzero)
    zeros_P = np.random.default_rng([seed, 1]).binomial(num_zeros, 0.5, len(flips.sums_P))
    size_P = flips.num_flipped_P + zeros_P
    inside_P = (total - flips.sums_P) / 2
    is_split_P = (size_P > 0) & (size_P < num)
    means_2P = np.stack(
        [
            inside_P[is_split_P] / size_P[is_split_P],
            (total - inside_P[is_split_P]) / (num - size_P[is_split_P]),
        ]
    )
    lows, highs = means_2P.min(axis=0), means_2P.max(axis=0)
    # Rounding must not decide whether 0 lies between the two.
    holds_zero = flips.is_extreme_P[is_split_P]
    lows = np.where(holds_zero, np.minimum(lows, 0), lows)
    highs = np.where(holds_zero, np.maximum(highs, 0), highs)
    num_whole = len(flips.sums_P) + flips.num_observed - len(lows)  # extreme whatever delta is
    num_allowed = int((1 - confidence) * (len(flips.sums_P) + flips.num_observed) + 1e-9)
    place = num_allowed - num_whole
    if place < 0:
        spread = float(np.ptp(np.concatenate([_checked(ours, "ours"), _checked(theirs, "theirs")])))
        return -spread, spread
    low, high = float(np.sort(lows)[place]), float(np.sort(highs)[-1 - place])
    if 2.0 ** (1 - len(flips.nonzero)) > 1 - confidence:
        least, most = bootstrap_ci(differences_Q, num_resamples, seed, confidence)
        return min(low, least), max(high, most)
    return low, high


def paired_randomization_test(
    ours: ArrayLike, theirs: ArrayLike, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> float:
    """Two-sided p-value of the paired randomisation test (Fisher; Smucker et al. 2007).

    Under the null hypothesis each question's difference is as likely to have the other sign. The
    p-value is the share of sign patterns whose absolute summed difference is at least the observed
    one: exactly, over all 2^d patterns, where d <= 12 differences are not zero, and otherwise
    (c + 1) / (B + 1) with c such patterns among B drawn ones, which is never 0.

    Edges: no difference at all gives 1.0.

    Raises:
        DataError: the arrays differ in length, are empty or hold a value that is not finite.
        ConfigError: no resamples.

    Example:
        Five differences of one sign: 2 of the 32 patterns are as extreme.

        >>> paired_randomization_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
        0.0625
    """
    differences_Q = _differences(ours, theirs)
    _check_resamples(num_resamples)
    if not differences_Q.any():
        return 1.0
    flips = _SignFlips.of(differences_Q, num_resamples, seed)
    num_extreme = int(flips.is_extreme_P.sum()) + flips.num_observed
    return num_extreme / (len(flips.sums_P) + flips.num_observed)


@dataclass(frozen=True)
class _SignFlips:
    """Sign patterns of the differences that are not zero; P patterns.

    `sums_P` are the summed differences under each, `num_flipped_P` how many signs it flips,
    `is_extreme_P` whether the sum is as far from 0 as the observed one. `num_observed` is 1 where
    the observed pattern is not among them and has to be counted beside them.
    """

    nonzero: np.ndarray
    sums_P: np.ndarray
    num_flipped_P: np.ndarray
    is_extreme_P: np.ndarray
    num_observed: int

    @classmethod
    def of(cls, differences_Q: np.ndarray, num_resamples: int, seed: int) -> _SignFlips:
        """All patterns where there are few, several times each; else as many as asked for."""
        nonzero = differences_Q[differences_Q != 0]
        if len(nonzero) <= MAX_ENUMERATED:
            patterns = np.arange(1 << len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
            # The interval flips the zeros too, which takes more than one draw.
            patterns = np.tile(patterns, (max(1, num_resamples // len(patterns)), 1))
            sums, flipped, num_observed = (1 - 2 * patterns) @ nonzero, patterns.sum(axis=1), 0
        else:
            rng = np.random.default_rng(seed)
            parts = []
            for rows in _chunks(num_resamples, len(nonzero)):
                drawn = rng.integers(2, size=(rows, len(nonzero)), dtype=np.int8)
                parts.append(((1 - 2 * drawn) @ nonzero, drawn.sum(axis=1, dtype=np.int64)))
            sums, flipped = (np.concatenate(part) for part in zip(*parts, strict=True))
            num_observed = 1
        # Sums of equal terms in another order differ in their last bits and still are ties.
        threshold = abs(nonzero.sum()) - _RELATIVE_TOLERANCE * np.abs(nonzero).sum()
        return cls(nonzero, sums, flipped, np.abs(sums) >= threshold, num_observed)


def holm_correction(p_values: ArrayLike) -> np.ndarray:
    """P-values corrected for their number, in the order given (Holm 1979).

    The i-th smallest of n is multiplied by n - i + 1, then each is at least as large as those of
    smaller p-values, and at most 1. Whoever calls all below 0.05 real is wrong about any of them
    with a probability of at most 0.05, however the tests depend on each other.

    Raises:
        DataError: the values are empty, not finite or outside [0, 1].

    Example:
        >>> holm_correction([0.5, 0.125]).tolist()
        [0.5, 0.25]
    """
    values_T = _checked(p_values, "p_values")
    if values_T.min() < 0 or values_T.max() > 1:
        raise DataError(
            f"p_values range from {values_T.min()} to {values_T.max()}; give values from 0 to 1"
        )
    rising_T = np.argsort(values_T, kind="stable")
    factors_T = np.arange(len(values_T), 0, -1)
    corrected_T = np.empty_like(values_T)
    corrected_T[rising_T] = np.minimum(np.maximum.accumulate(values_T[rising_T] * factors_T), 1)
    return corrected_T


def _checked(values: ArrayLike, name: str) -> np.ndarray:
    values_Q = np.asarray(values, dtype=np.float64)
    if values_Q.ndim != 1 or not len(values_Q):
        raise DataError(f"{name} has shape {values_Q.shape}; give one value for each question")
    bad = np.flatnonzero(~np.isfinite(values_Q))
    if len(bad):
        raise DataError(
            f"{name}[{bad[0]}] is {values_Q[bad[0]]} ({len(bad)} of {len(values_Q)} are not "
            "finite); leave questions without a value out"
        )
    return values_Q


def _differences(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    ours_Q, theirs_Q = _checked(ours, "ours"), _checked(theirs, "theirs")
    if len(ours_Q) != len(theirs_Q):
        raise DataError(
            f"{len(ours_Q)} values against {len(theirs_Q)}; a paired comparison needs the same "
            "questions in the same order"
        )
    return ours_Q - theirs_Q


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; give a share between 0 and 1")


def _check_resamples(num_resamples: int) -> None:
    if num_resamples < 1:
        raise ConfigError(f"num_resamples is {num_resamples}; give at least 1")


def _chunks(num_rows: int, row_length: int) -> Iterator[int]:
    """Numbers of rows that keep an array of so long rows within some twenty megabytes."""
    step = max(1, _CHUNK_ELEMENTS // row_length)
    for start in range(0, num_rows, step):
        yield min(step, num_rows - start)
