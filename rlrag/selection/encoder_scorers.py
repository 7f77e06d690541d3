"""Texts in; one logit a candidate out, from a transformer encoder that is trained itself.

Shape letters: B questions, N candidates, L tokens, D hidden.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.feature_scorer import retriever_prior


class _TextEncoder(nn.Module):
    """A Hugging Face encoder with mean pooling over the tokens that are not padding."""

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.model = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
        self.model.eval()  # dropout would make draws and gradients of one step disagree
        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def forward(self, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
        device = next(self.model.parameters()).device
        tokens = self._tokenizer(
            texts,
            pairs,
            padding=True,
            truncation="only_second" if pairs else True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(device)
        states_BLD = self.model(**tokens).last_hidden_state
        mask_BL1 = tokens["attention_mask"].unsqueeze(-1).to(states_BLD.dtype)
        return (states_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)


class BiEncoderScorer(nn.Module):
    """logit_i = -scale * rank_i + gate * cos(f(q), f(d_i)), gate starting at zero.

    The zero gate makes the untrained policy the retriever's order; its own gradient is the first to
    move, and the encoder's follow.
    """

    def __init__(self, model_dir: Path, max_tokens: int, prior_scale: float) -> None:
        super().__init__()
        self.encoder = _TextEncoder(model_dir, max_tokens)
        self.prior_scale = prior_scale
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of shape (B, N)."""
        num_candidates = batch.scores_BNC.shape[1]
        passages = [text for texts in batch.passage_texts for text in texts]
        question_BD = nn.functional.normalize(self.encoder(list(batch.question_texts)), dim=-1)
        passage_ND = nn.functional.normalize(self.encoder(passages), dim=-1)
        passage_BND = passage_ND.view(len(batch), num_candidates, -1)
        cosine_BN = torch.einsum("bd,bnd->bn", question_BD, passage_BND)
        return _with_prior(self.gate * cosine_BN, self.prior_scale)


class CrossEncoderScorer(nn.Module):
    """logit_i = -scale * rank_i + w . f(q, d_i), w starting at zero."""

    def __init__(self, model_dir: Path, max_tokens: int, prior_scale: float) -> None:
        super().__init__()
        self.encoder = _TextEncoder(model_dir, max_tokens)
        self.prior_scale = prior_scale
        self.out = nn.Linear(self.encoder.model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of shape (B, N)."""
        num_candidates = batch.scores_BNC.shape[1]
        questions = [q for q in batch.question_texts for _ in range(num_candidates)]
        passages = [text for texts in batch.passage_texts for text in texts]
        pooled = self.encoder(questions, passages)
        return _with_prior(self.out(pooled).view(len(batch), num_candidates), self.prior_scale)


def _with_prior(learned_BN: torch.Tensor, scale: float) -> torch.Tensor:
    return retriever_prior(learned_BN.shape[1], scale).to(learned_BN.device) + learned_BN
