"""A trainer of your own, chosen by a flag: REINFORCE against the greedy selection's reward.

    python -m jobs.train factbook --algorithm.name examples.own_trainer:SelfCritical

This is self-critical training (Rennie et al., 2017). Shape letters: B questions, M samples.
"""

import torch

from rlrag.files.directories import restore_weights
from rlrag.pipeline import open_policy
from rlrag.selection.protocol import Draws
from rlrag.training.dro.batch import count_failures
from rlrag.training.learners.optimiser import Optimiser
from rlrag.training.trainer import Files, Metrics, Trainer, TrainerContext


class SelfCritical(Trainer):
    """Trains the selector; selections without a reward do not count."""

    def __init__(self, context: TrainerContext, num_samples: int = 4) -> None:
        self._context, self._num_samples = context, num_samples
        self.num_steps, self.best_by = context.schedule.num_steps, context.best_by
        self.policy = open_policy(context.config, context.data.train)
        training = context.config.training
        self._optimiser = Optimiser(
            dict(self.policy.named_parameters()),
            training.learning_rate,
            training.warmup_steps,
            self.num_steps,
            context.workers,
            "lower training.learning_rate",
        )

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Draw selections of this worker's questions and follow their rewards."""
        context, training = self._context, self._context.config.training
        rows, seeds = context.schedule.share(step, context.workers)
        drawn = context.play(self.policy, rows, Draws(seeds, self._num_samples))
        best = context.play(self.policy, rows)
        rewards_BM = torch.from_numpy(drawn.rewards_E).view(len(rows), -1)
        advantages_BM = (rewards_BM - torch.from_numpy(best.rewards_E)[:, None]).nan_to_num(0.0)
        logp_BM = self.policy.log_prob(drawn).sum(dim=1).view(len(rows), -1)
        loss = -(advantages_BM * logp_BM).mean(dim=1).sum() / training.batch_size
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step(step)
        failures = count_failures((*drawn.errors, *best.errors), training, context.workers)
        return {"loss": context.workers.sum(loss).item(), **failures}

    def validate(self, step: int) -> Metrics:
        """Answers from the policy's best selections for the held-back questions."""
        return self._context.validate(self.policy)

    def tensors(self) -> Files:
        """The policy's weights, of which the bundle is made, and the optimiser."""
        return {"policy": self.policy.state_dict(), "optimizer": self._optimiser.tensors()}

    def load(self, files: Files) -> None:
        """Take over both; of another run's checkpoint there is no optimiser."""
        restore_weights(self.policy, files["policy"], "the policy of the checkpoint")
        if "optimizer" in files:
            self._optimiser.load(files["optimizer"])
