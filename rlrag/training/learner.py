"""Experience in; an updated selection policy and the numbers that describe the update out (M-step).

Shape letters: B questions, M samples, K selected.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from rlrag.algorithms import dro
from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError, NonFiniteLossError
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.training.experience import Experience
from rlrag.training.workers import Workers


class SelectorLearner:
    """Takes one DRO step on a policy for each batch of experience.

    Every worker sees its share of the batch. Gradients and metrics are summed over the workers and
    divided by the questions of the whole batch: one worker and many do the same mathematics.
    """

    def __init__(
        self,
        policy: PlackettLucePolicy,
        candidates: CandidateTable,
        dro_config: DROConfig,
        config: TrainingConfig,
        num_steps: int,
        workers: Workers,
    ) -> None:
        self._policy = policy
        self._candidates = candidates
        self._dro = dro_config
        self._config = config
        self._num_steps = num_steps
        self._workers = workers
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """One optimiser step; returns metrics averaged over the whole batch.

        Raises:
            GenerationError: when more rewards failed than `max_failed_share` allows.
            NonFiniteLossError: when the loss or the gradient is not finite.
        """
        device = next(self._policy.parameters()).device
        rewards_BM = torch.from_numpy(experience.rewards_BM)
        weights_BM = dro.importance_weights(
            rewards_BM, self._dro.reward_temperature, self._dro.weighting
        )
        valid_BM = ~rewards_BM.isnan()
        coefficients_BM = dro.coefficients(weights_BM, valid_BM, self._dro.baseline)
        totals = self._totals(experience, weights_BM)
        logp_BM = self._policy.log_prob(
            self._candidates.batch(experience.question_rows), experience.positions_BMK
        )
        loss_B = dro.selector_loss(logp_BM, coefficients_BM.to(device, logp_BM.dtype))
        totals["loss"] = loss_B.detach().sum().item()
        metrics = self._reduce(totals, experience)
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        (loss_B.sum() / self._config.batch_size).backward()
        metrics["grad_norm"] = self._clip_shared_gradient(step)
        self.optimizer.step()
        metrics["learning_rate"] = rate
        return metrics

    def _totals(self, experience: Experience, weights_BM: torch.Tensor) -> dict[str, float]:
        """Sums over this worker's questions (or samples) of everything that is averaged."""
        rewards_BM = torch.from_numpy(experience.rewards_BM)
        found = dro.diagnostics(weights_BM, rewards_BM, torch.from_numpy(experience.positions_BMK))
        entropy_B = torch.special.entr(
            torch.from_numpy(
                self._policy.first_pick_probabilities(
                    self._candidates.batch(experience.question_rows)
                )
            )
        ).sum(dim=1)
        totals = {
            "ess": found.ess.sum().item(),
            "weight_entropy": found.entropy.sum().item(),
            "zero_signal_share": found.zero_signal.sum().item(),
            "duplicate_share": found.duplicate_share.sum().item(),
            "policy_entropy": entropy_B.sum().item(),
            "reward": rewards_BM.nansum().item(),
        }
        for name in sorted(experience.terms_BM):
            totals[f"reward/{name}"] = torch.from_numpy(experience.terms_BM[name]).nansum().item()
        return totals

    def _reduce(self, totals: dict[str, float], experience: Experience) -> dict[str, float]:
        names = list(totals)
        counts = [float(len(experience.errors)), float(experience.rewards_BM.size)]
        values = torch.tensor([*totals.values(), *counts], dtype=torch.float64)
        summed = self._workers.sum(values).tolist()
        num_failed, num_samples = summed[-2:]
        if num_failed > self._config.max_failed_share * num_samples:
            first = experience.errors[0] if experience.errors else "see the other workers' logs"
            raise GenerationError(
                f"{num_failed:.0f} of {num_samples:.0f} rewards of a batch could not be computed, "
                f"more than training.max_failed_share {self._config.max_failed_share} allows; "
                f"the first: {first}"
            )
        num_questions = self._config.batch_size
        metrics = {
            name: total / (num_samples - num_failed if name.startswith("reward") else num_questions)
            for name, total in zip(names, summed, strict=False)
        }
        metrics["num_rollouts"] = num_samples
        metrics["num_failed"] = num_failed
        return metrics

    def _clip_shared_gradient(self, step: int) -> float:
        parameters = [p for p in self._policy.parameters() if p.requires_grad]
        local = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        shared = self._workers.sum(nn.utils.parameters_to_vector(local))
        norm = shared.norm().item()
        if not math.isfinite(norm):
            raise NonFiniteLossError(
                f"the gradient of step {step} is not finite; lower training.learning_rate, or look "
                "for infinite rewards in metrics.jsonl"
            )
        shared = shared * min(1.0, self._config.max_grad_norm / max(norm, 1e-12))
        start = 0
        for parameter in parameters:
            parameter.grad = shared[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        return norm

    def _rate(self, step: int) -> float:
        """Linear warm-up to the peak, then linear decay to zero at the last step."""
        warmup = self._config.warmup_steps
        if step < warmup:
            return self._config.learning_rate * (step + 1) / warmup
        left = (self._num_steps - step) / max(self._num_steps - warmup, 1)
        return self._config.learning_rate * min(1.0, left)
