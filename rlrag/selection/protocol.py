"""What the rest of the package asks of a selection policy: samples, probabilities, its best pick.

Shape letters: B questions, M samples, N candidates, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rlrag.retrieval.candidates import CandidateBatch

Seed = int | Sequence[int]
"""Whatever numpy.random.default_rng takes to start a generator."""


@dataclass(frozen=True, slots=True)
class SampledSelections:
    """M ordered selections a question, drawn from a policy.

    `positions_BMK` index the candidates, first pick first; `logp_BM` are the log-probabilities
    log p(z | x) in nats under the policy itself, whatever proposal drew them.

    `log_weights_BM` are the logarithms of sample weights a_i, such that sum_i a_i f(z_i) is an
    unbiased estimate of E_{z~p}[f(z)]:

    - independent draws: a_i = p(z_i) / (m q(z_i)), which is 1/m when the proposal q is p;
    - draws without replacement: a_i = p(z_i) / q_i(kappa), see `rlrag.selection.gumbel_top_k`.

    A log weight of -inf marks padding: the row repeats another one and must count for nothing.
    """

    positions_BMK: np.ndarray
    logp_BM: np.ndarray
    log_weights_BM: np.ndarray


class SelectionPolicy(Protocol):
    """A distribution p(z | x) over ordered selections of K distinct candidates."""

    num_selected: int

    def sample(
        self,
        batch: CandidateBatch,
        num_samples: int,
        seeds: Sequence[Seed],
        temperature: float = 1.0,
        replacement: bool = True,
    ) -> SampledSelections:
        """Draw `num_samples` selections a question, with weights that correct for how.

        Args:
            batch: The questions and their candidates.
            num_samples: Selections a question (m).
            seeds: `seeds[b]` alone determines the draws of question b, so that they do not depend
                on which worker or batch the question falls into.
            temperature: Each pick is drawn from softmax(logits / temperature); above 1 explores
                more than the policy does.
            replacement: Draw independently; False draws m different selections. Where fewer than m
                exist, all are returned and the rest is padding.
        """
        ...

    def log_prob(self, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
        """Log p(z | x) in nats, shape (B, M), differentiable in the policy's parameters."""
        ...

    def pick_log_prob(self, batch: CandidateBatch, positions_BK: np.ndarray) -> np.ndarray:
        """Log-probability of each pick given those before it, in nats, shape (B, K)."""
        ...

    def greedy(self, batch: CandidateBatch) -> np.ndarray:
        """Most probable pick at every step, shape (B, K); ties keep the retriever's order."""
        ...
