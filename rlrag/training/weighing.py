"""Experience in; importance weights and the numbers that describe rewards and weights out.

What selector and generator share: both M-steps use the same weights.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError
from rlrag.training.experience import Experience
from rlrag.training.workers import Workers, names_of_all


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

    A term of the reward has its mean over the selections that have it. `failures`, where there are
    any, says why rewards of this worker could not be computed.

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
    # A custom reward may have other terms for other selections, and so on every worker.
    terms = {
        name: experience.terms_BM.get(name, np.empty(0))
        for name in names_of_all(experience.terms_BM, workers)
    }
    counts = {name: float((~np.isnan(values)).sum()) for name, values in terms.items()}
    totals |= {f"reward/{name}": float(np.nansum(values)) for name, values in terms.items()}
    sizes = [float(len(experience.errors)), float(rewards_BM.numel())]
    summed = workers.sum(
        torch.tensor([*totals.values(), *counts.values(), *sizes], dtype=torch.float64)
    ).tolist()
    num_failed, num_samples = summed[-2:]
    if num_failed > config.max_failed_share * num_samples:
        first = experience.errors[0] if experience.errors else "see the other workers' logs"
        raise GenerationError(
            f"{num_failed:.0f} of {num_samples:.0f} rewards of a batch could not be computed, "
            f"more than training.max_failed_share {config.max_failed_share} allows; "
            f"the first: {first}"
        )
    divisors = dict.fromkeys(totals, float(config.batch_size)) | {
        "reward": num_samples - num_failed
    }
    found_counts = summed[len(totals) : -2]
    divisors |= {f"reward/{name}": n for name, n in zip(counts, found_counts, strict=True)}
    metrics: dict[str, Any] = {
        name: total / divisors[name]
        for name, total in zip(totals, summed, strict=False)
        if divisors[name]
    }
    metrics["num_rollouts"] = num_samples
    metrics["num_failed"] = num_failed
    if experience.errors:
        metrics["failures"] = sorted({str(error) for error in experience.errors})
    return metrics
