"""A policy of your own, trained by DRO on the environment; nothing in, its mean reward out.

    python -m examples.own_policy

The task is the built-in one, which needs no language model, so that this takes seconds. Shape
letters: B questions, M samples, N candidates, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from torch import nn

import envs  # noqa: F401 - its import registers the environment
from envs.sample_task import sample_candidates
from rlrag.algorithms import dro
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.plackett_luce import PlackettLucePolicy

NUM_SELECTED, NUM_SAMPLES, TEMPERATURE = 1, 8, 0.3


class Scorer(nn.Module):
    """The retriever's order, and a learned view of how question and passage vectors agree."""

    def __init__(self, vector_size: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(vector_size))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of the candidates, shape (B, N); untrained, they rank as the retriever does."""
        question_B1D = torch.from_numpy(batch.question_vectors_BD)[:, None]
        passage_BND = torch.from_numpy(batch.passage_vectors_BND)
        rank_N = torch.arange(passage_BND.shape[1])
        return (question_B1D * passage_BND) @ self.weights - 0.5 * rank_N


def play(env: gymnasium.Env, question_row: int, picks: Sequence[int]) -> float:
    """The reward of one episode."""
    env.reset(options={"question_row": question_row})
    for pick in picks:
        _, reward, *_ = env.step(int(pick))
    return float(reward)


def mean_reward(env: gymnasium.Env, policy: PlackettLucePolicy, rows: np.ndarray) -> float:
    """Of the policy's best selections."""
    picks_BK = policy.greedy(sample_candidates().batch(rows))
    return float(
        np.mean([play(env, row, picks) for row, picks in zip(rows, picks_BK, strict=True)])
    )


def train(num_steps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Mean reward of the untrained and of the trained policy, on the questions trained on."""
    table = sample_candidates()
    env = gymnasium.make("rlrag/DocumentSelection-v1", num_selected=NUM_SELECTED)
    policy = PlackettLucePolicy(Scorer(table.vector_size), NUM_SELECTED)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0)
    rows = np.arange(len(table))
    batch = table.batch(rows)
    before = mean_reward(env, policy, rows)
    for step in range(num_steps):
        # E-step: draw selections, play them, weigh them by their rewards.
        drawn = policy.sample(batch, NUM_SAMPLES, [[seed, step, int(row)] for row in rows])
        rewards_BM = torch.tensor(
            [
                [play(env, row, picks) for picks in drawn.positions_BMK[place]]
                for place, row in enumerate(rows)
            ]
        )
        log_weights_BM = torch.from_numpy(drawn.log_weights_BM)
        weights_BM = dro.importance_weights(
            rewards_BM, log_weights_BM, TEMPERATURE, "self_normalised"
        )
        valid_BM = dro.valid_samples(rewards_BM, log_weights_BM)
        coefficients_BM = dro.coefficients(weights_BM, log_weights_BM, valid_BM, "mean")
        # M-step: make the good ones likelier.
        optimizer.zero_grad()
        logp_BM = policy.log_prob(batch, drawn.positions_BMK)
        dro.selector_loss(logp_BM, coefficients_BM).mean().backward()
        optimizer.step()
    return before, mean_reward(env, policy, rows)


if __name__ == "__main__":
    untrained, trained = train()
    print(f"mean reward of the retriever's first passage {untrained:.3f}, trained {trained:.3f}")
