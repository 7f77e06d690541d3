"""The scalar environment: one episode of a simulation, in Gymnasium's form."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from rlrag.environment.rendering import RENDER_MODES, check_render_mode
from rlrag.environment.simulation import Simulation
from rlrag.environment.task import Outcome, check_options
from rlrag.errors import ConfigError

_ONE = np.ones(1, dtype=np.bool_)


class SimulatedEnv(gymnasium.Env[dict[str, Any], np.int64]):
    """Steps a simulation of one episode.

    Args:
        simulation: Of one episode (B = 1).
        render_mode: None, `"ansi"` or `"rgb_array"`.
    """

    metadata = {  # noqa: RUF012  Gymnasium's own form
        "render_modes": [*RENDER_MODES],
        "render_fps": 4,
    }

    def __init__(self, simulation: Simulation, render_mode: str | None) -> None:
        check_render_mode(render_mode, self.metadata)
        self._simulation = simulation
        self.action_space = simulation.action_space
        self.observation_space = simulation.observation_space
        self.render_mode = render_mode
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode: of `options["question_row"]`, or of a question drawn at random.

        Raises:
            ConfigError: for an unknown option or a row that the table does not have.
        """
        row = check_options(options, known=("question_row",)).get("question_row")
        num_questions = self._simulation.num_questions
        if row is not None and not _is_row(row, num_questions):
            raise ConfigError(
                f"options['question_row'] is {row!r}; give an integer from 0 to {num_questions - 1}"
            )
        super().reset(seed=seed)
        row = int(self.np_random.integers(num_questions) if row is None else row)
        self._simulation.begin(_ONE, np.array([row]))
        self._outcome = None
        return self._observation(), self._info()

    def step(
        self, action: int | np.int64
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Apply an action; see the class for what each does, and one that is not allowed.

        Raises:
            ResetNeeded: before the first reset and after the end of an episode.
            InvalidAction: for something outside the action space.
            RlragError: the reward's own error, when it could not be computed.
        """
        if not self._simulation.texts or self._simulation.over_B[0]:
            raise ResetNeeded("the episode is over or has not begun; call reset() before step()")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action {action!r} is outside {self.action_space}")
        after = self._simulation.advance(np.array([int(action)]), _ONE)
        info = self._info()
        if not after.ended_B[0]:
            return self._observation(), 0.0, False, False, info
        [self._outcome] = self._simulation.conclude([0], [bool(after.valid_B[0])])
        if self._outcome.error is not None:
            raise self._outcome.error
        info |= self._outcome.info()
        return self._observation(), self._outcome.reward, True, bool(after.cut_B[0]), info

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now: bool, one an action."""
        return self._simulation.action_masks()[0]

    def render(self) -> str | np.ndarray | None:
        """The episode so far, as text or as a picture; None without a render mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs render_mode='ansi' or 'rgb_array' when the environment is created"
            )
            return None
        if not self._simulation.texts:
            raise ResetNeeded("there is no episode to show yet; call reset() before render()")
        return self._simulation.rendered(0, self.render_mode, self._outcome)

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in self._simulation.observe().items()}

    def _info(self) -> dict[str, Any]:
        return self._simulation.texts[0].info() | {"action_mask": self.action_masks()}


def _is_row(row: Any, num_questions: int) -> bool:
    is_integer = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
    return is_integer and 0 <= int(row) < num_questions
