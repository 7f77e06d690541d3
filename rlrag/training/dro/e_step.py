"""The E-step: samples selections and computes their rewards.

    begin of an E-step   the drawing policy is renewed; the trained generator's weights go to the
                         engines
    collect              episodes are drawn and rewarded
    run ahead            with `algorithm.overlap` the next batch is drawn while this one trains

Engines are never given new weights while a batch is on its way through them, so no batch mixes two
versions. Shape letters: B questions, M samples, K selected.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch

from rlrag.config import DROConfig, EnvironmentConfig, RunConfig
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import play, play_greedy
from rlrag.generation.prompts import shares_of
from rlrag.generation.protocol import Generator
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.build import TrainablePolicy
from rlrag.selection.protocol import Draws, Policy, Seed
from rlrag.training.distributed.engines import hand_over
from rlrag.training.distributed.workers import Workers
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.dro.stop_rewards import StopRewards
from rlrag.training.parts import TrainedParts
from rlrag.training.schedule import BatchSchedule


class _Drawn(NamedTuple):
    """A batch, the generator tokens that this worker computed and was saved for it, its prompts.

    These are counted by whoever draws the batch: beside the learner, a batch that runs ahead
    falls into one step or the next as the clock will have it.
    """

    batch: RewardedBatch
    num_tokens: np.ndarray
    prompt_counts: np.ndarray
    """Of `PromptCounts.values`."""


class Collection:
    """Draws the batches of one worker and keeps the engines' weights up to date."""

    def __init__(
        self,
        config: RunConfig,
        candidates: CandidateTable,
        reward: AnsweringReward,
        generator: Generator,
        parts: TrainedParts,
        schedule: BatchSchedule,
        workers: Workers,
    ) -> None:
        self._config = config
        self._candidates = candidates
        self._generator = generator
        self._parts = parts
        self._schedule = schedule
        self._workers = workers
        self._prompt_counts = reward.prompt_counts
        num_questions = len(range(workers.rank, config.training.batch_size, workers.size))
        self._collector = BatchCollector(
            config.environment, config.dro, candidates, reward, num_questions
        )
        self._published = 0
        self._drawing: TrainablePolicy | None = None
        self._drawing_version = 0
        self._ahead: Future[_Drawn] | None = None
        self._thread = ThreadPoolExecutor(1, "run-ahead") if config.dro.overlap else None

    def collect(self, step: int, pauses_after: bool) -> tuple[RewardedBatch, dict[str, float]]:
        """The batch of a step, and metrics about how it was collected; one step after another.

        Args:
            step: Number of the step.
            pauses_after: Whether a validation or checkpoint follows it; nothing is drawn ahead of
                one, so that a resumed run sees what an undisturbed one sees.
        """
        if self._config.algorithm.name == "sft":
            return self._own_order(step), {"num_rollouts": 0.0, **_described(torch.zeros(2))}
        ahead, self._ahead = self._ahead, None
        drawn = ahead.result() if ahead else None
        if self._drawing is None or self._schedule.starts_estep(step):
            self._drawing_version = self._schedule.estep(step)
            self.publish(self._drawing_version)
            self._drawing = self._policy_to_draw_with()
        if drawn is None:
            drawn = self._draw(step, self._drawing)
        if self._thread and not pauses_after and step + 1 < self._schedule.num_steps:
            self._ahead = self._thread.submit(self._draw, step + 1, self._drawing)
        tokens = self._workers.sum(torch.from_numpy(drawn.num_tokens))
        return drawn.batch, {
            "staleness": float(self._schedule.estep(step) - drawn.batch.policy_version),
            **_described(tokens),
            **shares_of(self._workers.sum(torch.from_numpy(drawn.prompt_counts)).numpy()),
        }

    def publish(self, version: int, again: bool = False) -> None:
        """Give the engines the trained generator's weights, if they have older ones.

        All workers call this together: one sends the weights, the others learn what to expect.

        Args:
            version: Number of the weights, the E-step that they belong to.
            again: Send them whatever was published; engines that outlived the worker of a resumed
                run hold those of a step that is undone.
        """
        if version == self._published and not again:
            return
        weights = self._parts.generator_weights(version)
        if weights is None:
            return
        if self._ahead is not None:  # of a run that ends early: nobody will ask for it
            wait([self._ahead])
        hand_over(weights, self._generator, self._workers)
        self._published = version

    def close(self) -> None:
        """Wait for what is on its way and close the environment."""
        if self._thread:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._collector.close()

    def _policy_to_draw_with(self) -> TrainablePolicy:
        """The policy itself where it does not change before the E-step ends, else a copy."""
        policy = self._parts.policy
        return policy if self._config.dro.on_policy and not self._thread else copy.deepcopy(policy)

    def _draw(self, step: int, policy: TrainablePolicy) -> _Drawn:
        tokens, prompts = self._tokens(), self._prompt_counts.values()
        batch = self._collector.collect(
            policy,
            *self._schedule.share(step, self._workers),
            policy_version=self._drawing_version,
            generator_version=self._generator.version,
        )
        return _Drawn(batch, self._tokens() - tokens, self._prompt_counts.values() - prompts)

    def _tokens(self) -> np.ndarray:
        """Tokens that this worker's generator computed and was saved so far."""
        return np.array([self._generator.tokens.spent, self._generator.tokens.saved], np.float64)

    def _own_order(self, step: int) -> RewardedBatch:
        """The untrained policy's best episode of each question, as one sample of weight 1."""
        rows, _ = self._schedule.share(step, self._workers)
        greedy = play_greedy(self._config.environment, self._parts.initial, self._candidates, rows)
        return RewardedBatch(greedy, 1, policy_version=0, generator_version=self._generator.version)


def _described(num_tokens: torch.Tensor) -> dict[str, float]:
    names = ("generator_tokens_spent", "generator_tokens_saved")
    return dict(zip(names, num_tokens.tolist(), strict=True))


class BatchCollector:
    """Plays batches of a fixed number of questions and samples.

    Args:
        config: Names the environment and the number of picks.
        dro: Episodes a question (M) and how they are drawn.
        candidates: The questions with their candidates.
        reward: Scores what episodes end with, all of a batch in one call.
        num_questions: Questions a batch (B), over this worker's share.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        dro: DROConfig,
        candidates: CandidateTable,
        reward: SelectionReward,
        num_questions: int,
    ) -> None:
        self._dro = dro
        self._stops = StopRewards(config, candidates, reward) if dro.baseline == "prefix" else None
        num_episodes = num_questions * dro.num_samples
        self._episodes = open_episodes(config, num_episodes, candidates, reward)

    def collect(
        self,
        policy: Policy,
        question_rows: np.ndarray,
        seeds: Sequence[Seed],
        policy_version: int,
        generator_version: int,
    ) -> RewardedBatch:
        """Play M episodes of each question.

        The versions are recorded, not checked: the caller holds the policy and the generator still.

        Raises:
            EpisodeError: when the environment or the policy break their contracts.
            RlragError: the first failure, when no reward of the whole batch could be computed.
        """
        dro = self._dro
        draws = Draws(seeds, dro.num_samples, dro.proposal_temperature, dro.replacement)
        trajectories = play(self._episodes, policy, question_rows, draws)
        stop_rewards_ET = self._stops.of(trajectories) if self._stops is not None else None
        batch = RewardedBatch(
            trajectories, dro.num_samples, policy_version, generator_version, stop_rewards_ET
        )
        if len(batch.errors) == len(trajectories):
            raise batch.errors[0]
        return batch

    def close(self) -> None:
        """Close the environment."""
        self._episodes.close()
