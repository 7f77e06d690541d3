"""Off-policy trainer of the selector on a service's log.

    step      logged selections -> importance ratios -> one step on the gradient of IPS
    validate  the off-policy estimate of the policy's value on held-back questions

No generator takes part: the answers were given, and rewarded, when the selections were served. What
is minimised is `algorithms.off_policy.off_policy_losses`, with the mean reward of the selections
that are trained on as baseline.

Validation estimates two policies: the one that draws its selections, which is trained, and the one
that always takes the most probable pick, which a service does by default. The checkpoint that a run
ends with has the highest lower end of the first one's interval. As it is the best of several, its
estimate leans to the high side; an estimate on a later log does not.

Shape letters: Q logged selections, B those of a batch or chunk, T actions of the longest one.
"""

from __future__ import annotations

import copy
import logging
import math
import time

import numpy as np
import torch

from rlrag.algorithms import off_policy
from rlrag.config import DROConfig, RunConfig
from rlrag.environment.rollout import are_equal, play_greedy, replay
from rlrag.errors import DataError
from rlrag.files.directories import restore_weights
from rlrag.pipeline import open_policy
from rlrag.selection.build import TrainablePolicy
from rlrag.training.distributed.workers import Workers
from rlrag.training.feedback.selections import LoggedData, LoggedPart
from rlrag.training.learners.optimiser import Optimiser
from rlrag.training.schedule import BatchSchedule
from rlrag.training.trainer import Files, Metrics, Trainer

logger = logging.getLogger(__name__)

MIN_ESS = 10.0
"""Smallest effective sample size of an estimate: intervals of fewer selections are too narrow."""
CONFIDENCE = 0.95
"""Of the intervals, as in the table of systems."""
_CHUNK = 64


class LoggedTrainer(Trainer):
    """Counterfactual training of the selector."""

    best_by = "validation/score"

    def __init__(
        self, config: RunConfig, data: LoggedData, workers: Workers, min_ess: float = MIN_ESS
    ) -> None:
        """Open the policy that training starts from.

        Args:
            config: The run.
            data: Its log.
            workers: Those that share each batch.
            min_ess: Effective sample size on held-out selections below which no run starts and no
                checkpoint is chosen.

        Raises:
            CheckpointError: when `selector.weights` is missing or belongs to another policy.
            DataError: when the effective sample size of that policy on the log is too small.
        """
        self._environment = config.environment
        assert config.feedback is not None
        self._settings = config.feedback
        self._min_ess = min_ess
        self._train = data.train
        self._held_back = data.held_back
        self._workers = workers
        self._baseline = float(data.train.rewards_Q.mean())
        self._warned = False
        self._schedule = logged_schedule(config, len(data.train))
        self.num_steps = self._schedule.num_steps
        self.policy: TrainablePolicy = open_policy(config, data.train.candidates)
        self._optimiser = Optimiser(
            dict(self.policy.named_parameters()),
            config.training.learning_rate,
            config.training.warmup_steps,
            self.num_steps,
            workers,
            "lower training.learning_rate, or look for extreme propensities in the log",
        )
        if self._held_back is not None:
            self._check_overlap(self._held_back)

    def asks_generator(self, step: int) -> bool:
        """Never: the log has the rewards."""
        return False

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """One optimiser step on a batch; metrics are those before the step.

        `ess` is the effective sample size of the batch, `mean_ratio` is about 1 where propensities
        are right and the policies overlap.

        Raises:
            NonFiniteLossError: when the gradient is not finite.
        """
        started = time.monotonic()
        rows = self._schedule.rows(step)
        mine = rows[self._workers.rank :: self._workers.size]
        behaviour_B = torch.from_numpy(self._train.propensity_logp_Q[mine])
        rewards_B = torch.from_numpy(self._train.rewards_Q[mine])
        logp_B = self._log_prob(self._train, mine).cpu().double()
        losses_B = off_policy.off_policy_losses(
            logp_B, behaviour_B, rewards_B, self._baseline, self._settings.max_ratio
        )
        self._optimiser.zero_grad()
        (losses_B.sum() / len(rows)).backward()
        norm, rate = self._optimiser.step(step)
        ratios_B = off_policy.importance_ratios(logp_B, behaviour_B)
        sums = [
            losses_B.detach().sum(),
            ratios_B.sum(),
            ratios_B.square().sum(),
            (ratios_B > self._settings.max_ratio).double().sum(),
        ]
        loss, total, square, num_capped = self._workers.sum(torch.stack(sums)).tolist()
        return {
            "epoch": self._schedule.epoch(step + 1),
            "loss": loss / len(rows),
            "ess": total**2 / square if square else 0.0,
            "mean_ratio": total / len(rows),
            "capped_share": num_capped / len(rows),
            "grad_norm": norm,
            "learning_rate": rate,
            "generator_tokens_spent": 0.0,
            "generator_tokens_saved": 0.0,
            "learn_s": time.monotonic() - started,
        }

    def validate(self, step: int) -> Metrics:
        """Off-policy estimates on the held-back selections, by `off_policy.snips`.

        `validation/score` is the lower end of the interval, or minus infinity where the effective
        sample size is below `min_ess`: such an interval is not to be trusted.
        """
        part = self._held_back
        if part is None:
            return {}
        behaviour_Q = torch.from_numpy(part.propensity_logp_Q)
        rewards_Q = torch.from_numpy(part.rewards_Q)
        greedy = play_greedy(self._environment, self.policy, part.candidates)
        matches_Q = are_equal(greedy.actions_ET, part.actions_QT)
        certain_Q = torch.from_numpy(np.where(matches_Q, 0.0, -np.inf))
        metrics: Metrics = {}
        for name, logp_Q in (("", self._log_probs(part)), ("greedy_", certain_Q)):
            ratios_Q = off_policy.importance_ratios(logp_Q, behaviour_Q)
            found = off_policy.snips(ratios_Q, rewards_Q, CONFIDENCE, part.questions_Q)
            metrics |= {
                f"validation/{name}value": found.value,
                f"validation/{name}value_low": found.low,
                f"validation/{name}value_high": found.high,
                f"validation/{name}ess": off_policy.effective_sample_size(ratios_Q),
                f"validation/{name}mean_ratio": ratios_Q.mean().item(),
            }
        trusted = metrics["validation/ess"] >= self._min_ess
        if not trusted:
            self._warn(step, metrics["validation/ess"])
        metrics["validation/score"] = metrics["validation/value_low"] if trusted else -math.inf
        return metrics

    def _check_overlap(self, part: LoggedPart) -> None:
        ratios_Q = off_policy.importance_ratios(
            self._log_probs(part), torch.from_numpy(part.propensity_logp_Q)
        )
        ess, limit = off_policy.effective_sample_size(ratios_Q), self._min_ess
        if ess < limit:
            raise DataError(
                f"the effective sample size of the starting policy is {ess:.1f} on {len(part):,} "
                f"held-out selections, below {limit:g}; start from the served policy "
                "(selector.weights), log more selections, or serve with a higher "
                "feedback.explore_share"
            )

    def _warn(self, step: int, ess: float) -> None:
        """Say once that the policy left what the log knows."""
        if not self._warned and self._workers.rank == 0:
            logger.warning(
                "after step %d the effective sample size of the held-back selections is %.1f, "
                "below %g: the policy is too far from the logged one, and this checkpoint "
                "cannot become the best; lower training.learning_rate or algorithm.num_epochs, "
                "or log more selections",
                step,
                ess,
                self._min_ess,
            )
            self._warned = True

    def _log_probs(self, part: LoggedPart) -> torch.Tensor:
        """Of all selections of a part, in nats; each worker computes a share of them."""
        logp_Q = torch.zeros(len(part), dtype=torch.float64)
        mine = np.arange(self._workers.rank, len(part), self._workers.size)
        with torch.no_grad():
            for start in range(0, len(mine), _CHUNK):
                rows = mine[start : start + _CHUNK]
                logp_Q[rows] = self._log_prob(part, rows).cpu().double()
        return self._workers.sum(logp_Q)

    def _log_prob(self, part: LoggedPart, rows: np.ndarray) -> torch.Tensor:
        """Log-probabilities of logged selections, shape (B,), with gradient."""
        trajectories = replay(self._environment, part.candidates, rows, part.actions_QT[rows])
        return self.policy.log_prob(trajectories).sum(dim=1)

    def tensors(self) -> Files:
        """The policy's weights and its optimiser."""
        return {
            "policy": copy.copy(self.policy.state_dict()),
            "optimizer": self._optimiser.tensors(),
        }

    def load(self, files: Files) -> None:
        """Take over the weights and, where it is given, the optimiser's state."""
        restore_weights(self.policy, files["policy"], "the policy of the checkpoint")
        if "optimizer" in files:
            self._optimiser.load(files["optimizer"])


def logged_schedule(config: RunConfig, num_selections: int) -> BatchSchedule:
    """The batches of a run: shuffled passes over the logged selections."""
    assert config.feedback is not None
    training = config.training.model_copy(update={"num_epochs": config.feedback.num_epochs})
    return BatchSchedule(training, DROConfig(), num_selections, config.seed)
