"""Brier score, reliability table and expected calibration error.

Shape letters: Q questions, M bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rlrag.errors import ConfigError, DataError

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """The questions whose probability lies in (low, high], and the share that came true."""

    low: float
    high: float
    num_questions: int
    mean_probability: float
    share: float


def brier(probabilities: ArrayLike, outcomes: ArrayLike) -> np.ndarray:
    """Squared error of each probability (Brier 1950, for two outcomes); its mean is the score.

    0 is best; a constant 1/2 gives 1/4.

    Raises:
        DataError: as `reliability`.

    Example:
        >>> brier([1.0, 0.5, 0.75], [1, 0, 0]).tolist()
        [0.0, 0.25, 0.5625]
    """
    probabilities_Q, outcomes_Q = _checked(probabilities, outcomes)
    return np.square(probabilities_Q - outcomes_Q)


def reliability(
    probabilities: ArrayLike, outcomes: ArrayLike, num_bins: int = NUM_BINS
) -> list[Bin]:
    """The reliability table: M equally wide bins of probability, without the empty ones.

    Bin m holds the probabilities in ((m - 1) / M, m / M] (Guo et al., ICML 2017, arXiv 1706.04599,
    section 2); 0 falls into the first.

    Raises:
        DataError: the arrays differ in shape, are empty, or hold a probability outside [0, 1] or an
            outcome that is neither 0 nor 1.
        ConfigError: fewer than one bin.

    Example:
        >>> rows = reliability([0.25, 0.5, 1.0], [0, 1, 1], num_bins=2)
        >>> [(row.low, row.high, row.num_questions) for row in rows]
        [(0.0, 0.5, 2), (0.5, 1.0, 1)]
        >>> [(row.mean_probability, row.share) for row in rows]
        [(0.375, 0.5), (1.0, 1.0)]
    """
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}; give at least 1")
    probabilities_Q, outcomes_Q = _checked(probabilities, outcomes)
    edges = np.arange(num_bins + 1) / num_bins
    places_Q = np.maximum(np.searchsorted(edges, probabilities_Q, side="left") - 1, 0)
    return [
        Bin(
            low=float(edges[place]),
            high=float(edges[place + 1]),
            num_questions=int(np.count_nonzero(places_Q == place)),
            mean_probability=float(probabilities_Q[places_Q == place].mean()),
            share=float(outcomes_Q[places_Q == place].mean()),
        )
        for place in np.unique(places_Q).tolist()
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE = sum over bins m of n_m / n * |share_m - mean probability_m| (Guo et al. 2017, Eq. 3).

    0 is best. It depends on the bins: fewer of them hide more, and with few questions noise alone
    keeps it above 0.

    Edges: no bins give 0.0.

    Example:
        Two of three questions lie in a bin whose gap is 0.5 - 0.375.

        >>> round(expected_calibration_error(reliability([0.25, 0.5, 1.0], [0, 1, 1], 2)), 4)
        0.0833
    """
    num_questions = sum(row.num_questions for row in bins)
    gaps = (row.num_questions * abs(row.share - row.mean_probability) for row in bins)
    return sum(gaps) / max(1, num_questions)


def _checked(probabilities: ArrayLike, outcomes: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    probabilities_Q = np.asarray(probabilities, dtype=float)
    outcomes_Q = np.asarray(outcomes, dtype=float)
    if probabilities_Q.shape != outcomes_Q.shape or probabilities_Q.ndim != 1:
        raise DataError(
            f"probabilities have shape {probabilities_Q.shape}, outcomes {outcomes_Q.shape}; "
            "give one probability and one outcome per question"
        )
    if not len(probabilities_Q):
        raise DataError("there are no probabilities; give at least one question")
    strange = probabilities_Q[~((probabilities_Q >= 0) & (probabilities_Q <= 1))]
    if len(strange):
        raise DataError(f"a probability is {strange[0]}; it must be between 0 and 1")
    strange = outcomes_Q[(outcomes_Q != 0) & (outcomes_Q != 1)]
    if len(strange):
        raise DataError(f"an outcome is {strange[0]}; it must be 1 (true) or 0 (false)")
    return probabilities_Q, outcomes_Q
