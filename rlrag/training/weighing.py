"""Experience in; importance weights and the numbers that describe rewards and weights out.

What selector and generator share: both M-steps use the same weights.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from typing import Any

import torch

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError
from rlrag.training.experience import Experience
from rlrag.training.workers import Workers


def importance_weights(experience: Experience, config: DROConfig) -> torch.Tensor:
    """Weights of this worker's samples, float64 of shape (B, M)."""
    return dro.importance_weights(
        torch.from_numpy(experience.rewards_BM).double(),
        torch.from_numpy(experience.log_weights_BM).double(),
        config.reward_temperature,
        config.weighting,
    )


def describe_experience(
    experience: Experience, weights_BM: torch.Tensor, config: TrainingConfig, workers: Workers
) -> dict[str, Any]:
    """Means over the whole batch of all workers, which must call this together.

    `failures`, where there are any, says why rewards of this worker could not be computed.

    Raises:
        GenerationError: when more rewards failed than `max_failed_share` allows.
    """
    rewards_BM = torch.from_numpy(experience.rewards_BM)
    found = dro.diagnostics(weights_BM, rewards_BM, torch.from_numpy(experience.positions_BMK))
    totals = {
        "ess": found.ess.sum().item(),
        "weight_entropy": found.entropy.sum().item(),
        "log_weight_variance": found.log_weight_variance.sum().item(),
        "zero_signal_share": found.zero_signal.sum().item(),
        "duplicate_share": found.duplicate_share.sum().item(),
        "reward": rewards_BM.nansum().item(),
    }
    for name in sorted(experience.terms_BM):
        totals[f"reward/{name}"] = torch.from_numpy(experience.terms_BM[name]).nansum().item()
    counts = [float(len(experience.errors)), float(rewards_BM.numel())]
    summed = workers.sum(torch.tensor([*totals.values(), *counts], dtype=torch.float64)).tolist()
    num_failed, num_samples = summed[-2:]
    if num_failed > config.max_failed_share * num_samples:
        first = experience.errors[0] if experience.errors else "see the other workers' logs"
        raise GenerationError(
            f"{num_failed:.0f} of {num_samples:.0f} rewards of a batch could not be computed, "
            f"more than training.max_failed_share {config.max_failed_share} allows; "
            f"the first: {first}"
        )
    metrics: dict[str, Any] = {
        name: total / (num_samples - num_failed if name.startswith("reward") else config.batch_size)
        for name, total in zip(totals, summed, strict=False)
    }
    metrics["num_rollouts"] = num_samples
    metrics["num_failed"] = num_failed
    if experience.errors:
        metrics["failures"] = sorted({str(error) for error in experience.errors})
    return metrics
