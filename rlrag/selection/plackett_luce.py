"""Candidate logits in; samples, log-probabilities and the greedy order of Plackett-Luce out.

A Plackett-Luce permutation picks one candidate after another, each with softmax probability among
those that are left (Plackett, 1975; Luce, 1959):

    log p(z | x) = sum_t [ s_{t, z_t} - logsumexp_{j not in z_<t} s_{t, j} ]

which is DRO's Eq. 1 with candidates in place of tokens. The classical model has the same logits s
at every pick t. Logits of their own for each pick say that the passage worth showing first need not
be the one worth showing last, next to the question; with equal ones a passage that must be among
the picks comes early, whatever its best place is. Adding independent Gumbel(0, 1) noise to the
logits of a pick and taking the largest that is left draws from it exactly (Yellott, 1977).

Dividing the logits by a temperature gives a flatter or sharper proposal of the same form; samples
then carry weights that correct for it.

Shape letters: B questions, M samples, N candidates, K selected, P prefixes, T picks so far. Logits
of shape (B, N) are the same for every pick, those of shape (B, K, N) differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rlrag.errors import ConfigError
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.gumbel_top_k import NextPick, sample_distinct
from rlrag.selection.protocol import SampledSelections, Seed

_LOWEST = np.finfo(np.float64).min


def log_prob(logits: torch.Tensor, positions_BMK: torch.Tensor) -> torch.Tensor:
    """Log-probability of ordered selections, shape (B, M), in nats.

    K = N gives the probability of a whole permutation; K = 0 gives 0. Positions must be distinct
    within a selection; a repeated one has log-probability -inf.

    Example:
        >>> two = torch.log(torch.tensor([[3.0, 1.0]]))
        >>> log_prob(two, torch.tensor([[[0, 1], [1, 0]]])).exp()
        tensor([[0.7500, 0.2500]])
    """
    return pick_log_prob(logits, positions_BMK).sum(dim=-1)


def pick_log_prob(logits: torch.Tensor, positions_BMK: torch.Tensor) -> torch.Tensor:
    """Log-probability of each pick given those before it, shape (B, M, K), in nats.

    Example:
        >>> two = torch.log(torch.tensor([[3.0, 1.0]]))
        >>> pick_log_prob(two, torch.tensor([[[1, 0]]])).exp()
        tensor([[[0.2500, 1.0000]]])
    """
    num_samples, num_selected = positions_BMK.shape[1:]
    logits_B1KN = (logits.unsqueeze(1) if logits.ndim == 2 else logits).unsqueeze(1)
    logp_BMK = [logits.new_zeros((*positions_BMK.shape[:2], 0))]
    taken_BMN = torch.zeros_like(logits_B1KN[:, :, 0], dtype=torch.bool).repeat(1, num_samples, 1)
    for step in range(num_selected):
        picked_BM1 = positions_BMK[..., step : step + 1]
        pick = min(step, logits_B1KN.shape[2] - 1)
        left_BMN = logits_B1KN[:, :, pick].masked_fill(taken_BMN, float("-inf"))
        step_logp_BMN = left_BMN.log_softmax(dim=-1)
        logp_BMK.append(step_logp_BMN.gather(-1, picked_BM1))
        taken_BMN = taken_BMN.scatter(-1, picked_BM1, True)
    return torch.cat(logp_BMK, dim=-1)


def sample(
    logits: np.ndarray, num_samples: int, num_selected: int, seeds: Sequence[Seed]
) -> np.ndarray:
    """Draw ordered selections, int64 of shape (B, M, K); `seeds[b]` determines those of row b."""
    logits_BKN = _each_pick(logits, num_selected)
    shape = (num_samples, *logits_BKN.shape[1:])
    noise_BMKN = np.stack([np.random.default_rng(seed).gumbel(size=shape) for seed in seeds])
    return _largest_left(logits_BKN[:, None] + noise_BMKN)


def next_pick(logits_KN: np.ndarray) -> NextPick:
    """Log-probabilities of one question's next pick after given prefixes; -inf for those taken.

    Logits of shape (N,) are the same for every pick.

    Example:
        >>> after = next_pick(np.log([2.0, 1.0, 1.0]))
        >>> np.exp(after(np.array([[1]]))).round(3).tolist()
        [[0.667, 0.0, 0.333]]
    """

    def logp_after(prefixes_PT: np.ndarray) -> np.ndarray:
        logits_N = logits_KN if logits_KN.ndim == 1 else logits_KN[prefixes_PT.shape[1]]
        left_PN = np.tile(logits_N, (len(prefixes_PT), 1))
        np.put_along_axis(left_PN, prefixes_PT, -np.inf, axis=1)
        total_P1 = np.logaddexp.reduce(left_PN, axis=1, keepdims=True)
        return left_PN - np.maximum(total_P1, _LOWEST)  # -inf where nothing is left, not NaN

    return logp_after


def greedy(logits: np.ndarray, num_selected: int) -> np.ndarray:
    """The most probable candidate left at every pick, shape (B, K); ties go to the first."""
    return _largest_left(_each_pick(logits, num_selected))


def _each_pick(logits: np.ndarray, num_selected: int) -> np.ndarray:
    """Logits of shape (B, K, N), where K picks may share those of shape (B, N)."""
    return np.repeat(logits[:, None], num_selected, axis=1) if logits.ndim == 2 else logits


def _largest_left(values: np.ndarray) -> np.ndarray:
    """At each pick the largest of its values (..., K, N) that no earlier pick took, (..., K)."""
    values = values.copy()
    picks = np.zeros(values.shape[:-1], dtype=np.int64)
    for step in range(values.shape[-2]):
        picks[..., step] = values[..., step, :].argmax(axis=-1)
        np.put_along_axis(values, picks[..., step][..., None, None], -np.inf, axis=-1)
    return picks


class PlackettLucePolicy(nn.Module):
    """Plackett-Luce over the logits that `scorer` gives the candidates.

    Args:
        scorer: A module that maps a `CandidateBatch` to logits of shape (B, K, N), or (B, N) for
            all picks. Before training it must rank as the retriever does; the scorers of this
            package do.
        num_selected: Passages in a selection (K).
    """

    micro_batch: int | None = None
    """Questions that a learner has in one forward pass; None takes all that it has."""

    def __init__(self, scorer: nn.Module, num_selected: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.num_selected = num_selected

    def logits(self, batch: CandidateBatch) -> torch.Tensor:
        """What the scorer gives: logits of the candidates, at each pick or at all.

        Raises:
            ConfigError: when they have another shape.
        """
        logits = self.scorer(batch)
        num_questions, num_candidates = batch.scores_BNC.shape[:2]
        for_all = (num_questions, num_candidates)
        for_each = (num_questions, self.num_selected, num_candidates)
        if tuple(logits.shape) not in (for_all, for_each):
            raise ConfigError(
                f"{type(self.scorer).__name__} gave logits of shape {tuple(logits.shape)}; a "
                f"scorer must give {for_all}, a logit for each candidate, or {for_each}, one for "
                "each pick and candidate"
            )
        return logits

    def sample(
        self,
        batch: CandidateBatch,
        num_samples: int,
        seeds: Sequence[Seed],
        temperature: float = 1.0,
        replacement: bool = True,
    ) -> SampledSelections:
        """See `SelectionPolicy.sample`.

        The weights are computed in float64 on the CPU: they are ratios of probabilities, which
        may be far apart.
        """
        with torch.no_grad():
            logits = self.logits(batch)
            exact = logits.double().cpu()
            draw = self._independent if replacement else self._distinct
            positions_BMK, log_rate_BM = draw(exact / temperature, num_samples, seeds)
            positions = torch.from_numpy(positions_BMK)
            logp_BM = log_prob(logits, positions.to(logits.device))
            log_weights_BM = log_prob(exact, positions).numpy() - log_rate_BM
        if replacement:
            log_weights_BM = log_weights_BM - math.log(num_samples)
        return SampledSelections(positions_BMK, logp_BM.cpu().numpy(), log_weights_BM)

    def _independent(
        self, proposal: torch.Tensor, num_samples: int, seeds: Sequence[Seed]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws and the log-probability of each under the proposal."""
        positions_BMK = sample(proposal.numpy(), num_samples, self.num_selected, seeds)
        return positions_BMK, log_prob(proposal, torch.from_numpy(positions_BMK)).numpy()

    def _distinct(
        self, proposal: torch.Tensor, num_samples: int, seeds: Sequence[Seed]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws without replacement and the log-probability that each is among them."""
        drawn = [
            sample_distinct(next_pick(logits_KN), num_samples, self.num_selected, seed)
            for logits_KN, seed in zip(proposal.numpy(), seeds, strict=True)
        ]
        return np.stack([d.positions_MK for d in drawn]), np.stack(
            [d.log_inclusion_M for d in drawn]
        )

    def log_prob(self, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
        """See `SelectionPolicy.log_prob`."""
        logits = self.logits(batch)
        return log_prob(logits, torch.from_numpy(positions_BMK).to(logits.device))

    def pick_log_prob(self, batch: CandidateBatch, positions_BK: np.ndarray) -> np.ndarray:
        """See `SelectionPolicy.pick_log_prob`."""
        with torch.no_grad():
            logits = self.logits(batch).double().cpu()
            return pick_log_prob(logits, torch.from_numpy(positions_BK)[:, None])[:, 0].numpy()

    def greedy(self, batch: CandidateBatch) -> np.ndarray:
        """See `SelectionPolicy.greedy`."""
        with torch.no_grad():
            return greedy(self.logits(batch).double().cpu().numpy(), self.num_selected)

    def first_pick_probabilities(self, batch: CandidateBatch) -> np.ndarray:
        """Probability that each candidate is picked first, shape (B, N)."""
        with torch.no_grad():
            logits = self.logits(batch)
            first_BN = logits if logits.ndim == 2 else logits[:, 0]
            return first_BN.softmax(dim=-1).cpu().numpy()
