"""A policy small enough to list all its selections: four candidates, two picks, by hand."""

from __future__ import annotations

import itertools
import math

import episodes
import numpy as np
import torch

from rlrag.algorithms import dro
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.plackett_luce import PlackettLucePolicy

NUM_CANDIDATES, NUM_SELECTED = 4, 2
PERMUTATIONS = list(itertools.permutations(range(NUM_CANDIDATES), NUM_SELECTED))


def independent(rewards_BM: torch.Tensor) -> torch.Tensor:
    """Log sample weights of independent draws from the policy: 1/m each."""
    return torch.full_like(rewards_BM, -math.log(rewards_BM.shape[1]))


class FixedLogits(torch.nn.Module):
    """The same logits for every question."""

    def __init__(self, logits_N: torch.Tensor) -> None:
        super().__init__()
        self.logits_N = torch.nn.Parameter(logits_N.clone())

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return self.logits_N.expand(len(batch), -1)


class EnumerableCase:
    """Four candidates, two picks: all twelve permutations with their probability and gradient."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.logits = torch.tensor(rng.normal(size=NUM_CANDIDATES), dtype=torch.float64)
        self.likelihood_Z = torch.tensor(
            rng.uniform(0.02, 0.9, size=len(PERMUTATIONS)), dtype=torch.float64
        )
        probabilities, gradients = [], []
        for permutation in PERMUTATIONS:
            probability, score = self._by_hand(permutation)
            probabilities.append(probability)
            gradients.append(score)
        self.probability_Z = torch.tensor(probabilities, dtype=torch.float64)
        self.score_ZN = torch.tensor(np.array(gradients))

    def _by_hand(self, permutation: tuple[int, ...]) -> tuple[float, np.ndarray]:
        """p(z) and d log p(z) / d logits, from the definition, without autograd."""
        left = list(range(NUM_CANDIDATES))
        probability, score = 1.0, np.zeros(NUM_CANDIDATES)
        for pick in permutation:
            strength = {j: math.exp(float(self.logits[j])) for j in left}
            total = sum(strength.values())
            probability *= strength[pick] / total
            score[pick] += 1
            for j in left:
                score[j] -= strength[j] / total
            left.remove(pick)
        return probability, score

    @property
    def exact_gradient(self) -> torch.Tensor:
        """d E[p(y|x,d_z)] / d logits."""
        return ((self.probability_Z * self.likelihood_Z)[:, None] * self.score_ZN).sum(dim=0)

    @property
    def exact_log_gradient(self) -> torch.Tensor:
        """d log E[p(y|x,d_z)] / d logits."""
        return self.exact_gradient / (self.probability_Z * self.likelihood_Z).sum()

    def coefficients(
        self, draws_RM: torch.Tensor, log_weights_RM: torch.Tensor, weighting: str, baseline: str
    ) -> torch.Tensor:
        """What the code gives samples of these permutations, shape (R, M)."""
        rewards_RM = self.likelihood_Z.log()[draws_RM]
        weights_RM = dro.importance_weights(rewards_RM, log_weights_RM, 1.0, weighting)
        valid_RM = dro.valid_samples(rewards_RM, log_weights_RM)
        return dro.coefficients(weights_RM, log_weights_RM, valid_RM, baseline)

    def estimates(
        self, num_samples: int, weighting: str, baseline: str, repeats: int
    ) -> torch.Tensor:
        """Gradient estimates, shape (repeats, N), from the code's weights and hand-made scores."""
        generator = torch.Generator().manual_seed(7)
        draws_RM = torch.multinomial(
            self.probability_Z.expand(repeats, -1), num_samples, True, generator=generator
        )
        log_weights_RM = independent(self.likelihood_Z[draws_RM])
        coefficient_RM = self.coefficients(draws_RM, log_weights_RM, weighting, baseline)
        return torch.einsum("rm,rmn->rn", coefficient_RM, self.score_ZN[draws_RM])

    def policy_draws(self, num_samples: int, repeats: int, **way) -> tuple[torch.Tensor, ...]:
        """Indices of permutations and log sample weights as the policy draws them, (R, M)."""
        batch = episodes.blank_batch(repeats, NUM_CANDIDATES)
        policy = PlackettLucePolicy(FixedLogits(self.logits), NUM_SELECTED)
        drawn = episodes.sample(
            policy, batch, num_samples, [[11, r] for r in range(repeats)], **way
        )
        index = np.zeros((NUM_CANDIDATES, NUM_CANDIDATES), dtype=np.int64)
        index[tuple(np.array(PERMUTATIONS).T)] = np.arange(len(PERMUTATIONS))
        draws_RM = torch.from_numpy(index[drawn.positions_BMK[..., 0], drawn.positions_BMK[..., 1]])
        return draws_RM, torch.from_numpy(drawn.log_weights_BM)


def mean_and_error(estimates_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return estimates_RN.mean(dim=0), estimates_RN.std(dim=0) / len(estimates_RN) ** 0.5
