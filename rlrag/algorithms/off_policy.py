"""Selections that one policy drew, with their rewards, in; what another policy is worth out.

A service logs a question x, the selection z, the probability mu(z | x) with which it was drawn
(its propensity) and the reward r of the answer. The value of another policy p on the same
questions, V(p) = E_x E_{z~p}[r(x, z)], follows without a new answer from the importance ratios

    w = p(z | x) / mu(z | x)

(inverse propensity scoring; Horvitz and Thompson 1952, for policies Dudik et al. 2011, arXiv
1103.4601). mu may differ from one selection to the next, as when several versions served. What is
needed is that mu(z | x) > 0 wherever p(z | x) > 0: what selections are worth that could never be
drawn is not in the log.

Log-probabilities are in nats; values and intervals in units of the reward.

Shape letters: Q logged selections, B those of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy.special import stdtrit

_MAX_LOG_RATIO = 300.0
"""e^300 is beyond any estimate that means something, and its square is finite in float64."""


@dataclass(frozen=True)
class Estimate:
    """A policy's value with the ends of its confidence interval, in units of the reward."""

    value: float
    low: float
    high: float


def importance_ratios(target_logp_Q: torch.Tensor, behaviour_logp_Q: torch.Tensor) -> torch.Tensor:
    """Ratios w = p(z | x) / mu(z | x) = exp(log p - log mu), float64 of shape (Q,).

    Edges: a selection that the target policy never makes (-inf) has ratio 0; the same policy gives
    1; a ratio above e^300 is e^300. The propensity must be that of something that was drawn, hence
    finite.

    Example:
        >>> target, behaviour = torch.tensor([0.5, 0.0]).log(), torch.tensor([0.25, 0.5]).log()
        >>> [round(ratio, 6) for ratio in importance_ratios(target, behaviour).tolist()]
        [2.0, 0.0]
    """
    log_ratio_Q = target_logp_Q.detach().double() - behaviour_logp_Q.double()
    return log_ratio_Q.clamp(max=_MAX_LOG_RATIO).exp()


def effective_sample_size(ratios_Q: torch.Tensor) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965): how many unweighted selections the weighted ones are worth.

    Between 1 and Q. Edges: equal ratios give Q, one that dominates gives 1, no overlap (all ratios
    0, or no selections) gives 0.

    Example:
        >>> effective_sample_size(torch.tensor([3.0, 1.0, 0.0]))
        1.6
    """
    ratios_Q = ratios_Q.double()
    square = ratios_Q.square().sum().item()
    return ratios_Q.sum().item() ** 2 / square if square else 0.0


def ips(ratios_Q: torch.Tensor, rewards_Q: torch.Tensor, confidence: float = 0.95) -> Estimate:
    """Inverse propensity scoring: V = 1/Q sum_i w_i r_i, without bias for any Q.

    The interval is V +- u s / sqrt(Q), with s the standard deviation (divisor Q - 1) of w r and u
    the normal quantile: it holds for many selections with ratios that are not extreme.

    Edges: no overlap gives 0 with an interval of width 0, which says nothing: look at the effective
    sample size. One selection has the interval (-inf, inf), no selection the value NaN. Equal
    rewards do not give that reward: the sum of the ratios is Q on average only (see `snips`).

    Example:
        >>> ips(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])).value
        1.0
    """
    terms_Q = ratios_Q.double() * rewards_Q.double()
    num, value = len(terms_Q), terms_Q.mean().item()
    if num < 2:
        return Estimate(value, -math.inf, math.inf)
    error = terms_Q.std().item() / math.sqrt(num)
    margin = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return Estimate(value, value - margin, value + margin)


def snips(ratios_Q: torch.Tensor, rewards_Q: torch.Tensor, confidence: float = 0.95) -> Estimate:
    """Self-normalised IPS: V = sum_i w_i r_i / sum_i w_i.

    (Swaminathan and Joachims 2015, "The Self-Normalized Estimator for Counterfactual Learning".) It
    lies between the lowest and the highest reward, moves with them when a constant is added to all,
    and mostly varies less than IPS; its bias falls as 1/Q.

    The interval is V +- t s. s is the jackknife's standard error (Efron and Tibshirani 1993,
    chapter 11), which a selection that dominates does not shrink as it does the delta method's:

        s^2 = sum_i (V without i - V)^2 = sum_i (w_i (r_i - V) / (sum_j w_j - w_i))^2

    t is Student's quantile with n_e - 1 degrees of freedom (at least 1), for the effective sample
    size n_e; a choice of our own, which widens what few selections say. Selections count as
    independent draws of question and pick. The interval still holds the value less often than it
    says where n_e is small and rare selections matter: simulated 95 % intervals held 0.84 to 0.94
    of the time at n_e = 7, 0.91 to 0.94 at 28 and 0.95 at 550.

    Edges: no overlap (all ratios 0) has the value NaN and the interval (-inf, inf). Where a single
    selection has a ratio above 0, or all weight within rounding, the interval is (-inf, inf).
    Equal rewards give that reward with width 0.

    Example:
        >>> found = snips(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0]))
        >>> found.value, round(found.high - found.value, 3)
        (0.75, 1.904)
    """
    ratios_Q, rewards_Q = ratios_Q.double(), rewards_Q.double()
    total = ratios_Q.sum().item()
    value = (ratios_Q * rewards_Q).sum().item() / total if total else math.nan
    others_Q = total - ratios_Q
    if not total or others_Q.min() <= 0:
        return Estimate(value, -math.inf, math.inf)
    error = (ratios_Q * (rewards_Q - value) / others_Q).square().sum().sqrt().item()
    degrees = max(effective_sample_size(ratios_Q) - 1, 1.0)
    margin = float(stdtrit(degrees, 0.5 + confidence / 2)) * error
    return Estimate(value, value - margin, value + margin)


def capped_ratios(
    target_logp_B: torch.Tensor, behaviour_logp_B: torch.Tensor, max_ratio: float
) -> torch.Tensor:
    """Ratios for training, shape (B,), differentiable in the target's log-probabilities.

        f(w) = w                         for w <= c
               c (1 + log(w / c))        for w > c, which is at most w

    Value and gradient are continuous: grad f(w) = min(w, c) grad log p(z | x). Below c this is the
    ratio itself, whose gradient is that of IPS; above c its weight in the gradient stays c, which
    bounds the variance. Plain truncation, min(w, c) (Ionides 2008), has no gradient above c: of a
    policy that was served greedily and drew a share e of its selections, those that were drawn have
    w = 1/e from the start, and nothing would be learned from them with c below that. The
    continuation is our own; that it is at most w is 1 + log u <= u for u = w / c.

    Edges: -inf (a selection that the target never makes) gives 0 with gradient 0.

    Example:
        >>> capped_ratios(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.05]).log(), 4.0)
        tensor([1.0000, 7.6652])
    """
    possible_B = target_logp_B > float("-inf")
    # Both branches are finite, so that the one not taken has no NaN gradient.
    log_ratio_B = torch.where(possible_B, target_logp_B, behaviour_logp_B) - behaviour_logp_B
    limit = math.log(max_ratio)
    below_B = log_ratio_B.clamp(max=limit).exp()
    above_B = max_ratio * (1 + log_ratio_B - limit)
    return torch.where(possible_B, torch.where(log_ratio_B <= limit, below_B, above_B), 0.0)


def off_policy_losses(
    target_logp_B: torch.Tensor,
    behaviour_logp_B: torch.Tensor,
    rewards_B: torch.Tensor,
    baseline: float,
    max_ratio: float,
) -> torch.Tensor:
    """- f(w) (r - b) for each logged selection, shape (B,); see `capped_ratios` for f.

    Where no ratio is above c, the mean is b minus the IPS estimate of V(p), up to b (mean w - 1),
    and its gradient - mean w (r - b) grad log p(z | x): in expectation over the log exactly
    - grad V(p), for any constant b, as E_mu[w grad log p] = grad sum_z p(z | x) = 0. Without a
    baseline a finite log is learned by heart: with rewards that are all positive the policy moves
    to whatever was drawn (propensity overfitting, Swaminathan and Joachims 2015). b near the
    mean reward removes that pull, as the self-normalised estimate does.

    Edges: rewards equal to b give exact zeros.

    Example:
        >>> target, behaviour = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
        >>> off_policy_losses(target, behaviour, torch.tensor([1.0, 0.0]), 0.5, 9.0)
        tensor([-1.0000,  0.2500])
    """
    return -capped_ratios(target_logp_B, behaviour_logp_B, max_ratio) * (rewards_B - baseline)
