"""The training loop: steps, validation, checkpoints and metrics.

    for step in range(num_steps):
        step      what the trainer does on this step (`trainer.Trainer`)
        validate  now and then
        record    metrics.jsonl; now and then a checkpoint

The loop does not know who launched it: one process, or one of several Ray Train workers. What a
step does depends on the weights and its number alone, so a run that was stopped at any moment
continues from its last checkpoint to the same weights as one that never stopped. A run that is
asked to stop, `preemption`, ends between two steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import torch

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError, PreemptedError
from rlrag.runs.alarms import Alarms
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.runs.forking import starting_weights
from rlrag.runs.profiling import StepProfiler
from rlrag.runs.watchdog import Watchdog, under_way
from rlrag.training.distributed.workers import Workers
from rlrag.training.trainer import Metrics, Trainer

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    validations_since_best: int = 0
    generator_tokens: int = 0
    finished: bool = False


class TrainingLoop(Generic[AnyTrainer]):
    """One worker's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        trainer: AnyTrainer,
        run_dir: RunDirectory,
        workers: Workers,
        on_step: Callable[[Metrics], None] = lambda metrics: None,
    ) -> None:
        self._run_config = config
        self._config = config.training
        self._run_dir = run_dir
        self._workers = workers
        self._on_step = on_step
        self._store = CheckpointStore(run_dir.checkpoints)
        self._alarms = Alarms(config)
        profiled = self._config.profiled_steps if workers.rank == 0 else range(0)
        self._profiler = StepProfiler(profiled, run_dir)
        self._last_pause = 0
        self._saved_step = 0
        self._is_whole = True
        self._damaged: tuple[str, ...] = ()
        self.trainer = trainer
        self.progress = Progress()

    def run(self) -> AnyTrainer:
        """Train to the end and return the trainer with the weights of the best validation.

        Raises:
            RlragError: when a batch fails beyond what the configuration allows; the checkpoints
                that were written stay.
            PreemptedError: when the run was asked to stop.
        """
        with Watchdog("the beginning of the run"):
            self._resume()
            try:
                while not self.progress.finished:
                    self._stop_if_asked()
                    with self._profiler.step(self.progress.step + 1):
                        self._step()
            finally:
                self.trainer.close()
            self.trainer.load(self._store.load(self.progress.best_step)[0])
        return self.trainer

    def _resume(self) -> None:
        """Continue from the newest checkpoint, or record where the untrained weights stand."""
        newest = self._store.load_newest() if self._workers.rank == 0 else None
        # What one has found out, and renamed, goes for all; shared storage may show it later.
        mine = 0 if self._workers.rank else -1 if newest is None else newest.step
        step = int(self._workers.sum(torch.tensor(mine)).item())
        if step >= 0:
            files, state = (newest.files, newest.state) if newest else self._store.load(step)
            self._damaged = newest.damaged if newest else ()
            self.progress = Progress(**state)
            self._last_pause = self._saved_step = self.progress.step
            if self._workers.rank == 0:
                self._run_dir.check_records(self.progress.step)
                self._run_dir.truncate_metrics(self.progress.step)
                self._alarms.replay(self._run_dir.read_metrics())
            self._workers.barrier()
            self.trainer.resume(self.progress.step, files, self._store.load(0)[0])
            return
        if self._workers.rank == 0:
            self._run_dir.truncate_metrics(-1)
        self._start()
        before = self.trainer.before
        self.progress.generator_tokens = before.num_tokens
        metrics: Metrics = {
            "step": 0,
            "epoch": 0.0,
            "generator_tokens_total": float(before.num_tokens),
        }
        if before.seconds:
            metrics["judge_s"] = before.seconds
        if before.failures:
            metrics["failures"] = list(before.failures)
        metrics |= before.prompts
        self._validate(metrics)
        self._record(metrics)
        self._save()

    def _start(self) -> None:
        """Bring the untrained weights to where step 0 stands.

        Raises:
            ConfigError: when the weights to start from do not fit.
        """
        if self._config.start_from is None:
            self.trainer.warm_start()
            return
        weights = starting_weights(self._run_config)
        try:
            self.trainer.resume(0, weights, weights)
        except CheckpointError as error:
            raise ConfigError(
                f"training.start_from {self._config.start_from} does not fit: {error}"
            ) from error

    def _stop_if_asked(self) -> None:
        """End between two steps, all workers together, with a checkpoint where one may stand.

        In the middle of an E-step, or with a batch that ran ahead, the steps since the last
        checkpoint are dropped: a resumed run would draw other selections than an undisturbed one.
        """
        asked = self._workers.rank == 0 and self._run_dir.stop_is_asked()
        if not self._workers.sum(torch.tensor(float(asked))).item():
            return
        step = self.progress.step
        if step > self._saved_step and self._is_whole:
            self._save()
        raise PreemptedError(
            f"preempted after step {step}, with a checkpoint of step {self._saved_step}; run the "
            "same command to continue"
        )

    def _step(self) -> None:
        step = self.progress.step
        under_way(f"step {step + 1}")
        metrics: Metrics = {"step": step + 1}
        pauses_after = self._pauses_after(step)
        metrics |= self.trainer.step(step, pauses_after)
        trained_at = time.monotonic()
        self.progress.step = step + 1
        self.progress.generator_tokens += int(
            metrics["generator_tokens_spent"] + metrics["generator_tokens_saved"]
        )
        self.progress.finished = self.progress.step >= self.trainer.num_steps or (
            self._spent_all()
            and self.trainer.may_pause(self.progress.step)
            and self.trainer.asks_generator(self.progress.step)
        )
        improved = self._due(self._config.validate_every) and self._validate(metrics)
        metrics |= {
            "generator_tokens_total": float(self.progress.generator_tokens),
            "validate_s": time.monotonic() - trained_at,
        }
        self._record(metrics)
        if improved or self._due(self._config.checkpoint_every):
            self._save()
        may_pause = self.trainer.may_pause(self.progress.step)
        if may_pause:
            self._last_pause = self.progress.step
        self._is_whole = may_pause and (pauses_after or not self._run_config.dro.overlap)

    def _spent_all(self) -> bool:
        limit = self._config.max_generator_tokens
        return limit is not None and self.progress.generator_tokens >= limit

    def _due(self, every: int) -> bool:
        """Whether something that comes every so many steps comes now."""
        return self.progress.finished or self._reaches(self.progress.step, every)

    def _reaches(self, step: int, every: int) -> bool:
        return self.trainer.may_pause(step) and step // every > self._last_pause // every

    def _pauses_after(self, step: int) -> bool:
        """An improvement saves a checkpoint too, but only after a validation."""
        return any(
            self._reaches(step + 1, every)
            for every in (self._config.validate_every, self._config.checkpoint_every)
        )

    def _validate(self, metrics: Metrics) -> bool:
        """Add validation metrics; True when the weights are the best so far."""
        under_way(f"the validation after step {self.progress.step}")
        found = self.trainer.validate(self.progress.step)
        if not found:
            return self.progress.finished
        metrics |= found
        score, best = found[self.trainer.best_by], self.progress.best_score
        if best is None or score > best:
            self.progress.best_score = score
            self.progress.best_step = self.progress.step
            self.progress.validations_since_best = 0
            return True
        self.progress.validations_since_best += 1
        patience = self._config.patience
        if patience is not None and self.progress.validations_since_best >= patience:
            self.progress.finished = True
        return False

    def _save(self) -> None:
        under_way(f"the checkpoint after step {self.progress.step}")
        if self.progress.best_score is None:  # nothing tells better from worse
            self.progress.best_step = self.progress.step
        files = self.trainer.tensors()  # every worker: sharded tensors are gathered together
        if self._workers.rank == 0:
            self._store.save(self.progress.step, files, asdict(self.progress))
            self._store.keep(
                self._config.keep_checkpoints, self.progress.best_step, self._config.keep_every
            )
        self._saved_step = self.progress.step
        self._workers.barrier()

    def _record(self, metrics: Metrics) -> None:
        if self._workers.rank == 0:
            raised = {alarm.name: alarm.text for alarm in self._alarms.update(metrics)}
            if self._damaged:
                raised["damaged_checkpoint"] = "; ".join(self._damaged)
                self._damaged = ()
            if raised:
                metrics["alarms"] = raised
            self._run_dir.append_metrics(metrics)
        self._on_step(metrics)
