"""A policy of your own, trained by DRO on the environment.

    python -m examples.own_policy

The task is the built-in one, which needs no language model, so that this takes seconds. Shape
letters: B questions, M samples, E = B * M episodes, N candidates, A actions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rlrag.algorithms import dro
from rlrag.config import EnvironmentConfig
from rlrag.environment.episodes import EpisodeBatch, open_episodes
from rlrag.environment.rollout import play
from rlrag.environment.sample_task import sample_candidates
from rlrag.records import Columns, Trajectories
from rlrag.rewards.answering import PassageReward
from rlrag.selection.plackett_luce import action_logp
from rlrag.selection.protocol import Actions, Draws, Turn

NUM_SAMPLES, TEMPERATURE = 8, 0.3


class AgreementPolicy(nn.Module):
    """Picks by the retriever's rank and a learned view of how question and passage agree."""

    def __init__(self, vector_size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(vector_size))

    def act(self, observations: Columns, infos: Columns, turn: Turn) -> Actions:
        """The most probable action, or one that is drawn."""
        with torch.no_grad():
            logp_EA = self._logp(observations)
        values_EA = logp_EA.double().numpy()
        if turn.draws is not None:
            generators = turn.notes.setdefault(
                "generators", [np.random.default_rng(seed) for seed in turn.draws.seeds]
            )
            shape = (turn.draws.num_samples, values_EA.shape[1])
            values_EA = values_EA + np.concatenate([g.gumbel(size=shape) for g in generators])
        actions_E = values_EA.argmax(axis=1)
        logp_E = logp_EA.numpy()[np.arange(len(actions_E)), actions_E]
        return Actions(actions_E, logp_E, np.zeros(len(actions_E)))

    def log_prob(self, trajectories: Trajectories) -> torch.Tensor:
        """Log-probability of each action; every episode has one."""
        actions_E1 = torch.from_numpy(trajectories.actions_ET)
        return self._logp(trajectories.observations[0]).gather(1, actions_E1)

    def _logp(self, observations: Columns) -> torch.Tensor:
        question_E1D = torch.from_numpy(observations["question_embedding"])[:, None]
        passage_END = torch.from_numpy(observations["candidate_embeddings"])
        rank_N = torch.arange(passage_END.shape[1])
        logits_EN = (question_E1D * passage_END) @ self.weights - 0.5 * rank_N
        never_E1 = torch.full((len(logits_EN), 1), -1e9)  # it does not stop by itself
        allowed_EA = torch.from_numpy(observations["action_mask"]).bool()
        return action_logp(torch.cat([logits_EN, never_E1], dim=1), allowed_EA)


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
