"""A seed and a step number in; the questions of that step and the seeds of their draws out.

Nothing here has a state: what a step sees depends on the seed and its number alone, so a resumed
run sees what an undisturbed one would have, and any number of workers share the same batch.
"""

from __future__ import annotations

import numpy as np

from rlrag.config import TrainingConfig


class BatchSchedule:
    """Batches of equal size from an endless stream of shuffled passes over the questions.

    Example:
        >>> schedule = BatchSchedule(TrainingConfig(batch_size=2, num_epochs=2), 3, seed=0)
        >>> seen = [int(row) for step in range(schedule.num_steps) for row in schedule.rows(step)]
        >>> schedule.num_steps, sorted(seen)
        (3, [0, 0, 1, 1, 2, 2])
    """

    def __init__(self, config: TrainingConfig, num_questions: int, seed: int) -> None:
        self._batch_size = config.batch_size
        self._num_questions = num_questions
        self._seed = seed
        self.num_steps = max(1, config.num_epochs * num_questions // config.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the questions of a step, int64 of length batch_size."""
        start = step * self._batch_size
        places = np.arange(start, start + self._batch_size)
        passes, within = np.divmod(places, self._num_questions)
        orders = {p: self._order(p) for p in np.unique(passes)}
        return np.array([orders[p][i] for p, i in zip(passes, within, strict=True)])

    def epoch(self, step: int) -> float:
        """Passes over the questions finished before a step."""
        return step * self._batch_size / self._num_questions

    def sampling_seed(self, step: int, place: int) -> list[int]:
        """Seed of the draws for the question at `place` of a step's batch."""
        return [self._seed, 1, step, place]

    def _order(self, number: int) -> np.ndarray:
        return np.random.default_rng([self._seed, 0, int(number)]).permutation(self._num_questions)
