"""Candidate scorers that read texts: a bi-encoder and a cross-encoder.

Shape letters: B questions, K picks, N candidates, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rlrag.errors import ConfigError
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection.feature_scorer import retriever_prior


class _TextEncoder(nn.Module):
    """A Hugging Face encoder with mean pooling over the tokens that are not padding.

    It reads `max_tokens` of a text; of a pair, whichever text is longer is cut until both fit.

    Raises:
        ConfigError: when the model reads fewer tokens.
    """

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.model = AutoModel.from_pretrained(
            model_dir, dtype=torch.float32, trust_remote_code=False
        )
        self.model.eval()  # dropout would make draws and gradients of one step disagree
        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        limit = min(
            getattr(self.model.config, "max_position_embeddings", max_tokens),
            self._tokenizer.model_max_length,
        )
        if max_tokens > limit:
            raise ConfigError(
                f"selector.max_tokens is {max_tokens}, but the encoder {model_dir} reads at most "
                f"{limit} tokens; lower it"
            )

    def forward(self, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
        device = next(self.model.parameters()).device
        tokens = self._tokenizer(
            texts,
            pairs,
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(device)
        states_BLD = self.model(**tokens).last_hidden_state
        mask_BL1 = tokens["attention_mask"].unsqueeze(-1).to(states_BLD.dtype)
        return (states_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)


class PairScorer(nn.Module):
    """w . f(q, d) of pairs of question and passage, w starting at zero.

    Equal pairs are read once in a call.
    """

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        super().__init__()
        self.encoder = _TextEncoder(model_dir, max_tokens)
        self.out = nn.Linear(self.encoder.model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """A number for each of X pairs, shape (X,)."""
        place_of = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
        questions, passages = ([pair[side] for pair in place_of] for side in (0, 1))
        scores_U: torch.Tensor = self.out(self.encoder(questions, passages)).squeeze(-1)
        return scores_U[[place_of[pair] for pair in pairs]]


class BiEncoderScorer(nn.Module):
    """logit_ti = -scale * rank_i + gate_t * cos(f(q), f(d_i)), the gate of each pick t from zero.

    Zero gates make the untrained policy the retriever's order; their own gradient is the first
    to move, and the encoder's follow.
    """

    def __init__(
        self, model_dir: Path, max_tokens: int, num_selected: int, prior_scale: float
    ) -> None:
        super().__init__()
        self.encoder = _TextEncoder(model_dir, max_tokens)
        self.prior_scale = prior_scale
        self.gate_K = nn.Parameter(torch.zeros(num_selected))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of shape (B, K, N)."""
        num_candidates = batch.scores_BNC.shape[1]
        passages = [text for texts in batch.passage_texts for text in texts]
        question_BD = nn.functional.normalize(self.encoder(list(batch.question_texts)), dim=-1)
        passage_ND = nn.functional.normalize(self.encoder(passages), dim=-1)
        passage_BND = passage_ND.view(len(batch), num_candidates, -1)
        cosine_BN = torch.einsum("bd,bnd->bn", question_BD, passage_BND)
        return _with_prior(torch.einsum("k,bn->bkn", self.gate_K, cosine_BN), self.prior_scale)


class CrossEncoderScorer(nn.Module):
    """logit_ti = -scale * rank_i + w_t . f(q, d_i), the w of each pick t starting at zero."""

    def __init__(
        self, model_dir: Path, max_tokens: int, num_selected: int, prior_scale: float
    ) -> None:
        super().__init__()
        self.encoder = _TextEncoder(model_dir, max_tokens)
        self.prior_scale = prior_scale
        self.out = nn.Linear(self.encoder.model.config.hidden_size, num_selected, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        """Logits of shape (B, K, N)."""
        num_candidates = batch.scores_BNC.shape[1]
        questions = [q for q in batch.question_texts for _ in range(num_candidates)]
        passages = [text for texts in batch.passage_texts for text in texts]
        logits_BNK = self.out(self.encoder(questions, passages)).view(
            len(batch), num_candidates, -1
        )
        return _with_prior(logits_BNK.transpose(1, 2), self.prior_scale)


def _with_prior(learned_BKN: torch.Tensor, scale: float) -> torch.Tensor:
    return retriever_prior(learned_BKN.shape[-1], scale).to(learned_BKN.device) + learned_BKN
