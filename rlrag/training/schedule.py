"""Chooses the questions and random seeds of each training step.

Nothing here has a state: what a step sees depends on the seed and its number alone, so a resumed
run sees what an undisturbed one would have, and any number of workers share the same batch.
"""

from __future__ import annotations

import numpy as np

from rlrag.config import DROConfig, RunConfig, TrainingConfig
from rlrag.errors import DataError
from rlrag.training.distributed.workers import Workers


class BatchSchedule:
    """Batches of equal size from an endless stream of shuffled passes over the questions.

    The batches are grouped into E-steps. The policy that draws and the generator that scores are
    those of the start of an E-step (`starts_estep`); `algorithm.passes` passes go over its batches
    with the same draws. One batch an E-step and one pass is on-policy training; one pass over
    all questions an E-step is the EM of the DRO paper.

    Example:
        >>> schedule = BatchSchedule(TrainingConfig(batch_size=2, num_epochs=2), DROConfig(), 3, 0)
        >>> seen = [int(row) for step in range(schedule.num_steps) for row in schedule.rows(step)]
        >>> schedule.num_steps, sorted(seen)
        (3, [0, 0, 1, 1, 2, 2])
    """

    def __init__(
        self, config: TrainingConfig, dro: DROConfig, num_questions: int, seed: int
    ) -> None:
        self.batch_size = config.batch_size
        self._num_questions = num_questions
        self._seed = seed
        self._passes = dro.passes
        self._num_batches = max(1, config.num_epochs * num_questions // config.batch_size)
        once = max(1, num_questions // config.batch_size)
        self._refresh_every = min(dro.refresh_every or once, self._num_batches)
        self._steps = self._refresh_every * self._passes  # of one E-step, except the last
        self.num_steps = self._num_batches * self._passes

    def starts_estep(self, step: int) -> bool:
        """Whether the drawing policy and the scoring generator are renewed before this step."""
        return step % self._steps == 0

    def estep(self, step: int) -> int:
        """Number of the E-step that a step belongs to, from 0; one more at the end of the run."""
        return -(-step // self._steps) if step >= self.num_steps else step // self._steps

    def rows(self, step: int) -> np.ndarray:
        """Rows of the questions of a step, int64 of length batch_size."""
        start = self._batch(step) * self.batch_size
        places = np.arange(start, start + self.batch_size)
        passes, within = np.divmod(places, self._num_questions)
        orders = {p: self._order(p) for p in np.unique(passes)}
        return np.array([orders[p][i] for p, i in zip(passes, within, strict=True)])

    def share(self, step: int, workers: Workers) -> tuple[np.ndarray, list[list[int]]]:
        """What a worker does of a step's batch: rows of its questions, seeds of their draws."""
        places = range(workers.rank, self.batch_size, workers.size)
        return self.rows(step)[places], [self.sampling_seed(step, place) for place in places]

    def epoch(self, step: int) -> float:
        """Passes over the questions whose samples were first seen before a step."""
        if step >= self.num_steps:
            return self._num_batches * self.batch_size / self._num_questions
        first = self.estep(step) * self._refresh_every
        seen = first + min(
            step - first * self._passes, self._refresh_every, self._num_batches - first
        )
        return seen * self.batch_size / self._num_questions

    def sampling_seed(self, step: int, place: int) -> list[int]:
        """Seed of the draws for the question at `place` of a step's batch."""
        return [self._seed, 1, self._batch(step), place]

    def _batch(self, step: int) -> int:
        """Number of a step's batch; the passes of an E-step go through the same ones."""
        first = self.estep(step) * self._refresh_every
        in_estep = min(self._refresh_every, self._num_batches - first)
        return first + (step - first * self._passes) % in_estep

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, int(number)]).permutation(self._num_questions)


def jsa_schedule(config: RunConfig, num_questions: int) -> BatchSchedule:
    """The batches of JSA, shuffled passes over the questions that have an answer.

    Raises:
        DataError: when they do not fill one batch.
    """
    if num_questions < config.training.batch_size:
        raise DataError(
            f"{num_questions} questions have a golden answer, fewer than training.batch_size "
            f"{config.training.batch_size}; algorithm.name jsa learns from answers: use more "
            "questions or a smaller batch"
        )
    return BatchSchedule(config.training, DROConfig(), num_questions, config.seed)


def openrag_schedule(config: RunConfig, num_questions: int) -> BatchSchedule:
    """The batches of OpenRAG's stages, one stream of shuffled passes over the usable questions."""
    total = config.openrag.offline_epochs + config.openrag.online_epochs
    values = {"num_epochs": total, "batch_size": openrag_batch_size(config, num_questions)}
    training = config.training.model_copy(update=values)
    return BatchSchedule(training, DROConfig(), num_questions, config.seed)


def openrag_batch_size(config: RunConfig, num_questions: int) -> int:
    """Questions of a step: no more than are usable, however many workers share them."""
    return min(config.training.batch_size, num_questions)


def num_offline_steps(config: RunConfig, num_questions: int) -> int:
    """Steps of OpenRAG before its online stage begins."""
    if "offline" not in config.openrag.stages:
        return 0
    schedule = openrag_schedule(config, num_questions)
    if "online" not in config.openrag.stages:
        return schedule.num_steps
    return config.openrag.offline_epochs * num_questions // schedule.batch_size
