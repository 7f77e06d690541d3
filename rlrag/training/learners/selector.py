"""The selector's M-step: one optimiser step on a rewarded batch.

Shape letters: B questions, M samples, E = B * M episodes, T actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.selection.build import TrainablePolicy
from rlrag.training.distributed.workers import Workers
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.learners.optimiser import MAX_GRAD_NORM, WEIGHT_DECAY, Optimiser


class SelectorLearner:
    """Takes one DRO step on a policy for each rewarded batch.

    Every worker sees its share of the batch. Gradients and metrics are summed over the workers and
    divided by the questions of the whole batch: one worker and many do the same mathematics.

    Args:
        policy: What is trained.
        initial: The policy before training, which `kl_to_initial` is measured against.
        dro_config: Which loss.
        config: Batch size and learning rate.
        num_steps: Steps of the whole run, for the learning rate.
        workers: Whom the batch is shared with.
        weight_decay: See `Optimiser`.
        max_grad_norm: See `Optimiser`.
    """

    def __init__(
        self,
        policy: TrainablePolicy,
        initial: TrainablePolicy,
        dro_config: DROConfig,
        config: TrainingConfig,
        num_steps: int,
        workers: Workers,
        weight_decay: float = WEIGHT_DECAY,
        max_grad_norm: float = MAX_GRAD_NORM,
    ) -> None:
        self._policy = policy
        self._initial = initial
        self._dro = dro_config
        self._config = config
        self._workers = workers
        self.optimiser = Optimiser(
            dict(policy.named_parameters()),
            config.learning_rate,
            config.warmup_steps,
            num_steps,
            workers,
            "lower training.learning_rate, or look for infinite rewards in metrics.jsonl",
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
        )

    def update(self, batch: RewardedBatch, weights_BM: torch.Tensor, step: int) -> dict[str, float]:
        """One optimiser step; returns metrics averaged over the whole batch, as before the step.

        `policy_entropy` and `kl_to_initial` are estimates from the samples for whole episodes, in
        nats.

        Args:
            batch: This worker's share of the batch.
            weights_BM: Its importance weights.
            step: Number of this step, from 0.

        Raises:
            NonFiniteLossError: when the loss or the gradient is not finite.
        """
        log_weights_BM = torch.from_numpy(batch.log_weights_BM)
        behaviour_BMT = torch.from_numpy(batch.behaviour_logp_BMT).double()
        behaviour_BM = behaviour_BMT.sum(dim=2)
        with torch.no_grad():
            initial_BM = self._logp(self._initial, batch, slice(None)).sum(dim=2).cpu().double()
        coefficients = self._coefficients(batch, weights_BM)
        self.optimiser.zero_grad()
        constants = (coefficients, behaviour_BMT, initial_BM, log_weights_BM)
        loss, logp_BM = self._backward(batch, constants)
        kl_BM = dro.kl_coefficients(logp_BM, behaviour_BM, initial_BM, log_weights_BM)
        entropy_BM = dro.entropy_coefficients(logp_BM, behaviour_BM, log_weights_BM)
        metrics = self._mean(
            {
                "loss": loss,
                "kl_to_initial": -kl_BM.sum().item(),
                "policy_entropy": entropy_BM.sum().item(),
            }
        )
        metrics["grad_norm"], metrics["learning_rate"] = self.optimiser.step(step)
        return metrics

    def _backward(
        self, batch: RewardedBatch, constants: Sequence[torch.Tensor]
    ) -> tuple[float, torch.Tensor]:
        """Add up the gradient; returns the summed loss, and log p of shape (B, M) on the CPU.

        `constants` are those of `_loss`.

        As many questions at once as the policy reads in one pass: what a language model keeps for
        the gradient would otherwise grow with the batch.
        """
        num_questions = len(batch.question_rows)
        at_once = getattr(self._policy, "micro_batch", None) or num_questions
        loss, parts = 0.0, []
        for start in range(0, num_questions, at_once):
            rows = slice(start, start + at_once)
            logp_BMT = self._logp(self._policy, batch, rows)
            loss_B = self._loss(logp_BMT, *(each[rows].to(logp_BMT) for each in constants))
            (loss_B.sum() / self._config.batch_size).backward()
            loss += loss_B.detach().sum().item()
            parts.append(logp_BMT.detach().sum(dim=2).cpu().double())
        return loss, torch.cat(parts)

    @staticmethod
    def _logp(policy: TrainablePolicy, batch: RewardedBatch, questions: slice) -> torch.Tensor:
        """Log-probabilities of the actions of some questions' episodes, shape (B, M, T)."""
        num_samples = batch.num_samples
        rows_E = batch.by_question(np.arange(len(batch.trajectories)))[questions].ravel()
        trajectories = batch.trajectories
        if len(rows_E) < len(trajectories):
            trajectories = trajectories.of(rows_E)
        logp_ET = policy.log_prob(trajectories)
        return logp_ET.view(-1, num_samples, logp_ET.shape[1])

    def _coefficients(self, batch: RewardedBatch, weights_BM: torch.Tensor) -> torch.Tensor:
        """What multiplies log p of the episodes, (B, M), or of their actions, (B, M, T)."""
        config = self._dro
        rewards_BM = torch.from_numpy(batch.rewards_BM)
        log_weights_BM = torch.from_numpy(batch.log_weights_BM)
        acts_BMT = torch.from_numpy(batch.actions_BMT >= 0)
        if batch.stop_rewards_ET is not None:
            stop_rewards_BMT = torch.from_numpy(batch.by_question(batch.stop_rewards_ET))
            found_BMT = dro.prefix_coefficients(
                rewards_BM, stop_rewards_BMT, log_weights_BM, config.reward_temperature
            )
            return torch.where(acts_BMT, found_BMT, 0.0)
        assert config.baseline != "prefix"
        valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
        found_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, config.baseline)
        return found_BM if config.clip_ratio is None else found_BM[:, :, None] * acts_BMT

    def _loss(
        self,
        logp_BMT: torch.Tensor,
        coefficients: torch.Tensor,
        behaviour_BMT: torch.Tensor,
        initial_BM: torch.Tensor,
        log_weights_BM: torch.Tensor,
    ) -> torch.Tensor:
        """The reward's loss, and entropy and KL of the policy as it is in this pass, shape (B,)."""
        logp_BM, behaviour_BM = logp_BMT.sum(dim=2), behaviour_BMT.sum(dim=2)
        clip_ratio = self._dro.clip_ratio
        if clip_ratio is not None:
            loss_B = dro.clipped_selector_loss(logp_BMT, behaviour_BMT, coefficients, clip_ratio)
        else:
            by_action = coefficients.dim() == logp_BMT.dim()
            loss_B = dro.selector_loss(logp_BMT if by_action else logp_BM, coefficients)
        if self._dro.entropy_weight:
            constant_BM = dro.entropy_coefficients(logp_BM, behaviour_BM, log_weights_BM)
            loss_B = loss_B + self._dro.entropy_weight * dro.selector_loss(logp_BM, constant_BM)
        if self._dro.kl_weight:
            constant_BM = dro.kl_coefficients(logp_BM, behaviour_BM, initial_BM, log_weights_BM)
            loss_B = loss_B + self._dro.kl_weight * dro.selector_loss(logp_BM, constant_BM)
        return loss_B

    def _mean(self, totals: dict[str, float]) -> dict[str, float]:
        """Sums over this worker's questions to means over those of the whole batch."""
        summed = self._workers.sum(torch.tensor(list(totals.values()), dtype=torch.float64))
        means = (summed / self._config.batch_size).tolist()
        return dict(zip(totals, means, strict=True))
