"""DRO: importance weights, selector and generator losses, and their diagnostics.

Direct Retrieval-augmented Optimization (DRO, arXiv 2505.03075) treats the selection z as a latent
variable of p(y | x) = sum_z p(z | x) p(y | x, d_z). The E-step draws z_1..z_m from the current
selector and weighs them by w_i proportional to p(y | x, d_{z_i}). The M-step holds w constant and
minimises, for the selector and for the generator,

    L_S = - sum_i w_i log p(z_i | x)            (Eq. 10)
    L_G = - sum_i w_i log p(y | x, d_{z_i})     (Eq. 11)

Samples carry the logarithm of a sample weight a_i such that sum_i a_i f(z_i) estimates
E_{z~p}[f(z)]: 1/m for independent draws from p, else what corrects for the proposal
(`rlrag.selection.protocol.Draws`). -inf marks padding.

Departures from the paper and its released scripts:

- The paper's equations are followed where the scripts differ: m samples and not one, the summed
  log-likelihood and not its mean over tokens, duplicates kept with their multiplicity.
- Sample weights, which the paper has not: its proposal is the selector itself, so a_i = 1/m.
- A baseline, which the paper has not; `none` is its form. See `coefficients`.
- `clipped_selector_loss` for several passes over the same samples; the paper keeps L_S as it is.
- `prefix_coefficients`, a baseline for each action of a path, of which the paper has none.
- Entropy and KL terms, which the paper has not, of the policy as it is in each pass; see
  `entropy_coefficients`, `kl_coefficients`.
- Samples whose reward could not be computed are left out; the others share their sample weight.

Shape letters: B questions, M samples, K selected, T actions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Weighting = Literal["self_normalised", "raw"]
Baseline = Literal["none", "mean", "leave_one_out"]
"""Of whole samples; `prefix_coefficients` has one for each action."""

_MAX_LOG_RATIO = 20.0
"""exp(20) = 4.9e8: far beyond any clip, and far from overflow in float32."""


def valid_samples(rewards_BM: torch.Tensor, log_weights_BM: torch.Tensor) -> torch.Tensor:
    """Which samples count, bool of shape (B, M): neither without a reward (NaN) nor padding.

    Example:
        >>> nan, inf = float("nan"), float("inf")
        >>> valid_samples(torch.tensor([[-1.0, nan, -1.0]]), torch.tensor([[0.0, 0.0, -inf]]))
        tensor([[ True, False, False]])
    """
    return ~rewards_BM.isnan() & (log_weights_BM > float("-inf"))


def importance_weights(
    rewards_BM: torch.Tensor,
    log_weights_BM: torch.Tensor,
    temperature: float,
    weighting: Weighting,
) -> torch.Tensor:
    """Weights of the samples of each question, shape (B, M); constants for the M-step.

    With R_i = exp(r_i / temperature) and the sample weights a_i:

    - `self_normalised` (Eq. 19): w_i = a_i R_i / sum_j a_j R_j. With r = log p(y | x, d_z) in
      nats, temperature 1 and independent draws this is p(y | x, d_{z_i}) / sum_j p(y | x, d_{z_j}).
      L_S then estimates the gradient of log E[R], with a bias of order 1/m.
    - `raw` (Eq. 7 without normalisation): w_i = a_i R_i. L_S then estimates the gradient of E[R]
      without bias.

    A sample whose reward is NaN has weight 0 and the others share its sample weight in proportion
    to theirs: for independent draws from the policy, 1/m becomes one over the number of valid ones.
    Padding has weight 0. A question with no valid sample, or with -inf for all rewards, has only
    zeros. One valid sample has the self-normalised weight 1, which carries no signal. Raw weights
    overflow to infinity when r / temperature exceeds 88 in float32, 709 in float64.

    Example:
        >>> logp = torch.log(torch.tensor([[0.3, 0.1]]))
        >>> independent = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> importance_weights(logp, independent, 1.0, "self_normalised")
        tensor([[0.7500, 0.2500]])
        >>> importance_weights(logp, independent, 1.0, "raw")
        tensor([[0.1500, 0.0500]])
    """
    valid_BM = valid_samples(rewards_BM, log_weights_BM)
    scaled_BM = torch.where(valid_BM, rewards_BM / temperature, float("-inf"))
    if weighting == "raw":
        return (_shared_log_weights(log_weights_BM, valid_BM) + scaled_BM).exp()
    joint_BM = torch.where(valid_BM, log_weights_BM + scaled_BM, float("-inf"))
    return joint_BM.softmax(dim=1).nan_to_num(nan=0.0)


def coefficients(
    weights_BM: torch.Tensor,
    log_weights_BM: torch.Tensor,
    valid_BM: torch.Tensor,
    baseline: Baseline,
) -> torch.Tensor:
    """What multiplies log p(z_i | x) in the selector's loss, shape (B, M).

    - `none`: w_i, the paper's form.
    - `mean`, for self-normalised weights: w_i - (sum_j w_j) a_i / sum_j a_j, which is w_i - 1/m for
      independent draws from the policy. As the score function has mean zero on-policy, the second
      term changes no expectation; it removes the pull towards whatever was drawn. That is exact
      for independent draws of the current policy; with other sample weights the term has the bias
      of order 1/m that self-normalised weights have anyway.
    - `leave_one_out`, for raw weights of independent draws (Kool et al., 2019, "Buy 4 REINFORCE
      samples, get a baseline for free!"): a_i (R_i - mean_{j != i} R_j) with R_i = w_i / a_i. The
      baseline of a sample does not depend on it, so the estimate stays unbiased for any m, also
      under a tempered proposal.

    Both are exact on-policy only. They are summed over pairs of samples, so that equal rewards give
    exact zeros. One valid sample gives 0 with either; a sample that is not valid (`valid_samples`)
    always has 0.

    Example:
        >>> both = torch.tensor([[True, True]])
        >>> half = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> coefficients(torch.tensor([[0.75, 0.25]]), half, both, "mean")
        tensor([[ 0.2500, -0.2500]])
        >>> coefficients(torch.tensor([[0.15, 0.05]]), half, both, "leave_one_out")
        tensor([[ 0.1000, -0.1000]])
    """
    if baseline == "none":
        return weights_BM
    shared_BM = _shared_log_weights(log_weights_BM, valid_BM)
    if baseline == "mean":
        share_BM = shared_BM.softmax(dim=1).nan_to_num(nan=0.0)
        pair_BMM = weights_BM.unsqueeze(2) * share_BM.unsqueeze(1)
        return (pair_BMM - pair_BMM.mT).sum(dim=2)
    likelihood_BM = torch.where(valid_BM, (weights_BM.log() - shared_BM).exp(), 0.0)
    above_BMM = likelihood_BM.unsqueeze(2) - likelihood_BM.unsqueeze(1)
    above_BM = torch.where(valid_BM.unsqueeze(1), above_BMM, 0.0).sum(dim=2)
    num_others_B1 = (valid_BM.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return torch.where(valid_BM, shared_BM.exp() * above_BM / num_others_B1, 0.0)


def _shared_log_weights(log_weights_BM: torch.Tensor, valid_BM: torch.Tensor) -> torch.Tensor:
    """Log sample weights of the valid samples, scaled to the sum of all; -inf for the others."""
    kept_BM = torch.where(valid_BM, log_weights_BM, float("-inf"))
    missing_B1 = log_weights_BM.logsumexp(1, keepdim=True) - kept_BM.logsumexp(1, keepdim=True)
    return torch.where(valid_BM, kept_BM + missing_B1, float("-inf"))


def prefix_coefficients(
    rewards_BM: torch.Tensor,
    stop_rewards_BMT: torch.Tensor,
    log_weights_BM: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """What multiplies the log-probability of each action of a path, shape (B, M, T).

    The baseline of an action is what the path was worth before it, R(s_t) = exp(r(s_t) / T), the
    reward of stopping there. It depends on the state alone, so that it changes no expectation of
    the score function; an action then counts for what came of it and of those behind it:

        c_it = a_i (R_i - R(s_it)) / Z,  Z = sum_j a_j max(R_j, max_t R(s_jt))

    Where no prefix is worth more than its path, Z normalises as self-normalised weights do; else it
    keeps every coefficient within 1. Where the reward of stopping is not known (NaN), the mean over
    the question's samples is the baseline. Samples that are not valid (`valid_samples`) have 0.

    Example:
        >>> half, reward = torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([[0.6, 0.2]]).log()
        >>> before = torch.tensor([[[0.1, 0.6], [0.1, 0.1]]]).log()
        >>> prefix_coefficients(reward, before, half, 1.0)
        tensor([[[0.6250, 0.0000],
                 [0.1250, 0.1250]]])
    """
    valid_BM = valid_samples(rewards_BM, log_weights_BM)
    own_BM = torch.where(valid_BM, rewards_BM / temperature, float("-inf"))
    stop_BMT = stop_rewards_BMT / temperature
    highest_BM = torch.maximum(own_BM, stop_BMT.nan_to_num(nan=float("-inf")).amax(dim=2))
    shared_BM = _shared_log_weights(log_weights_BM, valid_BM)
    log_total_B1 = (shared_BM + highest_BM).logsumexp(dim=1, keepdim=True)
    share_BM = (own_BM - log_total_B1).exp()
    mean_B11 = (shared_BM.exp() * share_BM).sum(dim=1)[:, None, None]
    before_BMT = (stop_BMT - log_total_B1[:, :, None]).exp()
    above_BMT = share_BM[:, :, None] - torch.where(before_BMT.isnan(), mean_B11, before_BMT)
    found_BMT = shared_BM.exp()[:, :, None] * above_BMT
    return torch.where(valid_BM[:, :, None], found_BMT, 0.0).nan_to_num(nan=0.0)


def entropy_coefficients(
    logp_BM: torch.Tensor, behaviour_logp_BM: torch.Tensor, log_weights_BM: torch.Tensor
) -> torch.Tensor:
    """What multiplies log p(z_i | x) in `selector_loss`, per unit of weight, to raise the entropy.

    The gradient of H(p) = -E_p[log p] is -E_p[(log p) grad log p], as E_p[grad log p] = 0. With
    rho_i = p(z_i | x) / p_behaviour(z_i | x) it is estimated by -a_i rho_i log p(z_i | x), which is
    constant, of shape (B, M), in nats; the sum over the samples of a question estimates H. Both are
    unbiased for the policy of `logp_BM`, so compute them anew in every pass over the samples.

    `behaviour_logp_BM` is as in `clipped_selector_loss`; log rho is held at 20 or less here too.
    The reward does not enter, so samples without one count too; padding gets 0, and so does a
    selection of probability 1.

    Example:
        >>> half = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> entropy_coefficients(half, half, half)
        tensor([[0.3466, 0.3466]])
    """
    return _reweighted(-logp_BM, logp_BM, behaviour_logp_BM, log_weights_BM)


def kl_coefficients(
    logp_BM: torch.Tensor,
    behaviour_logp_BM: torch.Tensor,
    initial_logp_BM: torch.Tensor,
    log_weights_BM: torch.Tensor,
) -> torch.Tensor:
    """What multiplies log p(z_i | x) in `selector_loss`, per unit of weight, to stay near p0.

    The gradient of KL(p || p0) = E_p[log p - log p0] is E_p[(log p - log p0) grad log p]. It is
    estimated by -a_i rho_i (log p(z_i | x) - log p0(z_i | x)), constant, shape (B, M), in nats; the
    negated sum over the samples of a question estimates the KL. rho_i, every pass and padding are
    as in `entropy_coefficients`. An unchanged policy gives zeros.

    Example:
        >>> half = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> kl_coefficients(half, half, torch.log(torch.tensor([[0.25, 0.5]])), half)
        tensor([[-0.3466,  0.0000]])
    """
    return _reweighted(initial_logp_BM - logp_BM, logp_BM, behaviour_logp_BM, log_weights_BM)


def _reweighted(
    value_BM: torch.Tensor,
    logp_BM: torch.Tensor,
    behaviour_logp_BM: torch.Tensor,
    log_weights_BM: torch.Tensor,
) -> torch.Tensor:
    """a_i rho_i times a value of each sample, constant; 0 for padding."""
    weight_BM = log_weights_BM.to(value_BM.dtype).exp()
    ratio_BM = (logp_BM - behaviour_logp_BM).clamp(max=_MAX_LOG_RATIO).exp()
    return torch.where(weight_BM > 0, weight_BM * ratio_BM * value_BM, 0.0).detach()


def selector_loss(logp: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """L_S = - sum_i c_i log p(z_i | x) for each question, shape (B,), in nats (Eq. 10).

    Both are of shape (B, M), or of shape (B, M, T) for the actions of paths, whose
    log-probabilities add up to log p(z_i | x). Gradients flow through `logp` alone; its gradient
    is Eq. 12. A coefficient of zero removes a sample, whatever its log-probability.
    """
    return _negated_sum(logp, coefficients)


def generator_loss(answer_logp_BM: torch.Tensor, weights_BM: torch.Tensor) -> torch.Tensor:
    """L_G = - sum_i w_i log p(y | x, d_{z_i}) for each question, shape (B,), in nats (Eq. 11).

    Gradients flow through `answer_logp_BM` alone; its gradient is Eq. 13. No baseline belongs here:
    this is a weighted likelihood and not a score function, so a negative weight would make a golden
    answer less likely. A weight of zero removes a sample, whatever its log-likelihood.

    Example:
        >>> generator_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[0.75, 0.25]]))
        tensor([1.5000])
    """
    return _negated_sum(answer_logp_BM, weights_BM)


def _negated_sum(logp: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    constant = coefficients.detach()
    return -torch.where(constant == 0, 0.0, constant * logp).flatten(1).sum(dim=1)


def clipped_selector_loss(
    logp_BMT: torch.Tensor,
    behaviour_logp_BMT: torch.Tensor,
    coefficients_BMT: torch.Tensor,
    clip_ratio: float,
) -> torch.Tensor:
    """Off-policy surrogate of L_S for each question, shape (B,).

    With the ratio of each action, rho_it = p(a_it | s_it) / p_behaviour(a_it | s_it), and
    e = `clip_ratio` (PPO, Schulman et al., 2017, arXiv 1707.06347, Eq. 7, with c_it in place of the
    advantage):

        L = - sum_it min(rho_it c_it, clip(rho_it, 1 - e, 1 + e) c_it)

    The ratio of a whole path, the product of its actions', would be clipped the sooner the longer
    the path. `behaviour_logp_BMT` are log-probabilities of the policy at the time of the draw and
    not of a tempered proposal, which the sample weights within c already correct for. Gradients
    flow through `logp_BMT` alone. At rho = 1 the gradient is that of `selector_loss`; the value is
    - sum_it c_it, which means something only in comparison.

    Edges: c > 0 has no gradient once rho > 1 + e, c < 0 none once rho < 1 - e; the other sides are
    not clipped, so that a step in the wrong direction can be undone. There c < 0 grows with rho
    without bound; log rho is held at 20 or less, beyond which a sample has no gradient either, and
    nothing overflows. A coefficient of zero removes an action, whatever its log-probability.

    Example:
        >>> now, then = torch.tensor([[[0.6], [0.3]]]).log(), torch.tensor([[[0.4], [0.4]]]).log()
        >>> clipped_selector_loss(now, then, torch.tensor([[[1.0], [-1.0]]]), 0.2)
        tensor([-0.4000])
    """
    constant_BMT = coefficients_BMT.detach()
    change_BMT = torch.where(constant_BMT == 0, 0.0, logp_BMT - behaviour_logp_BMT.detach())
    ratio_BMT = change_BMT.clamp(max=_MAX_LOG_RATIO).exp()
    clipped_BMT = ratio_BMT.clamp(1 - clip_ratio, 1 + clip_ratio)
    lower_BMT = torch.minimum(ratio_BMT * constant_BMT, clipped_BMT * constant_BMT)
    return -lower_BMT.flatten(1).sum(dim=1)


class WeightDiagnostics(NamedTuple):
    """Health of the weights of B questions, each of shape (B,).

    `ess`: effective sample size 1 / sum w^2 of the normalised weights, from 1 to m. `entropy`: of
    the normalised weights, in nats. `zero_signal`: True where all valid rewards are equal, so that
    the weights prefer nothing. `duplicate_share`: share of samples that repeat an earlier one.
    `log_weight_variance`: sample variance (over n - 1) of log w, in squared nats.
    """

    ess: torch.Tensor
    entropy: torch.Tensor
    zero_signal: torch.Tensor
    duplicate_share: torch.Tensor
    log_weight_variance: torch.Tensor


def diagnostics(
    weights_BM: torch.Tensor, rewards_BM: torch.Tensor, positions_BMK: torch.Tensor
) -> WeightDiagnostics:
    """Measure the weights of a batch.

    One valid sample has ESS 1 and a question without any has ESS 0. The variance is over the valid
    samples whose weight is above 0, and 0 where there are fewer than two.

    Example:
        >>> same = torch.tensor([[0.5, 0.5]])
        >>> d = diagnostics(same, torch.tensor([[-1.0, -1.0]]), torch.tensor([[[0], [0]]]))
        >>> d.ess.item(), d.zero_signal.item(), d.duplicate_share.item()
        (2.0, True, 0.5)
    """
    total_B1 = weights_BM.sum(dim=1, keepdim=True)
    share_BM = weights_BM / torch.where(total_B1 > 0, total_B1, 1.0)
    square_B = share_BM.square().sum(dim=1)
    ess_B = torch.where(square_B > 0, 1 / square_B, 0.0)
    entropy_B = -torch.special.xlogy(share_BM, share_BM).sum(dim=1)
    valid_BM = ~rewards_BM.isnan()
    low_B = rewards_BM.masked_fill(~valid_BM, float("inf")).amin(dim=1)
    high_B = rewards_BM.masked_fill(~valid_BM, float("-inf")).amax(dim=1)
    same_BMM = (positions_BMK.unsqueeze(1) == positions_BMK.unsqueeze(2)).all(dim=-1)
    repeats_BM = same_BMM.tril(diagonal=-1).any(dim=-1)
    return WeightDiagnostics(
        ess_B,
        entropy_B,
        high_B <= low_B,
        repeats_BM.float().mean(dim=1),
        _log_variance(share_BM),
    )


def _log_variance(share_BM: torch.Tensor) -> torch.Tensor:
    """Variance of the logarithms of what is above 0 in each row; 0 for fewer than two."""
    counted_BM = share_BM > 0
    log_BM = torch.where(counted_BM, share_BM, 1.0).log()
    num_B1 = counted_BM.sum(dim=1, keepdim=True)
    mean_B1 = log_BM.sum(dim=1, keepdim=True) / num_B1.clamp(min=1)
    square_BM = torch.where(counted_BM, (log_BM - mean_B1).square(), 0.0)
    return square_BM.sum(dim=1) / (num_B1.squeeze(1) - 1).clamp(min=1)
