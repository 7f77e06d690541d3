"""The two steps of DRO by hand, with a policy of your own.

    python -m examples.dro_by_hand

The task is the built-in one, which needs no language model, so that this takes seconds. Shape
letters: B questions, M samples, E = B * M episodes.
"""

from __future__ import annotations

import numpy as np
import torch

from examples.own_policy import AgreementPolicy
from rlrag.algorithms import dro
from rlrag.config import EnvironmentConfig
from rlrag.environment.episodes import EpisodeBatch, open_episodes
from rlrag.environment.rollout import play
from rlrag.environment.sample_task import sample_candidates
from rlrag.rewards.answering import PassageReward
from rlrag.selection.protocol import Draws

NUM_SAMPLES, TEMPERATURE = 8, 0.3


def mean_reward(episodes: EpisodeBatch, policy: AgreementPolicy, rows: np.ndarray) -> float:
    """Of the policy's most probable episodes."""
    return float(play(episodes, policy, rows).rewards_E.mean())


def train(num_steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Mean reward of the untrained and of the trained policy, on the questions trained on."""
    table, config = sample_candidates(), EnvironmentConfig(num_selected=1)
    policy, reward = AgreementPolicy(table.vector_size), PassageReward(cost_per_passage=0.1)
    rows = np.arange(len(table))
    one = open_episodes(config, len(rows), table, reward)
    many = open_episodes(config, len(rows) * NUM_SAMPLES, table, reward)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    before = mean_reward(one, policy, rows)
    for step in range(num_steps):
        # E-step: draw episodes and weigh them by their rewards.
        drawn = play(many, policy, rows, Draws([[seed, step, r] for r in rows], NUM_SAMPLES))
        rewards_BM = torch.from_numpy(drawn.rewards_E).view(-1, NUM_SAMPLES)
        log_weights_BM = torch.from_numpy(drawn.log_weights_E).view(-1, NUM_SAMPLES)
        weights_BM = dro.importance_weights(
            rewards_BM, log_weights_BM, TEMPERATURE, "self_normalised"
        )
        valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
        coefficients_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, "mean")
        # M-step: make the good ones likelier.
        optimizer.zero_grad()
        logp_BM = policy.log_prob(drawn).sum(dim=1).view(-1, NUM_SAMPLES)
        dro.selector_loss(logp_BM, coefficients_BM).mean().backward()
        optimizer.step()
    return before, mean_reward(one, policy, rows)


if __name__ == "__main__":
    untrained, trained = train()
    print(f"mean reward of the retriever's first passage {untrained:.3f}, trained {trained:.3f}")
