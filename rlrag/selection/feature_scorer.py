"""A small network that scores candidates from frozen features and embeddings.

Shape letters: B questions, K picks, N candidates, F features, D embedding, P projection.
"""

from __future__ import annotations

import torch
from torch import nn

from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.features import candidate_features, num_features

HIDDEN_SIZE = 64
"""Units that read the few features of a candidate; more would have nothing more to read."""
PROJECTION_SIZE = 32
"""Numbers that embeddings are projected to: few, as few questions are to teach the projection."""


def retriever_prior(num_candidates: int, scale: float) -> torch.Tensor:
    """Logits of the retriever's order, shape (N,), for every pick: each rank costs `scale` nats."""
    return -scale * torch.arange(num_candidates, dtype=torch.float32)


class FeatureScorer(nn.Module):
    """logit_ti = -scale * rank_i + w_t . gelu(W features_i) + sqrt(D) * c_t . (A q * B d_i).

    t is the pick, first to last: what is worth showing first differs from what is worth showing
    last, next to the question. w and B start at zero, so that before training the logits of every
    pick are the retriever's order. The last term is a low-rank bilinear form of the frozen
    embeddings: it learns which kinds of passage answer which kinds of question.
    """

    def __init__(
        self,
        num_scores: int,
        vector_size: int,
        num_selected: int,
        prior_scale: float,
        hidden_size: int = HIDDEN_SIZE,
        projection_size: int = PROJECTION_SIZE,
    ) -> None:
        super().__init__()
        self.prior_scale = prior_scale
        self.vector_size = vector_size
        self.hidden = nn.Linear(num_features(num_scores), hidden_size)
        self.out = nn.Linear(hidden_size, num_selected, bias=False)
        nn.init.zeros_(self.out.weight)
        if vector_size:
            self.project_question = nn.Linear(vector_size, projection_size, bias=False)
            self.project_passage = nn.Linear(vector_size, projection_size, bias=False)
            nn.init.zeros_(self.project_passage.weight)
            self.pick_mixture_KP = nn.Parameter(torch.ones(num_selected, projection_size))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of shape (B, K, N)."""
        device = self.out.weight.device
        features_BNF = torch.from_numpy(candidate_features(batch)).to(device)
        logits_BKN = self.out(nn.functional.gelu(self.hidden(features_BNF))).transpose(1, 2)
        if self.vector_size:
            question_BP = self.project_question(
                torch.from_numpy(batch.question_vectors_BD).to(device)
            )
            passage_BNP = self.project_passage(
                torch.from_numpy(batch.passage_vectors_BND).to(device)
            )
            bilinear_BKN = torch.einsum(
                "bp,kp,bnp->bkn", question_BP, self.pick_mixture_KP, passage_BNP
            )
            logits_BKN = logits_BKN + self.vector_size**0.5 * bilinear_BKN
        prior_N = retriever_prior(logits_BKN.shape[-1], self.prior_scale).to(device)
        return prior_N + logits_BKN
