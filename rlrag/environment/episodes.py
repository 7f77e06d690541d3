"""Batches of episodes of any registered environment, scalar or vectorised.

`environment.id` may name any environment that Gymnasium knows and that keeps this contract:

- Actions are `Discrete` from 0 on. Observations are a `Dict` with an `action_mask` of zeros and
  ones, an entry an action; some action is allowed until the episode is over.
- `reset(options={"question_row": i})` starts the episode of question i. A vector environment takes
  `question_rows` and the autoreset mode `DISABLED`.
- An episode ends by itself, after at most `MAX_ACTIONS` actions. Its last `info` has `evidence`,
  the passages (`rlrag.records.Passage`) that it ended with, in order; it may have `answer`,
  `reward_terms`, and `error`, the reason why there is no reward.
- The constructor takes `candidates`, `reward` and `num_selected`, and with `environment.hops` also
  `settings`, `writers`, `retriever` and `edges`, or those of them that it needs.

Observations must be new arrays at every step: trajectories keep them.

Shape letters: E episodes, A actions.
"""

from __future__ import annotations

import importlib
import inspect
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import rlrag.environment  # noqa: F401 - its import registers the environments
from rlrag.config import EnvironmentConfig
from rlrag.errors import ConfigError, EpisodeError, RlragError
from rlrag.records import Columns
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.queries.built_in import build_query_writer

MAX_ACTIONS = 1_000
"""Actions after which an episode counts as one that never ends."""

_ADVICE = "fix the environment, or choose another one in environment.id"

StepResult = tuple[Columns, np.ndarray, np.ndarray, Columns]
"""Observations, rewards (E,), which episodes are over (E,), and infos."""


class EpisodeBatch(Protocol):
    """E episodes that are played side by side."""

    name: str
    num_episodes: int

    def reset(self, question_rows_E: np.ndarray) -> tuple[Columns, Columns]:
        """Start the episodes of these questions; returns observations and infos.

        Raises:
            EpisodeError: when the environment fails or breaks its contract.
        """
        ...

    def step(self, actions_E: np.ndarray) -> StepResult:
        """Apply an action to each episode; those that are over stay as they are.

        Raises:
            EpisodeError: when the environment fails or breaks its contract.
            RlragError: what a reward raised.
        """
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...


def open_episodes(
    config: EnvironmentConfig,
    num_episodes: int,
    candidates: CandidateTable,
    reward: SelectionReward,
) -> EpisodeBatch:
    """The configured environment, for so many episodes at a time.

    Args:
        config: Names the environment and the number of picks.
        num_episodes: Episodes of each batch (E).
        candidates: The questions with their candidates.
        reward: Scores what an episode ends with.

    Raises:
        ConfigError: when there is no such environment, or it cannot be made.
        EpisodeError: when its spaces break the contract.
    """
    spec = registered(config.id)
    wanted: dict[str, Any] = {
        "candidates": candidates,
        "reward": reward,
        "num_selected": config.num_selected,
    }
    if config.looks_further:
        sources = candidates.sources
        wanted |= {
            "settings": config.hops,
            "writers": tuple(build_query_writer(name) for name in config.hops.writers),
            "retriever": sources and sources.retriever,
            "edges": sources and sources.graph,
        }
    kind = _ScalarEpisodes if spec.vector_entry_point is None else _VectorEpisodes
    try:
        return kind(config.id, spec, num_episodes, wanted)
    except RlragError:
        raise
    except Exception as error:
        raise ConfigError(
            f"environment.id {config.id!r} cannot be created: {_described(error)}; {_ADVICE}"
        ) from error


def registered(name: str) -> EnvSpec:
    """The registration of the environment that `environment.id` names.

    Raises:
        ConfigError: when there is none.
    """
    module, _, plain = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(plain)
    except (gymnasium.error.Error, ImportError) as error:
        ours = ", ".join(known for known in gymnasium.registry if known.startswith("rlrag/"))
        raise ConfigError(
            f"environment.id {name!r} is not a registered environment ({error}); use {ours}, or "
            "'module:namespace/Name-v0' for your own, where the module registers it"
        ) from error


def _accepted(entry_point: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that the environment's constructor takes."""
    make = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    parameters = inspect.signature(make).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(wanted)
    return {name: value for name, value in wanted.items() if name in parameters}


class _Guard:
    """Holds an environment to the contract, and says of each failure where it happened."""

    def __init__(
        self, name: str, observations: spaces.Space[Any], actions: spaces.Space[Any], trusted: bool
    ) -> None:
        self._name = name
        self._trusted = trusted
        self.step = 0
        self.questions: Sequence[Any] = ()
        mask = observations.get("action_mask") if isinstance(observations, spaces.Dict) else None
        numbered = isinstance(actions, spaces.Discrete) and actions.start == 0
        if not numbered or mask is None or mask.shape != (int(getattr(actions, "n", 0)),):
            raise EpisodeError(
                f"environment.id {name!r} has actions {actions} and observations {observations}; "
                "it needs Discrete actions from 0 on and a Dict of observations whose "
                "'action_mask' has an entry for each action"
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Name the environment, the step and the question of whatever is raised inside."""
        try:
            yield
        except RlragError:
            raise
        except Exception as error:
            raise self.error(_described(error)) from error

    def error(self, what: str, episode: int | None = None) -> EpisodeError:
        """What is wrong, and where."""
        asked = self.questions if episode is None else self.questions[episode : episode + 1]
        which = " and others" if len(asked) > 1 else ""
        question = f"question {reprlib.repr(asked[0])}{which}" if len(asked) else "its reset"
        return EpisodeError(
            f"environment.id {self._name!r}, action {self.step} of {question}: {what}; {_ADVICE}"
        )

    def check(self, space: Any, observations: Columns, over_E: np.ndarray) -> None:
        """Whether the observations lie in their space and leave an action to take."""
        mask_EA = observations.get("action_mask")
        if mask_EA is None:
            raise self.error("the observation has no 'action_mask'")
        stuck_E = ~np.asarray(mask_EA).astype(bool).any(axis=1) & ~over_E
        if stuck_E.any():
            raise self.error(
                "no action is allowed, but the episode has not ended", int(stuck_E.argmax())
            )
        if self._trusted:
            return
        for name, part in space.spaces.items():
            if name not in observations or not part.contains(observations[name]):
                found = " ".join(reprlib.repr(observations.get(name)).split())
                raise self.error(
                    f"the observation {name!r} is {found}, which is outside its space "
                    f"{reprlib.repr(part)}"
                )

    def number(self, reward: Any) -> float:
        """A reward as a number; NaN stands for one that could not be computed."""
        try:
            return float(reward)
        except (TypeError, ValueError):
            raise self.error(
                f"the reward is {reprlib.repr(reward)}, which is not a number"
            ) from None


class _VectorEpisodes:
    """Episodes of a vector environment."""

    def __init__(
        self, name: str, spec: EnvSpec, num_episodes: int, wanted: Mapping[str, Any]
    ) -> None:
        self.name, self.num_episodes = name, num_episodes
        self._env: VectorEnv[Any, Any, Any] = gymnasium.make_vec(
            spec,
            num_envs=num_episodes,
            vectorization_mode="vector_entry_point",
            autoreset_mode=AutoresetMode.DISABLED,
            **_accepted(spec.vector_entry_point, wanted),
        )
        single = self._env.single_observation_space, self._env.single_action_space
        self._guard = _Guard(name, *single, trusted=_is_ours(spec.vector_entry_point))
        self._over_E = np.zeros(num_episodes, dtype=np.bool_)

    def reset(self, question_rows_E: np.ndarray) -> tuple[Columns, Columns]:
        """See `EpisodeBatch.reset`."""
        guard = self._guard
        guard.step, guard.questions = 0, ()
        self._over_E = np.zeros(self.num_episodes, dtype=np.bool_)
        with guard.running():
            observations, infos = self._env.reset(options={"question_rows": question_rows_E})
            guard.questions = infos.get("question_id", question_rows_E)
            guard.check(self._env.observation_space, observations, self._over_E)
        return observations, infos

    def step(self, actions_E: np.ndarray) -> StepResult:
        """See `EpisodeBatch.step`."""
        guard = self._guard
        guard.step += 1
        with guard.running():
            observations, rewards, ended_E, cut_E, infos = self._env.step(actions_E)
            rewards_E = np.array([guard.number(reward) for reward in rewards])
            self._over_E = self._over_E | ended_E | cut_E
            guard.check(self._env.observation_space, observations, self._over_E)
        return observations, rewards_E, self._over_E, infos

    def close(self) -> None:
        """See `EpisodeBatch.close`."""
        self._env.close()


class _ScalarEpisodes:
    """Episodes of as many scalar environments, each of which rewards its own."""

    def __init__(
        self, name: str, spec: EnvSpec, num_episodes: int, wanted: Mapping[str, Any]
    ) -> None:
        self.name, self.num_episodes = name, num_episodes
        accepted = _accepted(spec.entry_point, wanted)
        self._envs = [
            gymnasium.make(spec, disable_env_checker=True, **accepted) for _ in range(num_episodes)
        ]
        single = self._envs[0].observation_space, self._envs[0].action_space
        self._guard = _Guard(name, *single, trusted=_is_ours(spec.entry_point))
        self._space: Any = batch_space(single[0], num_episodes)
        self._shown: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        self._over_E = np.zeros(num_episodes, dtype=np.bool_)

    def reset(self, question_rows_E: np.ndarray) -> tuple[Columns, Columns]:
        """See `EpisodeBatch.reset`."""
        self._over_E = np.zeros(self.num_episodes, dtype=np.bool_)
        self._guard.step, self._shown = 0, []
        for env, row in zip(self._envs, question_rows_E.tolist(), strict=True):
            self._guard.questions = (row,)
            with self._guard.running():
                self._shown.append(env.reset(options={"question_row": row}))
        infos = [info for _, info in self._shown]
        self._ids = [
            info.get("question_id", row) for info, row in zip(infos, question_rows_E, strict=True)
        ]
        return self._columns()

    def step(self, actions_E: np.ndarray) -> StepResult:
        """See `EpisodeBatch.step`."""
        rewards_E = np.zeros(self.num_episodes)
        self._guard.step += 1
        for e in np.flatnonzero(~self._over_E).tolist():
            self._guard.questions = self._ids[e : e + 1]
            with self._guard.running():
                observation, reward, ended, cut, info = self._envs[e].step(actions_E[e])
                rewards_E[e] = self._guard.number(reward)
            self._over_E[e] = ended or cut
            self._shown[e] = observation, info
        observations, infos = self._columns()
        return observations, rewards_E, self._over_E.copy(), infos

    def close(self) -> None:
        """See `EpisodeBatch.close`."""
        for env in self._envs:
            env.close()

    def _columns(self) -> tuple[Columns, Columns]:
        self._guard.questions = self._ids
        with self._guard.running():
            shown = [observation for observation, _ in self._shown]
            observations = {name: np.stack([one[name] for one in shown]) for name in shown[0]}
            self._guard.check(self._space, observations, self._over_E)
        infos = [info for _, info in self._shown]
        names = dict.fromkeys(name for info in infos for name in info)
        return observations, {name: _column([i.get(name) for i in infos]) for name in names}


def _is_ours(entry_point: Any) -> bool:
    """Whether the environment is one of this package, whose own tests hold it to its spaces."""
    return isinstance(entry_point, str) and entry_point.startswith("rlrag.")


def _column(values: Sequence[Any]) -> np.ndarray:
    """Values as an array of objects, whatever they are."""
    column = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        column[place] = value
    return column


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
