"""Agents of other libraries train on the environment as it is."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import envs  # noqa: F401  registers the environment

ID = "rlrag/DocumentSelection-v1"


class EpisodeLog(gym.Wrapper):
    """Keeps the reward and validity of every episode that an agent plays."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.rewards: list[float] = []
        self.valid: list[bool] = []

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            self.rewards.append(float(reward))
            self.valid.append(info["valid"])
        return observation, reward, terminated, truncated, info


@pytest.mark.slow
def test_maskable_ppo_learns_without_an_adapter():
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    env = gym.make(ID)
    assert is_masking_supported(env)
    log = EpisodeLog(env)
    agent = MaskablePPO("MultiInputPolicy", log, n_steps=250, batch_size=50, gamma=1.0, seed=0)
    agent.learn(2000)
    assert agent.num_timesteps == 2000
    assert all(log.valid)
    tenth = len(log.rewards) // 10
    assert np.mean(log.rewards[-tenth:]) > np.mean(log.rewards[:tenth])
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation, action_masks=get_action_masks(env))
    assert env.action_space.contains(action[()])


def test_stable_baselines_makes_it_from_its_id_and_gets_pictures():
    """Its helpers ask every environment that they make for `render_mode="rgb_array"`."""
    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.env_util import make_vec_env

    batch = make_vec_env(ID, n_envs=2, seed=0)
    batch.reset()
    assert [picture.shape for picture in batch.get_images()] == [(3 * 16 + 1, 8 * 16 + 1, 3)] * 2
    agent = MaskablePPO("MultiInputPolicy", ID, n_steps=4, batch_size=4, n_epochs=1, seed=0)
    agent.learn(4)
    assert agent.num_timesteps == 4


def test_masks_follow_the_conventions_of_masking_agents():
    """RLlib reads an `action_mask` of zeros and ones beside the other parts of the observation.

    Gymnasium samples with the int8 form, and sb3-contrib calls `action_masks`.
    """
    env = gym.make(ID)
    assert isinstance(env.observation_space, spaces.Dict)
    assert isinstance(env.action_space, spaces.Discrete)
    assert env.action_space.start == 0
    mask_space = env.observation_space["action_mask"]
    assert mask_space == spaces.Box(0, 1, (int(env.action_space.n),), dtype=np.int8)
    observation, info = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(100):
        mask = observation["action_mask"]
        assert set(mask.tolist()) <= {0, 1}
        np.testing.assert_array_equal(mask.astype(bool), info["action_mask"])
        np.testing.assert_array_equal(mask.astype(bool), env.get_wrapper_attr("action_masks")())
        action = env.action_space.sample(mask=mask)
        observation, _, terminated, truncated, info = env.step(action)
        assert not truncated
        if terminated:
            assert info["valid"]
            observation, info = env.reset()


@pytest.mark.parametrize("name", [ID, "rlrag/DocumentHops-v1"])
def test_the_observation_has_no_nested_spaces(name):
    """Stable-Baselines3 refuses a `Dict` within a `Dict`, so every part is a `Box`."""
    parts = gym.make(name).observation_space.spaces
    assert all(isinstance(part, spaces.Box) for part in parts.values())


def test_gymnasium_flattens_what_a_masking_network_reads():
    """The mask apart and all the rest as one vector: two of Gymnasium's own functions."""
    env = gym.make(ID)
    observation, _ = env.reset(seed=0)
    rest = spaces.Dict(
        {name: part for name, part in env.observation_space.items() if name != "action_mask"}
    )
    vector = spaces.flatten(rest, {name: observation[name] for name in rest})
    assert vector.shape == (spaces.flatdim(rest),)
    assert np.isfinite(vector).all()
    flat = gym.wrappers.FlattenObservation(env)
    assert flat.reset(seed=0)[0] in flat.observation_space


def test_gymnasiums_own_vectorisation_runs_it():
    batch = gym.make_vec(ID, num_envs=2, vectorization_mode="sync")
    batch.reset(seed=0)
    batch.action_space.seed(0)
    for _ in range(20):
        _, rewards, *_ = batch.step(batch.action_space.sample())
        assert np.isfinite(rewards).all()
    batch.close()


@pytest.mark.slow
def test_maskable_ppo_runs_where_the_pool_grows():
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.utils import is_masking_supported

    env = gym.make("rlrag/DocumentHops-v1", settings={"num_first": 4, "num_revealed": 2})
    assert is_masking_supported(env)
    log = EpisodeLog(env)
    agent = MaskablePPO("MultiInputPolicy", log, n_steps=128, batch_size=64, n_epochs=2, seed=0)
    agent.learn(512)
    assert agent.num_timesteps == 512
    assert len(log.rewards) > 50
    assert all(log.valid)
