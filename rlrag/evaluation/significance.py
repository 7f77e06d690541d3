"""Per-question values in, bootstrap confidence intervals and the p-value of a paired test out.

Questions are the sampling unit. Shape letters: Q questions, B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from rlrag.errors import ConfigError, DataError

MAX_ENUMERATED = 12
"""Up to this many non-zero differences all sign patterns (2 to this power) are enumerated."""

_CHUNK_ELEMENTS = 1 << 20
_RELATIVE_TOLERANCE = 1e-9


def bootstrap_ci(
    values: ArrayLike, num_resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
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
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}; give a share between 0 and 1")
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


def paired_bootstrap_ci(
    ours: ArrayLike,
    theirs: ArrayLike,
    num_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(ours) - mean(theirs) on the same questions.

    A question is drawn with both its values, so the interval is that of the mean difference.

    Raises:
        DataError: the arrays differ in length, are empty or hold a value that is not finite.
        ConfigError: no resamples, or a confidence outside (0, 1).

    Example:
        >>> paired_bootstrap_ci([0.5, 0.75], [0.25, 0.5])
        (0.25, 0.25)
    """
    return bootstrap_ci(_differences(ours, theirs), num_resamples, seed, confidence)


def paired_randomization_test(
    ours: ArrayLike, theirs: ArrayLike, num_resamples: int = 10_000, seed: int = 0
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
    nonzero = differences_Q[differences_Q != 0]
    if not len(nonzero):
        return 1.0
    # Sums of equal terms in another order differ in their last bits and still are ties.
    threshold = abs(nonzero.sum()) - _RELATIVE_TOLERANCE * np.abs(nonzero).sum()
    if len(nonzero) <= MAX_ENUMERATED:
        patterns = np.arange(1 << len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ nonzero) >= threshold))
    rng = np.random.default_rng(seed)
    num_extreme = 0
    for rows in _chunks(num_resamples, len(nonzero)):
        signs = 1 - 2 * rng.integers(2, size=(rows, len(nonzero)), dtype=np.int8)
        num_extreme += int(np.count_nonzero(np.abs(signs @ nonzero) >= threshold))
    return (num_extreme + 1) / (num_resamples + 1)


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
        raise DataError(f"p_values reach from {values_T.min()} to {values_T.max()}; give 0 to 1")
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


def _check_resamples(num_resamples: int) -> None:
    if num_resamples < 1:
        raise ConfigError(f"num_resamples is {num_resamples}; draw at least 1")


def _chunks(num_rows: int, row_length: int) -> Iterator[int]:
    """Numbers of rows that keep an array of so long rows within some twenty megabytes."""
    step = max(1, _CHUNK_ELEMENTS // row_length)
    for start in range(0, num_rows, step):
        yield min(step, num_rows - start)
