"""The `Trainer` base class, which the training loop calls, and the context it is built from.

A trainer is a subclass of `Trainer` that is built from a `TrainerContext`, once on every worker. It
has `num_steps`, `step`, `tensors` and `load`; the other methods have what most trainers do. What a
step does may depend on the weights and its number alone: then a run that was stopped at any moment
continues from its last checkpoint to the same weights as one that never stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rlrag.config import RunConfig
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import play
from rlrag.evaluation.systems import judged_by_reward
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import Library, TrainingData, open_reward
from rlrag.records import Trajectories
from rlrag.rewards.answering import AnsweringReward
from rlrag.runs.directory import RunDirectory
from rlrag.selection.protocol import Draws, Policy
from rlrag.training.distributed.workers import Workers
from rlrag.training.learners.generator_model import TrainableGenerator
from rlrag.training.schedule import BatchSchedule
from rlrag.training.validation import validate

Metrics = dict[str, Any]
Files = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors of a checkpoint, by file and name."""


@dataclass(frozen=True)
class Before:
    """What was asked of the generator before the first step.

    Attributes:
        num_tokens: Of prompts and answers, computed or cached.
        seconds: How long that took.
        failures: Why parts of it could not be had.
        prompts: What the prompts left out, by `PromptCounts.shares`; empty where none was built.
    """

    num_tokens: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    prompts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerContext:
    """What a trainer is built from.

    Attributes:
        config: The whole run.
        workers: This worker's view of the group: its rank, sums over all.
        run_dir: Where the run keeps its files.
        library: The corpus and its retrievers.
        data: Candidates of the questions to train on and of those held back.
        generator: Answers and scores; counts the tokens.
        prompts: Builds what it is asked.
    """

    config: RunConfig
    workers: Workers
    run_dir: RunDirectory
    library: Library
    data: TrainingData
    generator: Generator
    prompts: PromptBuilder

    @cached_property
    def reward(self) -> AnsweringReward:
        """Answers from a selection, and rewards it by the configured functions."""
        return open_reward(self.config, self.generator, self.prompts)

    @cached_property
    def schedule(self) -> BatchSchedule:
        """The questions and the seeds of each step: shuffled passes over those of training."""
        config = self.config
        return BatchSchedule(config.training, config.dro, len(self.data.train), config.seed)

    def play(
        self, policy: Policy, question_rows: np.ndarray, draws: Draws | None = None
    ) -> Trajectories:
        """Rewarded episodes of training questions; see `rlrag.environment.rollout.play`."""
        num_episodes = len(question_rows) * (draws.num_samples if draws else 1)
        episodes = open_episodes(
            self.config.environment, num_episodes, self.data.train, self.reward
        )
        try:
            return play(episodes, policy, question_rows, draws)
        finally:
            episodes.close()

    @property
    def best_by(self) -> str:
        """The metric of `validate` that chooses the best checkpoint."""
        return "validation/reward" if self._by_reward else "validation/f1"

    def validate(self, policy: Policy) -> Metrics:
        """The greedy policy's answers to the held-back questions; empty where there are none."""
        if self.data.validation is None:
            return {}
        return validate(
            self.config.environment,
            policy,
            self.data.validation,
            self.reward,
            self.workers,
            self._by_reward,
        )

    def num_tokens(self) -> np.ndarray:
        """Tokens that this worker's generator computed and was saved so far, float64 (2,)."""
        return np.array([self.generator.tokens.spent, self.generator.tokens.saved], np.float64)

    @property
    def _by_reward(self) -> bool:
        validation = self.data.validation
        return validation is not None and judged_by_reward(self.config, validation)


class Trainer(ABC):
    """What one worker trains; all workers hold the same weights at every step."""

    num_steps: int
    """Steps of the whole run."""

    best_by: str
    """The validation metric whose highest value chooses the checkpoint that a run ends with; not
    read where `validate` gives none."""

    before = Before()
    """What was asked of the generator before the first step."""

    generator: TrainableGenerator | None = None
    """The generator that learns, where one does."""

    @abstractmethod
    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Do one step; returns numbers that describe it.

        Args:
            step: Its number, from 0.
            pauses_after: Whether a validation or checkpoint follows it, so that nothing may run
                ahead of it.
        """

    @abstractmethod
    def tensors(self) -> Files:
        """Everything that a checkpoint keeps; all workers call it together.

        The weights of each part that is trained are the file that `checkpoints.WEIGHTS` names.
        """

    @abstractmethod
    def load(self, files: Files) -> None:
        """Take over the weights and, where they are given, everything else of `tensors`."""

    def may_pause(self, step: int) -> bool:
        """Whether validation or a checkpoint may follow `step` finished steps: always."""
        return True

    def asks_generator(self, step: int) -> bool:
        """Whether the step of this number, from 0, spends tokens of the generator: always."""
        return True

    def warm_start(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring the untrained weights to where step 0 stands: they stay as they are."""

    def validate(self, step: int) -> Metrics:
        """Metrics on held-out questions after `step` finished steps; empty where there are none."""
        return {}

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Continue after `step` finished steps from a checkpoint; `first` is that of step 0."""
        self.load(files)

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Wait for what is on its way: nothing runs ahead."""
