"""Opened parts and a run directory in; trained parts, their checkpoints and metrics out.

    for step in schedule:
        E-step    policy draws m selections a question; the environment plays and rewards them
        M-step    importance weights; loss, shared gradient and one optimiser step of each part
        record    metrics.jsonl; now and then validation and a checkpoint

The policy that draws and the generator that rewards are renewed when an E-step begins, so that all
samples of an E-step come from one version of each. Validations and checkpoints stand between
E-steps.

The loop does not know who launched it: one process, or one of several Ray Train workers. What a
step does depends on the weights and its number alone, so a run that was stopped at any moment
continues from its last checkpoint to the same weights as one that never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rlrag.config import RunConfig
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import TrainingData
from rlrag.rewards.answering import AnsweringReward
from rlrag.training.alarms import Alarms
from rlrag.training.checkpoints import CheckpointStore
from rlrag.training.collection import Collection
from rlrag.training.parts import TrainedParts
from rlrag.training.run_directory import RunDirectory
from rlrag.training.schedule import BatchSchedule
from rlrag.training.validation import validate
from rlrag.training.weighing import describe_experience, importance_weights
from rlrag.training.workers import Workers

Metrics = dict[str, Any]


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_f1: float = -1.0
    validations_since_best: int = 0
    generator_tokens: int = 0
    finished: bool = False


class TrainingLoop:
    """One worker's part of a run; all workers hold the same weights at every step."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        generator: Generator,
        prompts: PromptBuilder,
        reward: AnsweringReward,
        run_dir: RunDirectory,
        workers: Workers,
        on_step: Callable[[Metrics], None] = lambda metrics: None,
    ) -> None:
        self._config = config
        self._data = data
        self._reward = reward
        self._run_dir = run_dir
        self._workers = workers
        self._on_step = on_step
        self._store = CheckpointStore(run_dir.checkpoints)
        self._schedule = BatchSchedule(config.training, config.dro, len(data.train), config.seed)
        self.parts = TrainedParts(config, data, prompts, self._schedule, workers)
        self._collection = Collection(
            config, data.train, reward, generator, self.parts, self._schedule, workers
        )
        self._alarms = Alarms(config)
        self._last_pause = 0
        self.progress = Progress()

    def run(self) -> TrainedParts:
        """Train to the end and return the parts with the best validation F1.

        Raises:
            RlragError: when a batch fails beyond what the configuration allows; the checkpoints
                that were written stay.
        """
        self._resume()
        try:
            while not self.progress.finished:
                self._step()
        finally:
            self._collection.close()
        self.parts.load(self._store.load(self.progress.best_step)[0])
        return self.parts

    def _resume(self) -> None:
        """Continue from the newest checkpoint, or record where the untrained parts stand."""
        steps = self._store.steps()
        self._workers.barrier()  # nobody writes before everybody has looked
        if steps:
            files, state = self._store.load(steps[-1])
            self.parts.load(files)
            self.parts.load_initial(self._store.load(0)[0])
            self.progress = Progress(**state)
            self._last_pause = self.progress.step
            if self._workers.rank == 0:
                self._run_dir.truncate_metrics(self.progress.step)
                self._alarms.replay(self._run_dir.read_metrics())
            self._workers.barrier()
            self._collection.publish(self._schedule.estep(self.progress.step), again=True)
            return
        if self._workers.rank == 0:
            self._run_dir.truncate_metrics(-1)
        self.parts.warm_start()
        metrics: Metrics = {"step": 0, "epoch": 0.0}
        self._validate(metrics)
        self._record(metrics)
        self._save()

    def _step(self) -> None:
        started, step = time.monotonic(), self.progress.step
        experience, collected = self._collection.collect(step, self._pauses_after(step))
        collected_at = time.monotonic()
        metrics: Metrics = {"step": step + 1, "epoch": self._schedule.epoch(step + 1)}
        weights_BM = importance_weights(experience, self._config.dro)
        if self._config.training.objective == "dro":
            metrics |= describe_experience(
                experience, weights_BM, self._config.training, self._workers
            )
        metrics |= collected
        metrics |= self.parts.update(experience, weights_BM, step)
        learned_at = time.monotonic()
        self.progress.step = step + 1
        self.progress.generator_tokens += int(
            collected["generator_tokens_spent"] + collected["generator_tokens_saved"]
        )
        limit = self._config.training.max_generator_tokens
        spent_all = limit is not None and self.progress.generator_tokens >= limit
        self.progress.finished = self.progress.step == self._schedule.num_steps or (
            spent_all and self._between_esteps(self.progress.step)
        )
        improved = self._due(self._config.training.validate_every) and self._validate(metrics)
        metrics |= {
            "generator_tokens_total": float(self.progress.generator_tokens),
            "rollouts_per_s": metrics.get("num_rollouts", 0.0) / (collected_at - started),
            "collect_s": collected_at - started,
            "learn_s": learned_at - collected_at,
            "validate_s": time.monotonic() - learned_at,
        }
        self._record(metrics)
        if improved or self._due(self._config.training.checkpoint_every):
            self._save()
        if self._between_esteps(self.progress.step):
            self._last_pause = self.progress.step

    def _between_esteps(self, step: int) -> bool:
        return step == self._schedule.num_steps or self._schedule.starts_estep(step)

    def _due(self, every: int) -> bool:
        """Whether something that comes every so many steps comes now, between two E-steps."""
        return self.progress.finished or self._reaches(self.progress.step, every)

    def _reaches(self, step: int, every: int) -> bool:
        return self._between_esteps(step) and step // every > self._last_pause // every

    def _pauses_after(self, step: int) -> bool:
        """Whether a validation or checkpoint follows this step, so that nothing runs ahead of it.

        An improvement saves a checkpoint too, but only after a validation.
        """
        training = self._config.training
        return any(
            self._reaches(step + 1, every)
            for every in (training.validate_every, training.checkpoint_every)
        )

    def _validate(self, metrics: Metrics) -> bool:
        """Add validation metrics; True when the parts are the best so far."""
        if self._data.validation is None:
            self.progress.best_step = self.progress.step
            return self.progress.finished
        self._collection.publish(self._schedule.estep(self.progress.step))
        found = validate(self.parts.policy, self._data.validation, self._reward, self._workers)
        metrics |= found
        if found["validation/f1"] > self.progress.best_f1:
            self.progress.best_f1 = found["validation/f1"]
            self.progress.best_step = self.progress.step
            self.progress.validations_since_best = 0
            return True
        self.progress.validations_since_best += 1
        patience = self._config.training.patience
        if patience is not None and self.progress.validations_since_best >= patience:
            self.progress.finished = True
        return False

    def _save(self) -> None:
        files = self.parts.tensors()  # every worker: sharded tensors are gathered together
        if self._workers.rank == 0:
            self._store.save(self.progress.step, files, asdict(self.progress))
            self._store.keep(self._config.training.keep_checkpoints, self.progress.best_step)
        self._workers.barrier()

    def _record(self, metrics: Metrics) -> None:
        if self._workers.rank == 0:
            raised = self._alarms.update(metrics)
            if raised:
                metrics["alarms"] = {alarm.name: alarm.text for alarm in raised}
            self._run_dir.append_metrics(metrics)
        self._on_step(metrics)
