"""Importance weights of a batch, with statistics of rewards and weights.

Selector and generator share them: both M-steps use the same weights.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError, RlragError
from rlrag.training.distributed.workers import Workers, names_of_all
from rlrag.training.experience import Experience


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
    found = dro.diagnostics(weights_BM, rewards_BM, torch.from_numpy(experience.actions_BMT))
    # Sums over this worker's share, and of how many values.
    measures = {
        "ess": (found.ess.sum().item(), len(found.ess)),
        "weight_entropy": (found.entropy.sum().item(), len(found.entropy)),
        "log_weight_variance": (found.log_weight_variance.sum().item(), len(found.ess)),
        "zero_signal_share": (found.zero_signal.sum().item(), len(found.zero_signal)),
        "duplicate_share": (found.duplicate_share.sum().item(), len(found.duplicate_share)),
        "reward": _of_those_known(experience.rewards_BM),
    }
    # A custom reward may have other terms for other selections, and so on every worker.
    for name in names_of_all(experience.terms_BM, workers):
        values = experience.terms_BM.get(name, np.empty(0))
        measures[f"reward/{name}"] = _of_those_known(values)
    summed = workers.sum(torch.tensor([*measures.values()], dtype=torch.float64)).tolist()
    metrics = {
        name: total / count for name, (total, count) in zip(measures, summed, strict=True) if count
    }
    return metrics | count_failures(experience.trajectories.errors, config, workers)


def count_failures(
    errors: Sequence[RlragError | None], config: TrainingConfig, workers: Workers
) -> dict[str, Any]:
    """How many episodes of all workers, which must call this together, and how many failed.

    Args:
        errors: Why an episode of this worker has no reward, None for each that has one.
        config: Says how many may fail.
        workers: Whom the batch is shared with.

    Raises:
        GenerationError: when more rewards failed than `max_failed_share` allows.
    """
    own = [str(error) for error in errors if error is not None]
    sizes = torch.tensor([len(own), len(errors)], dtype=torch.float64)
    num_failed, num_samples = workers.sum(sizes).tolist()
    if num_failed > config.max_failed_share * num_samples:
        first = own[0] if own else "see the other workers' logs"
        raise GenerationError(
            f"{num_failed:.0f} of {num_samples:.0f} rewards of a batch could not be computed, "
            f"more than training.max_failed_share {config.max_failed_share} allows; "
            f"the first: {first}"
        )
    metrics: dict[str, Any] = {"num_rollouts": num_samples, "num_failed": num_failed}
    if own:
        metrics["failures"] = sorted(set(own))
    return metrics


def _of_those_known(values: np.ndarray) -> tuple[float, int]:
    """The sum of the values that are not NaN, and their number."""
    return float(np.nansum(values)), int((~np.isnan(values)).sum())
