"""What an environment or a policy that breaks its contract is told."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from stand_ins import make_table

from rlrag.config import EnvironmentConfig
from rlrag.environment import episodes as module
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.errors import ConfigError, EpisodeError, RewardError
from rlrag.records import Passage
from rlrag.selection.protocol import Actions, Draws


class Faulty(gymnasium.Env):
    """Go on (0) or stop (1); breaks its contract in one way, in its second step."""

    def __init__(self, fault: str = "") -> None:
        if fault == "cannot be made":
            raise OSError("no such disk")
        self.fault, self.steps = fault, 0
        self.action_space = spaces.Discrete(2, start=int(fault == "actions from 1"))
        parts = {"level": spaces.Box(0.0, 1.0, (1,), dtype=np.float32)}
        if fault != "no mask in its space":
            size = 3 if fault == "mask too long" else 2
            parts["action_mask"] = spaces.Box(0, 1, (size,), dtype=np.int8)
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


class Counts(gymnasium.Env):
    """Question q takes q + 1 actions with a reward of 1 each; that of question 2 is not known.

    Question 1 is cut off rather than over. After its end no action is allowed, and none is taken.
    """

    action_space = spaces.Discrete(2)
    observation_space = spaces.Dict({"action_mask": spaces.Box(0, 1, (2,), dtype=np.int8)})

    def reset(self, *, seed=None, options=None):
        self.row = int(options["question_row"])
        self.left = self.row + 1
        return self.observe(), {}

    def step(self, action):
        assert self.left, "the episode is over"
        self.left -= 1
        info = {}
        if not self.left:
            info["evidence"] = (Passage(f"p{self.row}", "", ""),)
            if self.row == 2:
                info["error"] = RewardError("no answer")
        cut = self.row == 1
        return self.observe(), 1.0, not self.left and not cut, not self.left and cut, info

    def observe(self):
        return {"action_mask": np.full(2, self.left > 0, np.int8)}


class ManyCounts(VectorEnv):
    """As many of them, in Gymnasium's vector form."""

    def __init__(self, num_envs, autoreset_mode):
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": autoreset_mode}
        self.envs = [Counts() for _ in range(num_envs)]
        self.single_action_space = Counts.action_space
        self.single_observation_space = Counts.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(self, *, seed=None, options=None):
        for env, row in zip(self.envs, options["question_rows"], strict=True):
            env.reset(options={"question_row": row})
        return self.observe(), {}

    def step(self, actions):
        rewards, over, cut = np.full(self.num_envs, 9.0), *np.zeros((2, self.num_envs), bool)
        infos = {}
        for e, env in enumerate(self.envs):
            if env.left:
                _, rewards[e], over[e], cut[e], info = env.step(actions[e])
                infos = self._add_info(infos, info, e)
        return self.observe(), rewards, over, cut, infos

    def observe(self):
        return {"action_mask": np.stack([env.observe()["action_mask"] for env in self.envs])}


class GoesOn:
    """Takes one action for ever, also where nothing is asked."""

    def __init__(
        self, action: float = 0, logp: float = 0.0, log_ratio: float = 0.0, size: int | None = None
    ) -> None:
        self._action, self._logp, self._log_ratio, self._size = action, logp, log_ratio, size

    def act(self, observations, infos, turn):
        size = self._size or len(observations["action_mask"])
        logp, log_ratios = np.full(size, self._logp), np.full(size, self._log_ratio)
        return Actions(np.full(size, self._action), logp, log_ratios)

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


@pytest.mark.parametrize("vectorised", [False, True])
def test_an_episode_is_told_up_to_its_own_end_while_others_go_on(vectorised):
    """Twice with the same environments; what comes after an end counts for nothing."""
    name = f"tests/Counts{vectorised:d}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, Counts, vector_entry_point=ManyCounts if vectorised else None)
    batch = open_episodes(EnvironmentConfig(id=name), 6, make_table(3), Unrewarded())
    draws = Draws([[0], [1], [2]], num_samples=2)
    for rows in (np.array([2, 0, 1]), np.array([0, 1, 2])):
        found = play(batch, GoesOn(0, logp=-0.5, log_ratio=0.25), rows, draws)
        lengths = np.repeat(rows, 2) + 1
        took = np.arange(3) < lengths[:, None]
        assert found.question_rows_E.tolist() == (lengths - 1).tolist()
        assert found.actions_ET.tolist() == np.where(took, 0, -1).tolist()
        assert found.logp_ET.tolist() == np.where(took, -0.5, 0.0).tolist()
        assert found.log_weights_E == pytest.approx(0.25 * lengths - np.log(2))
        expected = np.where(lengths == 3, np.nan, lengths)
        np.testing.assert_array_equal(found.rewards_E, expected)
        assert [str(error) for error in found.errors] == [
            "no answer" if length == 3 else "None" for length in lengths
        ]
        assert [passages[0].id for passages in found.evidence] == [f"p{n - 1}" for n in lengths]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no mask in its space", r"has actions Discrete\(2\).*'action_mask' has an entry"),
        ("actions from 1", r"has actions Discrete\(2, start=1\)"),
        ("mask too long", r"\(3,\).*'action_mask' has an entry for each action"),
        ("cannot reset", "action 0 of question 1: KeyError: 'no such question'"),
        ("raises", "action 2 of question 'q1': ZeroDivisionError: division by zero"),
        ("outside", "action 1 of question 'q1' and others: the observation 'level' is"),
        ("nothing allowed", "action 1 of question 'q1': no action is allowed"),
        ("mask forgotten", "the observation has no 'action_mask'|KeyError|'action_mask'"),
        ("a word", "action 2 of question 'q1': the reward is 'good', which is not a number"),
        ("nothing", "the reward is None, which is not a number"),
        ("no evidence", "the last info of an episode must contain 'evidence'"),
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


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (GoesOn(0.0), r"actions of type float64; give 2 integers"),
        (GoesOn(size=3), r"arrays of shapes \[\(3,\)\]"),
    ],
)
def test_a_policy_that_gives_something_else_than_actions_is_named(policy, said):
    with pytest.raises(EpisodeError, match=rf"GoesOn\.act, action 1 .*{said}"):
        play_faulty("", policy)


def test_an_environment_that_cannot_be_made_is_named():
    with pytest.raises(ConfigError, match=r"Faulty.* cannot be created: OSError: no such disk"):
        play_faulty("cannot be made")


@pytest.mark.parametrize("name", ["nobody/Knows-v1", "no_such_module:a/B-v1", "rlrag/Document-v1"])
def test_an_environment_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match="is not a registered environment") as caught:
        open_episodes(EnvironmentConfig(id=name), 1, make_table(1), Unrewarded())
    assert "rlrag/DocumentSelection-v1" in str(caught.value)


def test_what_a_constructor_does_not_take_is_not_passed():
    def make(candidates, other=1): ...

    wanted = {"candidates": 1, "reward": 2, "num_selected": 3}
    assert module._accepted(make, wanted) == {"candidates": 1}
    assert module._accepted(lambda **anything: None, wanted) == wanted
