"""Gumbel top-k: draws distinct ordered selections and their inclusion probabilities.

Adding independent Gumbel(0, 1) noise to the log-probability of every selection and keeping the m
largest draws m selections without replacement (Gumbel top-k; Vieira, 2014). Stochastic beam search
finds the same m without listing all selections: it walks from the empty prefix down, gives each
prefix the largest perturbed log-probability of the selections below it, and keeps the m + 1 best
prefixes at each step (Kool et al., 2019, arXiv 1903.06059, Algorithm 1). The (m + 1)-th largest
perturbed log-probability, kappa, turns the draws into an unbiased estimate (Kool et al., 2019, the
section on BLEU score estimation; for gradients, Kool et al., 2020, arXiv 2002.06043):

    E_{z~p}[f(z)] = E[ sum_i p(z_i) / q_i(kappa) f(z_i) ],
    q_i(kappa) = P(log p_i + Gumbel > kappa) = 1 - exp(-exp(log p_i - kappa))

Departure from the paper: the noise of the root is drawn instead of fixed at 0. A fixed root gives
the same selections but conditions kappa on it, which makes the estimate biased.

Shape letters: P prefixes kept, T picks so far, N candidates, M samples, K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rlrag.errors import ConfigError
from rlrag.selection.protocol import Seed

NextPick = Callable[[np.ndarray], np.ndarray]
"""Prefixes (P, T) to log-probabilities of the next pick (P, N), -inf for what may not follow."""

_LOWEST = np.finfo(np.float64).min
_NEARLY_NONE = -30.0
"""Below this x, 1 - exp(-exp(x)) and exp(x) are equal in float64."""
_NEARLY_SURE = 40.0
"""Above this x, 1 - exp(-exp(x)) is 1 in float64; exp(x) itself would overflow from 710 on."""


class DistinctSelections(NamedTuple):
    """M selections of one question, no two alike, in falling order of perturbed log-probability.

    `positions_MK` index the candidates; `logp_M` is log p(z) in nats under the distribution that
    was drawn from; `log_inclusion_M` is log q(kappa). Where fewer than M selections exist all of
    them are given with q = 1, and the rest of the rows repeat the last one with a log inclusion of
    +inf: as a weight divides by q, they weigh nothing.
    """

    positions_MK: np.ndarray
    logp_M: np.ndarray
    log_inclusion_M: np.ndarray


def sample_distinct(
    next_pick: NextPick, num_samples: int, num_selected: int, seed: Seed
) -> DistinctSelections:
    """Draw M different selections of K picks; `seed` alone determines them.

    `next_pick` is called K times with at most M + 1 prefixes, from one empty prefix on.

    Raises:
        ConfigError: when no selection of K picks has a positive probability.

    Example:
        >>> even = lambda prefixes: np.log(np.full((len(prefixes), 2), 0.5))
        >>> drawn = sample_distinct(even, num_samples=3, num_selected=1, seed=0)
        >>> sorted(drawn.positions_MK[:2, 0].tolist()), drawn.log_inclusion_M.tolist()
        ([0, 1], [0.0, 0.0, inf])
    """
    rng = np.random.default_rng(seed)
    prefixes_PT = np.zeros((1, 0), dtype=np.int64)
    logp_P, perturbed_P = np.zeros(1), rng.gumbel(size=1)
    for _ in range(num_selected):
        logp_PN = logp_P[:, None] + next_pick(prefixes_PT)
        perturbed_PN = perturb_below(logp_PN, perturbed_P, rng.gumbel(size=logp_PN.shape))
        best = np.argsort(-perturbed_PN, axis=None, kind="stable")[: num_samples + 1]
        best = best[np.isfinite(perturbed_PN.flat[best])]
        rows, picks = np.unravel_index(best, perturbed_PN.shape)
        prefixes_PT = np.concatenate([prefixes_PT[rows], picks[:, None]], axis=1)
        logp_P, perturbed_P = logp_PN[rows, picks], perturbed_PN[rows, picks]
        if not len(best):
            raise ConfigError(
                f"no selection of {num_selected} different candidates has a positive "
                "probability; select fewer passages, or check the logits for infinite values"
            )
    threshold = perturbed_P[num_samples] if len(perturbed_P) > num_samples else -np.inf
    num_distinct = min(num_samples, len(logp_P))
    kept_M = np.minimum(np.arange(num_samples), num_distinct - 1)
    log_inclusion_M = log_inclusion(logp_P[kept_M], threshold)
    log_inclusion_M[num_distinct:] = np.inf
    return DistinctSelections(prefixes_PT[kept_M], logp_P[kept_M], log_inclusion_M)


def perturb_below(logp_PN: np.ndarray, maximum_P: np.ndarray, noise_PN: np.ndarray) -> np.ndarray:
    """Perturbed log-probabilities of the children of P prefixes, whose largest is `maximum_P`.

    With G = log p + noise and Z = max_n G_n, the value of child n given that the largest is t is

        -log(exp(-t) - exp(-Z) + exp(-G_n)) = t - max(0, v) - log(1 + exp(-|v|)),
        v = t - G_n + log(1 - exp(G_n - Z))

    (Kool et al., 2019, Algorithm 1 and the appendix on the numerical stability of truncated
    Gumbels; the right side neither overflows nor cancels). A child of probability 0 gets -inf.

    Example:
        >>> halves = np.log(np.array([[0.5, 0.5]]))
        >>> perturb_below(halves, np.array([2.0]), np.array([[1.0, 0.0]])).round(3).tolist()
        [[2.0, -0.336]]
    """
    noisy_PN = logp_PN + noise_PN
    largest_P1 = np.maximum(noisy_PN.max(axis=1, keepdims=True), _LOWEST)  # no child: not NaN
    gap_PN = noisy_PN - largest_P1
    with np.errstate(divide="ignore"):  # log 0 at the largest child, which then gets t itself
        log_rest_PN = np.where(
            gap_PN > -0.693, np.log(-np.expm1(gap_PN)), np.log1p(-np.exp(gap_PN))
        )
    v_PN = maximum_P[:, None] - noisy_PN + log_rest_PN
    return maximum_P[:, None] - np.maximum(0.0, v_PN) - np.log1p(np.exp(-np.abs(v_PN)))


def log_inclusion(logp_M: np.ndarray, threshold: float) -> np.ndarray:
    """Log q(kappa) = log(1 - exp(-exp(log p - kappa))), shape (M,), at most 0.

    A threshold of -inf (nothing was left out) gives 0. Far below the threshold it is
    log p - kappa, where the formula as written would round to log 0.

    Example:
        >>> log_inclusion(np.array([0.0, -800.0]), 0.0).round(4).tolist()
        [-0.4587, -800.0]
    """
    excess_M = np.minimum(logp_M - threshold, _NEARLY_SURE)
    moderate_M = np.maximum(excess_M, _NEARLY_NONE)
    return np.where(excess_M < _NEARLY_NONE, excess_M, np.log(-np.expm1(-np.exp(moderate_M))))
