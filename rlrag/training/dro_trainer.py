"""The DRO trainer: selector and generator.

    E-step    policy draws m selections a question; the environment plays and rewards them
    M-step    importance weights; loss, shared gradient and one optimiser step of each part

The policy that draws and the generator that rewards are renewed when an E-step begins, so that all
samples of an E-step come from one version of each. Validations and checkpoints stand between
E-steps.
"""

from __future__ import annotations

import time

from rlrag.config import RunConfig
from rlrag.evaluation.systems import judged_by_reward
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import TrainingData
from rlrag.rewards.answering import AnsweringReward
from rlrag.training.collection import Collection
from rlrag.training.experience_log import ExperienceLog
from rlrag.training.generator_model import TrainableGenerator
from rlrag.training.loop import Before, Files, Metrics
from rlrag.training.parts import TrainedParts
from rlrag.training.schedule import BatchSchedule
from rlrag.training.validation import validate
from rlrag.training.watchdog import under_way
from rlrag.training.weighing import describe_experience, importance_weights
from rlrag.training.workers import Workers


class DROTrainer:
    """Direct Retrieval-augmented Optimization (arXiv 2505.03075); implements `loop.Trainer`.

    With `training.objective` `sft` the same steps fine-tune the generator on the untrained
    policy's own order.
    """

    before = Before()

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        generator: Generator,
        prompts: PromptBuilder,
        reward: AnsweringReward,
        workers: Workers,
        log: ExperienceLog | None = None,
    ) -> None:
        self._config = config
        self._log = log
        self._validation = data.validation
        self._by_reward = data.validation is not None and judged_by_reward(config, data.validation)
        self.best_by = "validation/reward" if self._by_reward else "validation/f1"
        self._reward = reward
        self._workers = workers
        self._schedule = BatchSchedule(config.training, config.dro, len(data.train), config.seed)
        self.parts = TrainedParts(config, data, prompts, self._schedule, workers)
        self._collection = Collection(
            config, data.train, reward, generator, self.parts, self._schedule, workers
        )

    @property
    def generator(self) -> TrainableGenerator | None:
        """The generator that learns, where it does."""
        return self.parts.generator

    @property
    def num_steps(self) -> int:
        """Batches times passes."""
        return self._schedule.num_steps

    def may_pause(self, step: int) -> bool:
        """Between two E-steps."""
        return step == self._schedule.num_steps or self._schedule.starts_estep(step)

    def asks_generator(self, step: int) -> bool:
        """Always: selections are rewarded by what it answers."""
        return True

    def warm_start(self) -> None:
        """Bring a policy that starts anywhere to the retriever's order, where configured."""
        self.parts.warm_start()

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Collect a batch and train every part on it."""
        started = time.monotonic()
        experience, collected = self._collection.collect(step, pauses_after)
        collected_at = time.monotonic()
        under_way(f"learning in step {step + 1}")
        if self._log is not None:
            self._log.append(step, experience)
        metrics: Metrics = {"epoch": self._schedule.epoch(step + 1)}
        weights_BM = importance_weights(experience, self._config.dro)
        if self._config.training.objective == "dro":
            metrics |= describe_experience(
                experience, weights_BM, self._config.training, self._workers
            )
        metrics |= collected
        metrics |= self.parts.update(experience, weights_BM, step)
        return metrics | {
            "rollouts_per_s": metrics.get("num_rollouts", 0.0) / (collected_at - started),
            "collect_s": collected_at - started,
            "learn_s": time.monotonic() - collected_at,
        }

    def validate(self, step: int) -> Metrics:
        """The greedy policy's answers by the generator's present weights."""
        if self._validation is None:
            return {}
        self._collection.publish(self._schedule.estep(step))
        return validate(
            self._config.environment,
            self.parts.policy,
            self._validation,
            self._reward,
            self._workers,
            self._by_reward,
        )

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
