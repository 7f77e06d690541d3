"""The DRO trainer: trains selector and generator.

    E-step    policy draws m selections a question; the environment plays and rewards them
    M-step    importance weights; loss, shared gradient and one optimiser step of each part

The policy that draws and the generator that rewards are renewed when an E-step begins, so that all
samples of an E-step come from one version of each. Validations and checkpoints stand between
E-steps.
"""

from __future__ import annotations

import time

from rlrag.runs.watchdog import under_way
from rlrag.training.dro.batch import describe_batch, importance_weights
from rlrag.training.dro.e_step import Collection
from rlrag.training.dro.experience_log import ExperienceLog
from rlrag.training.parts import TrainedParts
from rlrag.training.trainer import Files, Metrics, Trainer, TrainerContext


class DROTrainer(Trainer):
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075).

    With `algorithm.name` `sft` the same steps fine-tune the generator on the untrained
    policy's own order.
    """

    def __init__(self, context: TrainerContext) -> None:
        self._context = context
        self._config = config = context.config
        self.best_by = context.best_by
        self._log: ExperienceLog | None = None
        if config.training.log_experience:
            place = context.run_dir.experience
            self._log = ExperienceLog(place, context.workers, context.data.train)
        self._schedule = context.schedule
        self.num_steps = self._schedule.num_steps
        self.parts = TrainedParts(
            config, context.data, context.prompts, self._schedule, context.workers
        )
        self.generator = self.parts.generator
        self._collection = Collection(
            config,
            context.data.train,
            context.reward,
            context.generator,
            self.parts,
            self._schedule,
            context.workers,
        )

    def may_pause(self, step: int) -> bool:
        """Between two E-steps."""
        return step == self._schedule.num_steps or self._schedule.starts_estep(step)

    def warm_start(self) -> None:
        """Bring a policy that starts anywhere to the retriever's order, where configured."""
        self.parts.warm_start()

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Collect a batch and train every part on it."""
        started = time.monotonic()
        batch, collected = self._collection.collect(step, pauses_after)
        collected_at = time.monotonic()
        under_way(f"learning in step {step + 1}")
        if self._log is not None:
            self._log.append(step, batch)
        metrics: Metrics = {"epoch": self._schedule.epoch(step + 1)}
        weights_BM = importance_weights(batch, self._config.dro)
        if self._config.algorithm.name != "sft":
            metrics |= describe_batch(
                batch, weights_BM, self._config.training, self._context.workers
            )
        metrics |= collected
        metrics |= self.parts.update(batch, weights_BM, step)
        return metrics | {
            "rollouts_per_s": metrics.get("num_rollouts", 0.0) / (collected_at - started),
            "collect_s": collected_at - started,
            "learn_s": time.monotonic() - collected_at,
        }

    def validate(self, step: int) -> Metrics:
        """The greedy policy's answers by the generator's present weights."""
        if self._context.data.validation is not None:
            self._collection.publish(self._schedule.estep(step))
        return self._context.validate(self.parts.policy)

    def tensors(self) -> Files:
        """Weights and optimisers of every part."""
        return self.parts.tensors()

    def load(self, files: Files) -> None:
        """Take over weights and optimisers."""
        self.parts.load(files)

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Continue; engines that outlived an earlier worker get the checkpoint's weights."""
        if self._log is not None:
            self._log.truncate(step)
        self.parts.load(files)
        self.parts.load_initial(first)
        self._collection.publish(self._schedule.estep(step), again=True)

    def close(self) -> None:
        """Wait for a batch that runs ahead and close the environment."""
        self._collection.close()
