"""What an environment or a policy that breaks its contract is told."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from stand_ins import make_table

from rlrag.config import EnvironmentConfig
from rlrag.environment import episodes as module
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.errors import ConfigError, EpisodeError, RewardError
from rlrag.selection.protocol import Actions

MASK = spaces.Box(0, 1, (2,), dtype=np.int8)


class Faulty(gymnasium.Env):
    """Go on (0) or stop (1); breaks its contract in one way, in its second step."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.steps = fault, 0
        self.action_space = spaces.Discrete(2)
        parts = {"level": spaces.Box(0.0, 1.0, (1,), dtype=np.float32)}
        if fault != "no mask in its space":
            parts["action_mask"] = MASK
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        if self.fault == "cannot reset":
            raise KeyError("no such question")
        return self.observe(), {"question_id": f"q{options['question_row']}"}

    def step(self, action):
        self.steps += 1
        late = self.steps == 2
        if late and self.fault == "raises":
            raise ZeroDivisionError("division by zero")
        reward = {"a word": "good", "nothing": None, "not finite": float("inf")}.get(self.fault, 1)
        over = late and self.fault != "never ends"
        info = {} if self.fault == "no evidence" else {"evidence": ()}
        return self.observe(), reward if late else 0.0, over, False, info

    def observe(self):
        late = self.steps == 1
        level = 7.0 if late and self.fault == "outside" else 0.5
        mask = [0, 0] if late and self.fault == "nothing allowed" else [1, 1]
        found = {"level": np.array([level], np.float32), "action_mask": np.array(mask, np.int8)}
        if late and self.fault == "mask forgotten":
            del found["action_mask"]
        return found


class GoesOn:
    """Takes one action for ever."""

    def __init__(self, action: int = 0) -> None:
        self._action = action

    def act(self, observations, infos, turn):
        size = len(observations["action_mask"])
        return Actions(np.full(size, self._action), np.zeros(size), np.zeros(size))

    def log_prob(self, trajectories):
        raise NotImplementedError


def play_faulty(fault: str, policy=None):
    name = f"tests/Faulty-{abs(hash(fault)) % 10**6}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, entry_point=Faulty, kwargs={"fault": fault})
    batch = open_episodes(EnvironmentConfig(id=name), 2, make_table(3), Unrewarded())
    return play(batch, policy or GoesOn(), np.array([1, 2]))


def test_an_environment_that_keeps_it_is_played():
    found = play_faulty("")
    assert found.actions_ET.tolist() == [[0, 0]] * 2
    assert found.rewards_E.tolist() == [1.0, 1.0]
    assert found.errors == (None, None)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no mask in its space", r"has actions Discrete\(2\).*'action_mask' has an entry"),
        ("cannot reset", "action 0 of question 1: KeyError: 'no such question'"),
        ("raises", "action 2 of question 'q1': ZeroDivisionError: division by zero"),
        ("outside", "action 1 of question 'q1' and others: the observation 'level' is"),
        ("nothing allowed", "action 1 of question 'q1': no action is allowed"),
        ("mask forgotten", "the observation has no 'action_mask'|KeyError|'action_mask'"),
        ("a word", "action 2 of question 'q1': the reward is 'good', which is no number"),
        ("nothing", "the reward is None, which is no number"),
        ("no evidence", "the last info of an episode has no 'evidence'"),
    ],
)
def test_a_broken_contract_is_named_with_its_place(fault, said):
    with pytest.raises(EpisodeError, match=said) as caught:
        play_faulty(fault)
    assert "tests/Faulty" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reward_that_is_not_finite_is_left_out_and_named():
    found = play_faulty("not finite")
    assert np.isnan(found.rewards_E).all()
    assert all(isinstance(error, RewardError) for error in found.errors)
    assert "is inf; a reward must be" in str(found.errors[0])


def test_an_episode_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr("rlrag.environment.rollout.MAX_ACTIONS", 5)
    with pytest.raises(EpisodeError, match="question row 1 did not end after 5 actions"):
        play_faulty("never ends")


@pytest.mark.parametrize("action", [2, -1])
def test_a_policy_that_takes_what_is_not_allowed_is_named(action):
    with pytest.raises(EpisodeError, match=r"GoesOn\.act, action 1 .*action_mask does not allow"):
        play_faulty("", GoesOn(action))


@pytest.mark.parametrize("name", ["nobody/Knows-v1", "no_such_module:a/B-v1", "rlrag/Document-v1"])
def test_an_environment_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match="names no environment") as caught:
        open_episodes(EnvironmentConfig(id=name), 1, make_table(1), Unrewarded())
    assert "rlrag/DocumentSelection-v1" in str(caught.value)


def test_what_a_constructor_does_not_take_is_not_passed():
    def make(candidates, other=1): ...

    wanted = {"candidates": 1, "reward": 2, "num_selected": 3}
    assert module._accepted(make, wanted) == {"candidates": 1}
    assert module._accepted(lambda **anything: None, wanted) == wanted
