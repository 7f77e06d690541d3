"""What an environment steps: B episodes side by side, and the rules that change them.

The scalar and the vector environment hold a simulation and give it Gymnasium's form; what kind of
episode it plays is the simulation's own. Shape letters: B episodes, A actions, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from gymnasium import spaces

from rlrag.environment import transitions
from rlrag.environment.rendering import draw_episode, render_episode
from rlrag.environment.task import EpisodeTexts, Outcome, SelectionTask


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did to B episodes, each array bool of shape (B,).

    `ended_B` are those that this step ended, `cut_B` those among them that a limit ended, and
    `valid_B` those whose action was allowed. `changed_B` are those with other texts than before.
    """

    ended_B: np.ndarray
    cut_B: np.ndarray
    valid_B: np.ndarray
    changed_B: np.ndarray


class Simulation(Protocol):
    """B episodes; the last action is the stop, the one that is allowed once they are over."""

    action_space: spaces.Discrete
    observation_space: spaces.Dict
    num_questions: int

    @property
    def texts(self) -> Sequence[EpisodeTexts]:
        """Of each episode; empty before the first `begin`."""
        ...

    @property
    def over_B(self) -> np.ndarray:
        """Episodes that are over, bool of shape (B,)."""
        ...

    def begin(self, where_B: np.ndarray, question_rows: np.ndarray) -> None:
        """Start the episodes in `where_B`, on these questions in their order."""
        ...

    def advance(self, actions_B: np.ndarray, acting_B: np.ndarray) -> Advance:
        """Apply an action to each episode in `acting_B`, none of which is over."""
        ...

    def conclude(self, rows: Sequence[int], valid: Sequence[bool]) -> list[Outcome]:
        """How these episodes ended: one call of the reward for all that ended validly."""
        ...

    def observe(self) -> dict[str, np.ndarray]:
        """Batched observations, in new arrays."""
        ...

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed: bool of shape (B, A)."""
        ...

    def rendered(self, row: int, mode: str, outcome: Outcome | None) -> str | np.ndarray:
        """An episode as text or as a picture."""
        ...


class SelectionSimulation:
    """Episodes of document selection: candidates that stay as they are."""

    def __init__(self, task: SelectionTask, num_episodes: int) -> None:
        self._task = task
        self.action_space = task.action_space
        self.observation_space = task.observation_space
        self.num_questions = len(task.candidates)
        self.texts: list[EpisodeTexts] = []
        self._episodes = task.start(num_episodes)
        self._features: dict[str, np.ndarray] = {}
        self._unchanged_B = np.zeros(num_episodes, dtype=np.bool_)

    @property
    def over_B(self) -> np.ndarray:
        """See `Simulation.over_B`."""
        return self._episodes.over_B

    def begin(self, where_B: np.ndarray, question_rows: np.ndarray) -> None:
        """See `Simulation.begin`."""
        # Samples of one question share its texts, which are looked up once.
        texts_of = {row: self._task.texts(row) for row in set(question_rows.tolist())}
        fresh = [texts_of[row] for row in question_rows.tolist()]
        features = self._task.features(question_rows)
        if where_B.all():
            self.texts, self._features = fresh, features
        else:
            for i, texts in zip(np.flatnonzero(where_B).tolist(), fresh, strict=True):
                self.texts[i] = texts
            for name, array in features.items():
                self._features[name][where_B] = array
        self._episodes = transitions.restart(self._episodes, where_B)

    def advance(self, actions_B: np.ndarray, acting_B: np.ndarray) -> Advance:
        """See `Simulation.advance`."""
        self._episodes, ended_B, valid_B = transitions.advance(self._episodes, actions_B, acting_B)
        never_B = self._unchanged_B
        return Advance(ended_B, cut_B=never_B, valid_B=valid_B, changed_B=never_B)

    def conclude(self, rows: Sequence[int], valid: Sequence[bool]) -> list[Outcome]:
        """See `Simulation.conclude`."""
        selections = [self._episodes.selection(row) for row in rows]
        return self._task.conclude([self.texts[row] for row in rows], selections, valid)

    def observe(self) -> dict[str, np.ndarray]:
        """See `Simulation.observe`."""
        return self._task.observe(self._features, self._episodes)

    def action_masks(self) -> np.ndarray:
        """See `Simulation.action_masks`."""
        return transitions.action_masks(self._episodes)

    def rendered(self, row: int, mode: str, outcome: Outcome | None) -> str | np.ndarray:
        """See `Simulation.rendered`."""
        selection, most = self._episodes.selection(row), self._task.num_selected
        texts = self.texts[row]
        if mode == "rgb_array":
            return draw_episode(selection, len(texts.passages), most, outcome)
        return render_episode(texts, selection, most, outcome)
