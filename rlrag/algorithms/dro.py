"""Rewards of sampled selections in; importance weights, the selector's loss and diagnostics out.

Direct Retrieval-augmented Optimization (DRO, arXiv 2505.03075) treats the selection z as a latent
variable of p(y | x) = sum_z p(z | x) p(y | x, d_z). The E-step draws z_1..z_m from the current
selector and weighs them by w_i proportional to p(y | x, d_{z_i}); the M-step minimises
L_S = - sum_i w_i log p(z_i | x) with w constant.

Departures from the paper and its released scripts:

- The paper's equations are followed where the scripts differ: m samples and not one, the summed
  log-likelihood and not its mean over tokens, duplicates kept with their multiplicity.
- `baseline="mean"` subtracts 1/m, which the paper does not; see `coefficients`.
- Samples whose reward could not be computed are left out and the rest is normalised anew.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Weighting = Literal["self_normalised", "raw"]
Baseline = Literal["none", "mean"]


def importance_weights(
    rewards_BM: torch.Tensor, temperature: float, weighting: Weighting
) -> torch.Tensor:
    """Weights of the samples of each question, shape (B, M); constants for the M-step.

    - `self_normalised` (Eq. 19): w_i = softmax_i(r_i / temperature). With r = log p(y | x, d_z) in
      nats and temperature 1 this is p(y | x, d_{z_i}) / sum_j p(y | x, d_{z_j}).
    - `raw` (Eq. 7 without normalisation): w_i = exp(r_i / temperature) / m, so that the sum over
      samples estimates an expectation.

    A reward of NaN marks a sample whose reward could not be computed: its weight is 0 and the
    others share what it would have had. A question with no valid sample has only zeros. Equal
    rewards give equal weights; one valid sample gives 1, which carries no signal.

    Example:
        >>> logp = torch.log(torch.tensor([[0.3, 0.1]]))
        >>> importance_weights(logp, 1.0, "self_normalised")
        tensor([[0.7500, 0.2500]])
    """
    valid_BM = ~rewards_BM.isnan()
    scaled_BM = (rewards_BM / temperature).masked_fill(~valid_BM, float("-inf"))
    if weighting == "raw":
        num_valid_B1 = valid_BM.sum(dim=1, keepdim=True).clamp(min=1)
        return scaled_BM.exp() / num_valid_B1
    return scaled_BM.softmax(dim=1).nan_to_num(nan=0.0)


def coefficients(
    weights_BM: torch.Tensor, valid_BM: torch.Tensor, baseline: Baseline
) -> torch.Tensor:
    """What multiplies log p(z_i | x) in the loss, shape (B, M).

    `none` gives the weights. `mean` gives w_i - 1/m over the m valid samples of a question. As the
    score function has mean zero on-policy, the constant 1/m changes no expectation; it removes the
    pull towards whatever was drawn. It is exact for self-normalised weights and samples of the
    current policy only. Equal weights then give zeros.

    Example:
        >>> both = torch.tensor([[True, True]])
        >>> coefficients(torch.tensor([[0.75, 0.25]]), both, "mean")
        tensor([[ 0.2500, -0.2500]])
    """
    if baseline == "none":
        return weights_BM
    num_valid_B1 = valid_BM.sum(dim=1, keepdim=True).clamp(min=1)
    return (weights_BM - 1.0 / num_valid_B1).masked_fill(~valid_BM, 0.0)


def selector_loss(logp_BM: torch.Tensor, coefficients_BM: torch.Tensor) -> torch.Tensor:
    """L_S = - sum_i c_i log p(z_i | x) for each question, shape (B,), in nats (Eq. 10).

    Gradients flow through `logp_BM` alone; its gradient is Eq. 12. A coefficient of zero removes a
    sample, whatever its log-probability.
    """
    constant_BM = coefficients_BM.detach()
    return -torch.where(constant_BM == 0, 0.0, constant_BM * logp_BM).sum(dim=1)


class WeightDiagnostics(NamedTuple):
    """Health of the weights of B questions, each of shape (B,).

    `ess`: effective sample size 1 / sum w^2 of the normalised weights, from 1 to m. `entropy`: of
    the normalised weights, in nats. `zero_signal`: True where all valid rewards are equal, so that
    the weights prefer nothing. `duplicate_share`: share of samples that repeat an earlier one.
    """

    ess: torch.Tensor
    entropy: torch.Tensor
    zero_signal: torch.Tensor
    duplicate_share: torch.Tensor


def diagnostics(
    weights_BM: torch.Tensor, rewards_BM: torch.Tensor, positions_BMK: torch.Tensor
) -> WeightDiagnostics:
    """Measure the weights of a batch; a question without valid samples has ESS 0.

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
    return WeightDiagnostics(ess_B, entropy_B, high_B <= low_B, repeats_BM.float().mean(dim=1))
