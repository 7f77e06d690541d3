"""What stopping before each action of a path would have been worth.

The baseline `prefix` compares an action with it (`rlrag.algorithms.dro.prefix_coefficients`). The
paths are cut before the action and stopped there, in the same environment: with its costs, and with
prompts whose scores the generator's cache has wherever a path was cut there before.

Shape letters: E episodes, T actions of the longest one.
"""

from __future__ import annotations

import numpy as np

from rlrag.config import EnvironmentConfig
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Given, play
from rlrag.records import Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward


class StopRewards:
    """Rewards of the beginnings of paths.

    Args:
        config: Names an environment of this package, whose last action is the stop.
        candidates: The questions with their candidates.
        reward: Scores what paths end with, all of a batch in one call.
    """

    def __init__(
        self, config: EnvironmentConfig, candidates: CandidateTable, reward: SelectionReward
    ) -> None:
        self._config, self._candidates, self._reward = config, candidates, reward

    def of(self, trajectories: Trajectories) -> np.ndarray:
        """Rewards of stopping before each action, shape (E, T).

        NaN where stopping was not allowed, where there is no action, and where the reward could not
        be computed. Equal beginnings are played once.
        """
        place_of: dict[tuple[int, tuple[int, ...]], int] = {}
        places_ET = np.full(trajectories.actions_ET.shape, -1)
        for step, observations in enumerate(trajectories.observations):
            may_stop_E = observations["action_mask"][:, -1].astype(bool)
            for e in np.flatnonzero(trajectories.acts_ET[:, step] & may_stop_E).tolist():
                begun = tuple(trajectories.actions_ET[e, :step].tolist())
                key = int(trajectories.question_rows_E[e]), begun
                places_ET[e, step] = place_of.setdefault(key, len(place_of))
        if not place_of:
            return np.full(places_ET.shape, np.nan)
        stop = trajectories.observations[0]["action_mask"].shape[1] - 1
        longest = max(len(begun) for _, begun in place_of)
        actions_UT = np.full((len(place_of), longest + 1), stop)
        for place, (_, begun) in enumerate(place_of):
            actions_UT[place, : len(begun)] = begun
        rows_U = np.array([row for row, _ in place_of])
        episodes = open_episodes(self._config, len(rows_U), self._candidates, self._reward)
        try:
            rewards_U = play(episodes, Given(actions_UT), rows_U).rewards_E
        finally:
            episodes.close()
        return np.where(places_ET < 0, np.nan, rewards_U[places_ET])
