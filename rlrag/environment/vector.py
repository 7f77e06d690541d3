"""The vector selection environment: many episodes in parallel, one reward call per step.

Shape letters: B sub-environments, N candidates, K selected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlrag.environment.rendering import RENDER_MODES, check_render_mode
from rlrag.environment.simulation import SelectionSimulation, Simulation
from rlrag.environment.task import (
    DEFAULT_INVALID_REWARD,
    DEFAULT_NUM_SELECTED,
    EpisodeTexts,
    Outcome,
    SelectionTask,
    check_options,
)
from rlrag.errors import ConfigError
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward

_StepResult = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


class SimulatedVectorEnv(VectorEnv[dict[str, np.ndarray], np.ndarray, np.ndarray]):
    """Steps a simulation of B episodes.

    Args:
        simulation: Of so many episodes.
        num_envs: Episodes (B).
        render_mode: None, `"ansi"` or `"rgb_array"`.
        autoreset_mode: An `AutoresetMode` or its value.
    """

    metadata = {  # noqa: RUF012  Gymnasium's own form; an instance has its own copy
        "render_modes": [*RENDER_MODES],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        simulation: Simulation,
        num_envs: int,
        render_mode: str | None,
        autoreset_mode: AutoresetMode | str,
    ) -> None:
        check_render_mode(render_mode, self.metadata)
        self._mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self._mode}
        self._simulation = simulation
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_action_space = simulation.action_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = simulation.observation_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._text_columns: dict[str, np.ndarray] = {}
        self._outcomes: list[Outcome | None] = [None] * num_envs

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start the episodes of all sub-environments, or of those in `options["reset_mask"]`.

        Raises:
            ConfigError: for an unknown option, or one of the wrong shape, type or range.
            ResetNeeded: for a mask that leaves out a sub-environment which has never begun.
        """
        chosen = check_options(options, known=("question_rows", "reset_mask"))
        where_B = self._checked_mask(chosen.get("reset_mask"))
        rows_B = self._checked_rows(chosen.get("question_rows"), where_B)
        super().reset(seed=seed)
        self._begin(where_B, rows_B)
        return self._simulation.observe(), self._infos(where_B)

    def step(self, actions: np.ndarray | Sequence[int]) -> _StepResult:
        """Apply one action to each sub-environment.

        Raises:
            ResetNeeded: before the first reset and, with autoreset disabled, for an action other
                than the stop on an episode that is over.
            InvalidAction: for actions of the wrong shape or outside the action space.
        """
        actions_B = self._checked_actions(actions)
        was_over_B = self._simulation.over_B
        after = self._simulation.advance(actions_B, ~was_over_B)
        self._renew_columns(after.changed_B)
        if self._mode is AutoresetMode.NEXT_STEP and was_over_B.any():
            self._begin(was_over_B)
        rewards_B = np.zeros(self.num_envs, dtype=np.float64)
        ended = np.flatnonzero(after.ended_B).tolist()
        outcomes = self._simulation.conclude(ended, after.valid_B[ended].tolist())
        for i, outcome in zip(ended, outcomes, strict=True):
            rewards_B[i] = outcome.reward
            self._outcomes[i] = outcome
        observations, infos = self._answer(after.ended_B)
        return observations, rewards_B, after.ended_B.copy(), after.cut_B.copy(), infos

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now: bool, B rows with one entry an action."""
        return self._simulation.action_masks()

    def render(self) -> tuple[str | np.ndarray, ...] | None:
        """The episodes so far, one text or picture each; None without a render mode.

        Raises:
            ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() needs render_mode='ansi' or 'rgb_array' when the environment is created"
            )
            return None
        if not self._simulation.texts:
            raise ResetNeeded("there are no episodes to show yet; call reset() before render()")
        return tuple(
            self._simulation.rendered(i, self.render_mode, outcome)
            for i, outcome in enumerate(self._outcomes)
        )

    def _begin(self, where_B: np.ndarray, rows_B: np.ndarray | None = None) -> None:
        """Start the episodes in `where_B`, on the given questions or on drawn ones."""
        begun = np.flatnonzero(where_B)
        if rows_B is None:
            rows = self.np_random.integers(self._simulation.num_questions, size=len(begun))
        else:
            rows = rows_B[begun]
        self._simulation.begin(where_B, rows)
        self._renew_columns(where_B)
        for i in begun.tolist():
            self._outcomes[i] = None

    def _renew_columns(self, where_B: np.ndarray) -> None:
        """Tell the texts of these episodes anew."""
        changed = np.flatnonzero(where_B).tolist()
        columns = _columns([self._simulation.texts[i] for i in changed]) if changed else {}
        if not self._text_columns:
            self._text_columns = columns
            return
        for name, column in columns.items():
            self._text_columns[name][changed] = column

    def _answer(self, ended_B: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Observations and infos after a step; in SAME_STEP mode this starts the next episodes."""
        everyone = np.ones(self.num_envs, dtype=np.bool_)
        observations = self._simulation.observe()
        if not ended_B.any():
            return observations, self._infos(everyone)
        if self._mode is not AutoresetMode.SAME_STEP:
            return observations, self._infos(everyone) | self._outcome_infos(ended_B)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended_B).tolist():
            final_obs[i] = {name: array[i].copy() for name, array in observations.items()}
        final_info = self._infos(ended_B) | self._outcome_infos(ended_B)
        self._begin(ended_B)
        infos = self._infos(everyone) | {
            "final_obs": final_obs,
            "_final_obs": ended_B.copy(),
            "final_info": final_info,
            "_final_info": ended_B.copy(),
        }
        return self._simulation.observe(), infos

    def _infos(self, where_B: np.ndarray) -> dict[str, Any]:
        """What every step tells about the sub-environments in `where_B`."""
        infos: dict[str, Any] = {}
        columns = self._text_columns | {"action_mask": self.action_masks()}
        for name, column in columns.items():
            # As Gymnasium fills them: None, 0 or False where a sub-environment has no such info.
            shown = np.full_like(column, None if column.dtype == object else 0)
            shown[where_B] = column[where_B]
            infos[name], infos[f"_{name}"] = shown, where_B.copy()
        return infos

    def _outcome_infos(self, ended_B: np.ndarray) -> dict[str, Any]:
        """What the last step tells about the sub-environments in `ended_B`."""
        rows = {
            i: outcome.info() for i, outcome in enumerate(self._outcomes) if ended_B[i] and outcome
        }
        infos = _sparse_columns(rows, self.num_envs)
        terms = {i: row["reward_terms"] for i, row in rows.items()}
        if "reward_terms" in infos:
            infos["reward_terms"] = _sparse_columns(terms, self.num_envs)
        return infos

    def _checked_actions(self, actions: np.ndarray | Sequence[int]) -> np.ndarray:
        if not self._simulation.texts:
            raise ResetNeeded("no episode has begun; call reset() before step()")
        actions_B = np.asarray(actions)
        stop = int(self._simulation.action_space.n) - 1
        if actions_B.shape != (self.num_envs,) or not np.issubdtype(actions_B.dtype, np.integer):
            raise InvalidAction(
                f"actions have shape {actions_B.shape} and type {actions_B.dtype}; "
                f"give {self.num_envs} integers from 0 to {stop}"
            )
        if actions_B.min() < 0 or actions_B.max() > stop:
            raise InvalidAction(f"actions {actions_B.tolist()} are not all from 0 to {stop}")
        if self._mode is AutoresetMode.DISABLED:
            astray = np.flatnonzero(self._simulation.over_B & (actions_B != stop)).tolist()
            if astray:
                raise ResetNeeded(
                    f"the episodes of sub-environments {astray} are over and autoreset is off; "
                    f"give them the stop ({stop}) or reset them with options['reset_mask']"
                )
        return actions_B

    def _checked_mask(self, mask: Any) -> np.ndarray:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        where_B = np.asarray(mask)
        if where_B.shape != (self.num_envs,) or where_B.dtype != np.bool_ or not where_B.any():
            raise ConfigError(
                f"options['reset_mask'] is {mask!r}; give {self.num_envs} booleans with a True"
            )
        if not self._simulation.texts and not where_B.all():
            raise ResetNeeded(
                "the first reset must start every sub-environment; leave out the mask"
            )
        return where_B

    def _checked_rows(self, rows: Any, where_B: np.ndarray) -> np.ndarray | None:
        if rows is None:
            return None
        rows_B, num_questions = np.asarray(rows), self._simulation.num_questions
        is_integer = np.issubdtype(rows_B.dtype, np.integer)
        if rows_B.shape != (self.num_envs,) or not is_integer:
            raise ConfigError(
                f"options['question_rows'] has shape {rows_B.shape} and type {rows_B.dtype}; "
                f"give {self.num_envs} integers, one for each sub-environment"
            )
        used = rows_B[where_B]
        if used.min() < 0 or used.max() >= num_questions:
            raise ConfigError(
                f"options['question_rows'] asks for {used.tolist()}; the table has rows 0 to "
                f"{num_questions - 1}"
            )
        return rows_B


class DocumentSelectionVectorEnv(SimulatedVectorEnv):
    """Many `DocumentSelectionEnv` at once, whose rewards are computed together.

    ## Description
    Each sub-environment follows the rules of `DocumentSelectionEnv`. All episodes that end in the
    same step are rewarded in one call of the reward, so that a generator sees them as one batch.

    ## Action Space
    `MultiDiscrete([N + 1] * B)`: one action of the scalar environment for each sub-environment.

    ## Observation Space
    The scalar environment's `Dict`, each array with B in front.

    ## Starting State
    Questions drawn uniformly and independently with the generator that `reset(seed=)` seeds. Reset
    options:

    - `question_rows`: integer array of length B, the question of each sub-environment; entries of
      sub-environments that do not start again are not read.
    - `reset_mask`: bool array of length B with at least one True; only these start again, and only
      these have infos. Without it all start again.

    ## Rewards
    As in the scalar environment, float64 of length B. Where a reward could not be computed it is
    NaN and `info["error"]` holds the `RlragError` that says why: a caller excludes such an episode
    and counts it. An exception that the reward raises itself ends the step.

    ## Episode End
    As in the scalar environment; truncation never. What follows the last step of an episode is set
    by `autoreset_mode` and stated in `metadata["autoreset_mode"]`:

    - `NEXT_STEP` (default): the next step ignores the action, draws a new question and gives reward
      0.
    - `SAME_STEP`: the same step draws the new question; the ended episode's last observation and
      info are in `info["final_obs"]` and `info["final_info"]`.
    - `DISABLED`: the caller resets, all or by `reset_mask`. A sub-environment that is over takes
      the stop, the one action that its mask allows, and stays over with reward 0. Termination was
      told when the episode ended and is not told again, so that whoever counts it counts episodes.
      A caller may step a batch until all were terminated once, at most K steps. Any other action
      raises `ResetNeeded`.

    ## Information
    The scalar environment's keys in Gymnasium's vector form: an array of length B under each key
    and under `_key` a bool array that says which sub-environments have it. Texts and tuples are in
    object arrays; `reward_terms` is a dict of such arrays. `error` is there where a reward failed.

    ## Arguments
    - `num_envs=1`: sub-environments (B).
    - `autoreset_mode`: an `AutoresetMode` or its value, such as `"Disabled"`.
    - `candidates`, `reward`, `num_selected`, `invalid_reward`, `render_mode`: as in the scalar
      environment; `render()` gives one text or picture for each sub-environment.

    ```python
    >>> import gymnasium as gym, rlrag.environment
    >>> batch = gym.make_vec("rlrag/DocumentSelection-v1", num_envs=4)
    >>> _, infos = batch.reset(options={"question_rows": [0, 0, 1, 1]})
    >>> infos["question_row"].tolist(), infos["_question_row"].tolist()
    ([0, 0, 1, 1], [True, True, True, True])

    ```

    ## References
    - Direct Retrieval-augmented Optimization: Synergizing Knowledge Selection and Language Models,
      arXiv 2505.03075.

    ## Version History
    - v1: first version.
    """

    def __init__(
        self,
        num_envs: int = 1,
        candidates: CandidateTable | None = None,
        reward: SelectionReward | None = None,
        num_selected: int = DEFAULT_NUM_SELECTED,
        render_mode: str | None = None,
        invalid_reward: float = DEFAULT_INVALID_REWARD,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        check_num_envs(num_envs)
        task = SelectionTask(candidates, reward, num_selected, invalid_reward)
        simulation = SelectionSimulation(task, num_envs)
        super().__init__(simulation, num_envs, render_mode, autoreset_mode)


def check_num_envs(num_envs: int) -> None:
    """Refuse a batch of no episodes.

    Raises:
        ConfigError: saying so.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs is {num_envs}; give at least 1")


def _columns(texts: Sequence[EpisodeTexts]) -> dict[str, np.ndarray]:
    """The texts' infos as one array for each key: integers, else objects."""
    rows = [text.info() for text in texts]
    columns: dict[str, np.ndarray] = {}
    for name in rows[0]:
        if name == "question_row":
            columns[name] = np.array([row[name] for row in rows], dtype=np.int64)
        else:
            column = np.empty(len(rows), dtype=object)
            # One by one: NumPy would spread tuples of equal length over a second axis.
            for i, row in enumerate(rows):
                column[i] = row[name]
            columns[name] = column
    return columns


def _sparse_columns(rows: Mapping[int, Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Infos of some sub-environments in Gymnasium's form: `name`, and `_name` for who has it.

    `VectorEnv._add_info` makes a mask at each call: quadratic in the sub-environments.
    """
    columns: dict[str, Any] = {}
    for i, row in rows.items():
        for name, value in row.items():
            if name not in columns:
                kind = type(value) if type(value) in (bool, float) else object
                columns[name] = np.full(size, None if kind is object else 0, dtype=kind)
                columns[f"_{name}"] = np.zeros(size, dtype=np.bool_)
            columns[name][i] = value
            columns[f"_{name}"][i] = True
    return columns


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        values = [known.value for known in AutoresetMode]
        raise ConfigError(f"autoreset_mode is {mode!r}; choose one of {values}") from error
