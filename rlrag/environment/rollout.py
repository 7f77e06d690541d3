"""Rollouts: steps a policy and an environment to the end of every episode.

Training, validation, evaluation and serving all play episodes here. Shape letters: B questions,
M episodes of one question, E episodes, T actions of the longest one, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from rlrag.config import EnvironmentConfig
from rlrag.environment.episodes import MAX_ACTIONS, EpisodeBatch, open_episodes
from rlrag.environment.sample_task import sample_candidates
from rlrag.errors import EpisodeError, RewardError, RlragError
from rlrag.records import (
    Columns,
    EpisodePath,
    Passage,
    Question,
    RewardResult,
    Trajectories,
    joined,
)
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.protocol import Actions, Draws, Policy, Turn

_AT_ONCE = 64
"""Questions whose greedy episodes are played together."""


def play(
    episodes: EpisodeBatch, policy: Policy, question_rows: np.ndarray, draws: Draws | None = None
) -> Trajectories:
    """Play one batch of episodes to its end.

    Args:
        episodes: The environment.
        policy: Whose actions are taken.
        question_rows: Questions of shape (B,); with draws each is played M times.
        draws: How actions are drawn; unset takes the most probable ones.

    Raises:
        EpisodeError: when environment or policy break their contracts.
    """
    num_samples = draws.num_samples if draws else 1
    rows_E = np.repeat(question_rows, num_samples)
    observations, infos = episodes.reset(rows_E)
    turn = Turn(draws)
    told = _Told(len(rows_E))
    over_E = np.zeros(len(rows_E), dtype=np.bool_)
    seen: list[tuple[Columns, Columns]] = []
    actions, logps, log_ratios_E = [], [], np.zeros(len(rows_E))
    while not over_E.all():
        if turn.step == MAX_ACTIONS:
            row = int(rows_E[~over_E][0])
            raise EpisodeError(
                f"environment.id {episodes.name!r}: the episode of question row {row} did not end "
                f"after {MAX_ACTIONS} actions; end it, or take fewer actions"
            )
        acts_E = ~over_E
        chosen = policy.act(observations, infos, turn)
        _check_actions(policy, episodes.name, chosen, observations["action_mask"], acts_E, turn)
        seen.append((observations, infos))
        actions.append(np.where(acts_E, chosen.actions_E, -1))
        logps.append(np.where(acts_E, chosen.logp_E, 0))
        log_ratios_E = log_ratios_E + np.where(acts_E, chosen.log_ratios_E, 0.0)
        # What is over takes an action that is allowed there, which changes nothing.
        idle_E = observations["action_mask"].argmax(axis=1)
        observations, rewards_E, over_now_E, infos = episodes.step(
            np.where(acts_E, chosen.actions_E, idle_E)
        )
        told.add(rewards_E, acts_E)
        told.conclude(infos, over_now_E & acts_E, episodes.name)
        over_E = over_now_E
        turn.step += 1
    return Trajectories(
        question_rows_E=rows_E,
        observations=tuple(observation for observation, _ in seen),
        infos=tuple(info for _, info in seen),
        actions_ET=np.stack(actions, axis=1),
        logp_ET=np.stack(logps, axis=1),
        log_weights_E=log_ratios_E - math.log(num_samples),
        rewards_E=told.rewards_E,
        terms=told.terms(),
        evidence=tuple(told.evidence),
        answers=tuple(told.answers),
        golden_logps=tuple(told.golden_logps),
        errors=tuple(told.errors),
        paths=tuple(told.paths),
    )


def play_greedy(
    config: EnvironmentConfig,
    policy: Policy,
    candidates: CandidateTable,
    question_rows: Sequence[int] | np.ndarray | None = None,
) -> Trajectories:
    """The policy's most probable episodes, without a reward and without what was seen in them.

    Args:
        config: Names the environment.
        policy: Whose actions are taken.
        candidates: The questions with their candidates.
        question_rows: Which of them; all when unset.
    """
    rows = np.arange(len(candidates)) if question_rows is None else np.asarray(question_rows)
    found = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        episodes = open_episodes(config, len(part), candidates, Unrewarded())
        try:
            found.append(play(episodes, policy, part))
        finally:
            episodes.close()
    return joined(found)


def replay(
    config: EnvironmentConfig,
    candidates: CandidateTable,
    question_rows: np.ndarray,
    actions_ET: np.ndarray,
) -> Trajectories:
    """Play given actions again, without a reward, for what a policy would have seen.

    Args:
        config: Names the environment.
        candidates: The questions with their candidates.
        question_rows: The question of each episode, shape (E,).
        actions_ET: Its actions, -1 beyond its end. What follows the end is not read.

    Raises:
        EpisodeError: when an action is not allowed, or an episode does not end with its actions.
    """
    episodes = open_episodes(config, len(question_rows), candidates, Unrewarded())
    try:
        return play(episodes, Given(actions_ET), question_rows)
    finally:
        episodes.close()


def can_replay(
    config: EnvironmentConfig,
    candidates: CandidateTable,
    question_rows: np.ndarray,
    actions_ET: np.ndarray,
) -> np.ndarray:
    """Which episodes these actions lead through, each allowed, and end with: bool (E,).

    Args:
        config: Names the environment.
        candidates: The questions with their candidates.
        question_rows: The question of each episode, shape (E,).
        actions_ET: Its actions, -1 beyond its end.
    """
    fits = []
    for start in range(0, len(question_rows), _AT_ONCE):
        rows, actions = question_rows[start:][:_AT_ONCE], actions_ET[start:][:_AT_ONCE]
        episodes = open_episodes(config, len(rows), candidates, Unrewarded())
        try:
            played_ET = play(episodes, Given(actions, strict=False), rows).actions_ET
        finally:
            episodes.close()
        fits.append(are_equal(played_ET, actions))
    return np.concatenate(fits)


def are_equal(one_ET: np.ndarray, other_ET: np.ndarray) -> np.ndarray:
    """Which episodes are the same, bool of shape (E,); the longest of each side may differ."""
    longest = max(one_ET.shape[1], other_ET.shape[1])
    one_ET, other_ET = (
        np.pad(each_ET, ((0, 0), (0, longest - each_ET.shape[1])), constant_values=-1)
        for each_ET in (one_ET, other_ET)
    )
    return (one_ET == other_ET).all(axis=1)


def check_environment(config: EnvironmentConfig, candidates: CandidateTable | None = None) -> None:
    """Make the environment of one episode and close it, so that a mistake costs no training.

    Args:
        config: Names the environment.
        candidates: What it is made with; those of the built-in task when unset.

    Raises:
        ConfigError: when there is no such environment, or it cannot be made.
        EpisodeError: when its spaces break the contract.
    """
    if candidates is None:
        candidates = sample_candidates()
        most = min(config.num_selected, candidates.num_candidates)
        # Of the built-in task's size, but with the parts that are named.
        sizes = {"num_first": None, "num_slots": None, "num_hits": 1}
        hops = config.hops.model_copy(update=sizes)
        config = config.model_copy(update={"num_selected": most, "hops": hops})
    open_episodes(config, 1, candidates, Unrewarded()).close()


class Given:
    """A policy whose actions are given, shape (E, T); what follows an episode's end is not read.

    Unless `strict` an action that is not allowed is replaced by one that is.
    """

    def __init__(self, actions_ET: np.ndarray, strict: bool = True) -> None:
        self._actions_ET, self._strict = actions_ET, strict

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """The given action of this turn."""
        num_episodes, num_actions = self._actions_ET.shape
        none_E = np.full(num_episodes, -1)
        actions_E = self._actions_ET[:, turn.step] if turn.step < num_actions else none_E
        if not self._strict:
            mask_EA = observations["action_mask"].astype(bool)
            inside_E = (actions_E >= 0) & (actions_E < mask_EA.shape[1])
            fits_E = inside_E & mask_EA[np.arange(num_episodes), np.where(inside_E, actions_E, 0)]
            actions_E = np.where(fits_E, actions_E, mask_EA.argmax(axis=1))
        return Actions(actions_E, np.zeros(num_episodes), np.zeros(num_episodes))

    def log_prob(self, trajectories: Trajectories) -> NoReturn:
        """Given actions have no probability."""
        raise NotImplementedError


class Unrewarded:
    """The reward of episodes that are played for what they find: always 0."""

    def __call__(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[RewardResult | RlragError]:
        """See `SelectionReward`."""
        return [RewardResult(0.0, {}) for _ in questions]


class _Told:
    """What the environment told about E episodes."""

    def __init__(self, num_episodes: int) -> None:
        self.rewards_E = np.zeros(num_episodes)
        self.evidence: list[tuple[Passage, ...]] = [()] * num_episodes
        self.answers: list[str | None] = [None] * num_episodes
        self.golden_logps: list[tuple[float, ...] | None] = [None] * num_episodes
        self.errors: list[RlragError | None] = [None] * num_episodes
        self.paths: list[EpisodePath | None] = [None] * num_episodes
        self._terms: list[dict[str, float]] = [{} for _ in range(num_episodes)]

    def add(self, rewards_E: np.ndarray, acts_E: np.ndarray) -> None:
        """Rewards of one step."""
        self.rewards_E = np.where(acts_E, self.rewards_E + rewards_E, self.rewards_E)

    def conclude(self, infos: Columns, ended_E: np.ndarray, name: str) -> None:
        """Read the last infos of the episodes that ended in this step."""
        for e in np.flatnonzero(ended_E).tolist():
            evidence = _entry(infos, "evidence", e)
            if not isinstance(evidence, tuple | list):
                raise EpisodeError(
                    f"environment.id {name!r}: the last info of an episode must contain "
                    "'evidence', its selected passages; add it"
                )
            self.evidence[e] = tuple(evidence)
            self.answers[e] = _entry(infos, "answer", e)
            self.golden_logps[e] = _entry(infos, "golden_logps", e)
            terms = infos.get("reward_terms")
            if isinstance(terms, dict):  # as vector environments nest them
                found = {n: _entry(terms, n, e) for n in terms if not n.startswith("_")}
            else:
                found = dict(_entry(infos, "reward_terms", e) or {})
            self._terms[e] = {n: float(value) for n, value in found.items() if value is not None}
            self.errors[e] = _entry(infos, "error", e)
            self.paths[e] = _entry(infos, "path", e)
            if self.errors[e] is None and not math.isfinite(self.rewards_E[e]):
                self.errors[e] = RewardError(
                    f"environment.id {name!r}: the reward of question "
                    f"{_entry(infos, 'question_id', e)!r} is {self.rewards_E[e]}; a reward must be "
                    "a finite number"
                )
            if self.errors[e] is not None:
                self.rewards_E[e] = np.nan

    def terms(self) -> Columns:
        """The reward's terms by name, NaN where an episode has none."""
        names = dict.fromkeys(name for terms in self._terms for name in terms)
        return {n: np.array([terms.get(n, np.nan) for terms in self._terms]) for n in names}


def _entry(infos: Columns, name: str, episode: int) -> Any:
    """One episode's info, None where it has none."""
    known = f"_{name}"
    if name not in infos or (known in infos and not infos[known][episode]):
        return None
    return infos[name][episode]


def _check_actions(
    policy: Policy,
    name: str,
    chosen: Actions,
    mask_EA: np.ndarray,
    acts_E: np.ndarray,
    turn: Turn,
) -> None:
    """Whether every episode that goes on has an action that is allowed.

    Raises:
        EpisodeError: naming the policy otherwise.
    """
    num_episodes, num_actions = mask_EA.shape
    actions_E = np.asarray(chosen.actions_E)
    who = f"{type(policy).__name__}.act, action {turn.step + 1} in {name!r}"
    shapes = {np.shape(part) for part in (actions_E, chosen.logp_E, chosen.log_ratios_E)}
    if shapes != {(num_episodes,)} or not np.issubdtype(actions_E.dtype, np.integer):
        raise EpisodeError(
            f"{who}: gave arrays of shapes {sorted(shapes)} and actions of type "
            f"{actions_E.dtype}; give {num_episodes} integers and their log-probabilities"
        )
    inside_E = (actions_E >= 0) & (actions_E < num_actions)
    allowed_E = mask_EA[np.arange(num_episodes), np.where(inside_E, actions_E, 0)] != 0
    wrong_E = acts_E & ~(inside_E & allowed_E)
    if wrong_E.any():
        raise EpisodeError(
            f"{who}: chose {int(actions_E[wrong_E][0])}, which the environment's action_mask does "
            "not allow; choose among the allowed actions"
        )
