"""Candidate logits in; samples, log-probabilities and the greedy order of Plackett-Luce out.

A Plackett-Luce permutation picks one candidate after another, each with softmax probability among
those that are left (Plackett, 1975; Luce, 1959):

    log p(z | x) = sum_t [ s_{z_t} - logsumexp_{j not in z_<t} s_j ]

which is DRO's Eq. 1 with candidates in place of tokens. Adding independent Gumbel(0, 1) noise to
the logits and sorting draws from it exactly (Yellott, 1977).

Shape letters: B questions, M samples, N candidates, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.protocol import SampledSelections, Seed


def log_prob(logits_BN: torch.Tensor, positions_BMK: torch.Tensor) -> torch.Tensor:
    """Log-probability of ordered selections, shape (B, M), in nats.

    K = N gives the probability of a whole permutation; K = 0 gives 0. Positions must be distinct
    within a selection; a repeated one has log-probability -inf.

    Example:
        >>> two = torch.log(torch.tensor([[3.0, 1.0]]))
        >>> log_prob(two, torch.tensor([[[0, 1], [1, 0]]])).exp()
        tensor([[0.7500, 0.2500]])
    """
    num_samples, num_selected = positions_BMK.shape[1:]
    left_BMN = logits_BN.unsqueeze(1).expand(-1, num_samples, -1)
    logp_BM = logits_BN.new_zeros(positions_BMK.shape[:2])
    for step in range(num_selected):
        picked_BM1 = positions_BMK[..., step : step + 1]
        step_logp_BMN = left_BMN.log_softmax(dim=-1)
        logp_BM = logp_BM + step_logp_BMN.gather(-1, picked_BM1).squeeze(-1)
        left_BMN = left_BMN.scatter(-1, picked_BM1, float("-inf"))
    return logp_BM


def sample(
    logits_BN: np.ndarray, num_samples: int, num_selected: int, seeds: Sequence[Seed]
) -> np.ndarray:
    """Draw ordered selections, int64 of shape (B, M, K); `seeds[b]` determines those of row b."""
    num_candidates = logits_BN.shape[1]
    noise_BMN = np.stack(
        [np.random.default_rng(seed).gumbel(size=(num_samples, num_candidates)) for seed in seeds]
    )
    return np.argsort(-(logits_BN[:, None, :] + noise_BMN), axis=-1)[..., :num_selected]


def greedy(logits_BN: np.ndarray, num_selected: int) -> np.ndarray:
    """The K largest logits in descending order, shape (B, K); equal logits keep their order."""
    return np.argsort(-logits_BN, axis=-1, kind="stable")[:, :num_selected]


class PlackettLucePolicy(nn.Module):
    """Plackett-Luce over the logits that `scorer` gives the candidates.

    Args:
        scorer: A module that maps a `CandidateBatch` to logits of shape (B, N). Before training it
            must rank as the retriever does; the scorers of this package do.
        num_selected: Passages in a selection (K).
    """

    def __init__(self, scorer: nn.Module, num_selected: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.num_selected = num_selected

    def logits(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of the candidates, float32 of shape (B, N)."""
        return self.scorer(batch)

    def sample(
        self, batch: CandidateBatch, num_samples: int, seeds: Sequence[Seed]
    ) -> SampledSelections:
        """See `SelectionPolicy.sample`."""
        with torch.no_grad():
            logits_BN = self.logits(batch)
            positions_BMK = sample(
                logits_BN.double().cpu().numpy(), num_samples, self.num_selected, seeds
            )
            positions = torch.from_numpy(positions_BMK).to(logits_BN.device)
            logp_BM = log_prob(logits_BN, positions)
        return SampledSelections(positions_BMK, logp_BM.cpu().numpy())

    def log_prob(self, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
        """See `SelectionPolicy.log_prob`."""
        logits_BN = self.logits(batch)
        return log_prob(logits_BN, torch.from_numpy(positions_BMK).to(logits_BN.device))

    def greedy(self, batch: CandidateBatch) -> np.ndarray:
        """See `SelectionPolicy.greedy`."""
        with torch.no_grad():
            return greedy(self.logits(batch).double().cpu().numpy(), self.num_selected)

    def first_pick_probabilities(self, batch: CandidateBatch) -> np.ndarray:
        """Probability that each candidate is picked first, shape (B, N)."""
        with torch.no_grad():
            return self.logits(batch).softmax(dim=-1).cpu().numpy()
