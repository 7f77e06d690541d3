"""Opened parts and a run directory in; a trained policy, its checkpoints and metrics out.

    for step in schedule:
        E-step    policy draws m selections a question; the environment plays and rewards them
        M-step    importance weights, loss, shared gradient, one optimiser step
        record    metrics.jsonl; now and then validation and a checkpoint

The loop does not know who launched it: one process, or one of several Ray Train workers. What a
step does depends on the weights and its number alone, so a run that was stopped at any moment
continues from its last checkpoint to the same weights as one that never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from rlrag.config import RunConfig
from rlrag.generation.protocol import Generator
from rlrag.pipeline import TrainingData, open_policy
from rlrag.rewards.answering import AnsweringReward
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.training.checkpoints import CheckpointStore
from rlrag.training.experience import ExperienceCollector
from rlrag.training.learner import SelectorLearner
from rlrag.training.run_directory import RunDirectory
from rlrag.training.schedule import BatchSchedule
from rlrag.training.validation import validate
from rlrag.training.workers import Workers

Metrics = dict[str, float]


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_f1: float = -1.0
    generator_tokens: int = 0
    finished: bool = False


class TrainingLoop:
    """One worker's part of a run; all workers hold the same weights at every step."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        generator: Generator,
        reward: AnsweringReward,
        run_dir: RunDirectory,
        workers: Workers,
        on_step: Callable[[Metrics], None] = lambda metrics: None,
    ) -> None:
        self._config = config
        self._data = data
        self._generator = generator
        self._reward = reward
        self._run_dir = run_dir
        self._workers = workers
        self._on_step = on_step
        self._store = CheckpointStore(run_dir.checkpoints)
        self._schedule = BatchSchedule(config.training, len(data.train), config.seed)
        self.policy: PlackettLucePolicy = open_policy(config, data.train)
        self._learner = SelectorLearner(
            self.policy,
            data.train,
            config.dro,
            config.training,
            self._schedule.num_steps,
            workers,
        )
        self._collector = ExperienceCollector(
            config.environment,
            data.train,
            reward,
            config.training.batch_size // workers.size,
            config.dro.num_samples,
        )
        self.progress = Progress()

    def run(self) -> PlackettLucePolicy:
        """Train to the end and return the policy with the best validation F1.

        Raises:
            RlragError: when a batch fails beyond what the configuration allows; the checkpoints
                that were written stay.
        """
        self._resume()
        while not self.progress.finished:
            self._step()
        self._collector.close()
        self._store.load_policy(self.progress.best_step, self.policy)
        return self.policy

    def _resume(self) -> None:
        """Continue from the newest checkpoint, or record where an untrained policy stands."""
        steps = self._store.steps()
        self._workers.barrier()  # nobody writes before everybody has looked
        if steps:
            state = self._store.load(steps[-1], self.policy, self._learner.optimizer)
            self.progress = Progress(**state)
            if self._workers.rank == 0:
                self._run_dir.truncate_metrics(self.progress.step)
            return
        if self._workers.rank == 0:
            self._run_dir.truncate_metrics(-1)
        metrics: Metrics = {"step": 0, "epoch": 0.0}
        self._validate(metrics)
        self._record(metrics)
        self._save()

    def _step(self) -> None:
        started, step = time.monotonic(), self.progress.step
        places = range(self._workers.rank, self._config.training.batch_size, self._workers.size)
        rows = self._schedule.rows(step)[places]
        seeds = [self._schedule.sampling_seed(step, place) for place in places]
        before = self._tokens()
        experience = self._collector.collect(self.policy, rows, seeds, version=step)
        collected = time.monotonic()
        metrics: Metrics = {"step": step + 1, "epoch": self._schedule.epoch(step + 1)}
        metrics |= self._learner.update(experience, step)
        learned = time.monotonic()
        spent, saved = (self._tokens() - before).tolist()
        self.progress.step = step + 1
        self.progress.generator_tokens += int(spent + saved)
        limit = self._config.training.max_generator_tokens
        spent_all = limit is not None and self.progress.generator_tokens >= limit
        self.progress.finished = spent_all or self.progress.step == self._schedule.num_steps
        improved = self._due(self._config.training.validate_every) and self._validate(metrics)
        metrics |= {
            "generator_tokens_spent": spent,
            "generator_tokens_saved": saved,
            "generator_tokens_total": float(self.progress.generator_tokens),
            "rollouts_per_s": metrics["num_rollouts"] / (collected - started),
            "collect_s": collected - started,
            "learn_s": learned - collected,
            "validate_s": time.monotonic() - learned,
        }
        self._record(metrics)
        if improved or self._due(self._config.training.checkpoint_every):
            self._save()

    def _due(self, every: int) -> bool:
        return self.progress.finished or self.progress.step % every == 0

    def _tokens(self) -> torch.Tensor:
        """Tokens spent and saved so far, over all workers."""
        count = self._generator.tokens
        return self._workers.sum(torch.tensor([count.spent, count.saved], dtype=torch.float64))

    def _validate(self, metrics: Metrics) -> bool:
        """Add validation metrics; True when the policy is the best so far."""
        if self._data.validation is None:
            self.progress.best_step = self.progress.step
            return self.progress.finished
        found = validate(self.policy, self._data.validation, self._reward, self._workers)
        metrics |= found
        if found["validation/f1"] <= self.progress.best_f1:
            return False
        self.progress.best_f1 = found["validation/f1"]
        self.progress.best_step = self.progress.step
        return True

    def _save(self) -> None:
        if self._workers.rank == 0:
            self._store.save(
                self.progress.step, self.policy, self._learner.optimizer, asdict(self.progress)
            )
            self._store.keep(self._config.training.keep_checkpoints, self.progress.best_step)
        self._workers.barrier()

    def _record(self, metrics: Metrics) -> None:
        if self._workers.rank == 0:
            self._run_dir.append_metrics(metrics)
        self._on_step(metrics)
