"""A batch of rewarded episodes, its importance weights, and their statistics.

Selector and generator share the weights: both M-steps use the same.

Shape letters: B questions, M samples, E = B * M episodes, T actions of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError, RlragError
from rlrag.records import Columns, Trajectories
from rlrag.training.distributed.workers import Workers, names_of_all


@dataclass(frozen=True)
class RewardedBatch:
    """M episodes of each of B questions, drawn by one version of the policy.

    Episode b * M + m of `trajectories` is sample m of question b. The versions are the E-steps
    whose policy drew and whose generator weights scored. `stop_rewards_ET` is what stopping before
    each action would have been worth, NaN where that is not known or not allowed; None unless the
    baseline asks for it.
    """

    trajectories: Trajectories
    num_samples: int
    policy_version: int
    generator_version: int
    stop_rewards_ET: np.ndarray | None = None

    @property
    def question_rows(self) -> np.ndarray:
        """The questions, shape (B,)."""
        return self.trajectories.question_rows_E[:: self.num_samples]

    @property
    def rewards_BM(self) -> np.ndarray:
        """Rewards, NaN where one could not be computed."""
        return self.by_question(self.trajectories.rewards_E)

    @property
    def log_weights_BM(self) -> np.ndarray:
        """The log a_i of `rlrag.selection.protocol.Draws`."""
        return self.by_question(self.trajectories.log_weights_E)

    @property
    def behaviour_logp_BMT(self) -> np.ndarray:
        """Log-probabilities of the actions under the policy that drew them, in nats."""
        return self.by_question(self.trajectories.logp_ET)

    @property
    def actions_BMT(self) -> np.ndarray:
        """The actions, -1 beyond the end of an episode."""
        return self.by_question(self.trajectories.actions_ET)

    @property
    def terms_BM(self) -> Columns:
        """The reward's terms before weighting."""
        return {name: self.by_question(t) for name, t in self.trajectories.terms.items()}

    @property
    def errors(self) -> tuple[RlragError, ...]:
        """Why rewards could not be computed."""
        return tuple(error for error in self.trajectories.errors if error is not None)

    def by_question(self, values_E: np.ndarray) -> np.ndarray:
        """Values of episodes, (E, ...), as (B, M, ...)."""
        return values_E.reshape(-1, self.num_samples, *values_E.shape[1:])


def importance_weights(batch: RewardedBatch, config: DROConfig) -> torch.Tensor:
    """Weights of this worker's samples, float64 of shape (B, M)."""
    return dro.importance_weights(
        torch.from_numpy(batch.rewards_BM).double(),
        torch.from_numpy(batch.log_weights_BM).double(),
        config.reward_temperature,
        config.weighting,
    )


def describe_batch(
    batch: RewardedBatch, weights_BM: torch.Tensor, config: TrainingConfig, workers: Workers
) -> dict[str, Any]:
    """Means over the whole batch of all workers, which must call this together.

    A term of the reward has its mean over the selections that have it. `failures`, where there are
    any, says why rewards of this worker could not be computed.

    Raises:
        GenerationError: when more rewards failed than `max_failed_share` allows.
    """
    rewards_BM = torch.from_numpy(batch.rewards_BM)
    found = dro.diagnostics(weights_BM, rewards_BM, torch.from_numpy(batch.actions_BMT))
    # Sums over this worker's share, and of how many values.
    measures = {
        "ess": (found.ess.sum().item(), len(found.ess)),
        "weight_entropy": (found.entropy.sum().item(), len(found.entropy)),
        "log_weight_variance": (found.log_weight_variance.sum().item(), len(found.ess)),
        "zero_signal_share": (found.zero_signal.sum().item(), len(found.zero_signal)),
        "duplicate_share": (found.duplicate_share.sum().item(), len(found.duplicate_share)),
        "reward": _of_those_known(batch.rewards_BM),
    }
    # A custom reward may have other terms for other selections, and so on every worker.
    for name in names_of_all(batch.terms_BM, workers):
        values = batch.terms_BM.get(name, np.empty(0))
        measures[f"reward/{name}"] = _of_those_known(values)
    summed = workers.sum(torch.tensor([*measures.values()], dtype=torch.float64)).tolist()
    metrics = {
        name: total / count for name, (total, count) in zip(measures, summed, strict=True) if count
    }
    return metrics | count_failures(batch.trajectories.errors, config, workers)


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
