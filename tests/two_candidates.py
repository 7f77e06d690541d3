"""The smallest task that can be worked out by hand: two candidates, one pick, samples with rewards.

Both candidates have the same logits for every question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import episodes
import numpy as np
import torch

from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import RewardError
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateBatch, CandidateTable
from rlrag.training.dro.batch import RewardedBatch

LIKELIER_FIRST = [[math.log(0.3), math.log(0.1)]]  # importance weights 3/4 and 1/4


class FixedLogits(torch.nn.Module):
    """The same two logits for every question: the smallest scorer that can be trained."""

    def __init__(self, logits: tuple[float, float]) -> None:
        super().__init__()
        self.logits_N = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return self.logits_N.expand(len(batch), -1)


def two_candidates(num_questions: int = 2) -> CandidateTable:
    return CandidateTable(
        questions=tuple(Question(f"q{q}", "?", ("a",)) for q in range(num_questions)),
        corpus=MemoryCorpus([Passage("p0", "", "a"), Passage("p1", "", "b")]),
        rows_QN=np.tile(np.arange(2), (num_questions, 1)),
        scores_QNC=np.zeros((num_questions, 2, 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((num_questions, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((2, 0), dtype=np.float32),
    )


def drawn(
    rewards: Sequence[Sequence[float]],
    positions: Sequence[Sequence[int]] | None = None,
    errors: tuple[RewardError, ...] = (),
    behaviour: tuple[float, ...] = (0.5, 0.5),
    log_weights: Sequence[Sequence[float]] | None = None,
) -> RewardedBatch:
    """Samples of each question with their rewards; by default one of each candidate.

    `behaviour` are the candidates' probabilities when the samples were drawn.
    """
    positions_BM = np.array(positions if positions is not None else [[0, 1]] * len(rewards))
    return episodes.experience(
        two_candidates(max(2, len(rewards))),
        range(len(rewards)),
        positions_BM[..., None],
        rewards,
        np.log(np.array(behaviour, dtype=np.float32))[positions_BM],
        None if log_weights is None else np.array(log_weights),
        errors,
    )
