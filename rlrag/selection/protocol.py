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
    log p(z | x) in nats under the policy that drew them.
    """

    positions_BMK: np.ndarray
    logp_BM: np.ndarray


class SelectionPolicy(Protocol):
    """A distribution p(z | x) over ordered selections of K distinct candidates."""

    num_selected: int

    def sample(
        self, batch: CandidateBatch, num_samples: int, seeds: Sequence[Seed]
    ) -> SampledSelections:
        """Draw `num_samples` selections a question.

        `seeds[b]` alone determines the draws of question b, so that they do not depend on which
        worker or batch the question falls into.
        """
        ...

    def log_prob(self, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
        """Log p(z | x) in nats, shape (B, M), differentiable in the policy's parameters."""
        ...

    def greedy(self, batch: CandidateBatch) -> np.ndarray:
        """Most probable pick at every step, shape (B, K); ties keep the retriever's order."""
        ...
