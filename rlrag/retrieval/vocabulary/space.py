"""Pools hidden states into one vector over the vocabulary per text.

    v(x)_w = max over the positions t of x of elu1p(h_t . e_w + b_w),   elu1p(a) = ELU(a) + 1

(VDR, Zhou et al. 2024; SiDR.) The maximum runs over the text's own positions and not over padding.
As elu1p only grows, it is applied after the maximum, which is the same and V instead of T * V
exponentials.

The logits of a text take T * V numbers, too many to keep for a batch. They are computed one text
and some columns at a time, and dropped. The backward pass computes again the few columns that have
a gradient, to find which position each maximum stood at.

Shape letters: B texts, T positions, D hidden size, V vocabulary, C some of its columns.
"""

from __future__ import annotations

from typing import Any

import torch

# Few enough for the logits of a text to stay in the processor's cache.
_CHUNK_COLUMNS = 4096


def elu1p(logits: torch.Tensor) -> torch.Tensor:
    """ELU(a) + 1: a + 1 above zero and e^a below, so always positive.

    The sum below keeps small values exact, where adding 1 to e^a - 1 would round them.

    Example:
        >>> elu1p(torch.tensor([2.0, 0.0, -20.0]))
        tensor([3.0000e+00, 1.0000e+00, 2.0612e-09])
    """
    return torch.relu(logits) + torch.exp(logits.clamp(max=0))


def sparsified(vectors_BV: torch.Tensor, bags_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Vectors with zeros outside their `top_k` largest entries and the tokens of the text.

    Example:
        >>> vector, bag = torch.tensor([[4.0, 1.0, 3.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> sparsified(vector, bag, top_k=2).tolist()
        [[4.0, 1.0, 3.0, 0.0]]
    """
    return vectors_BV.masked_fill(~kept_entries(vectors_BV, bags_BV, top_k), 0)


def kept_entries(vectors_BV: torch.Tensor, bags_BV: torch.Tensor, top_k: int) -> torch.Tensor:
    """Which entries `sparsified` keeps, as booleans."""
    kept_BV = bags_BV > 0
    largest_BK = vectors_BV.detach().topk(min(top_k, vectors_BV.shape[1]), dim=1).indices
    return kept_BV.scatter_(1, largest_BK, True)


def max_logits(
    hidden_BTD: torch.Tensor,
    mask_BT: torch.Tensor,
    embeddings_VD: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> torch.Tensor:
    """The largest logit of every word piece over the positions of a text, shape (B, V).

    Args:
        hidden_BTD: Hidden states.
        mask_BT: True where the text has a token; at least one a text.
        embeddings_VD: Vectors of the word pieces.
        bias_V: Added to every position's logits.

    Example:
        >>> hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> max_logits(hidden, mask, torch.eye(2)).tolist()
        [[1.0, 2.0]]
    """
    pooled_BV: torch.Tensor = _MaxLogits.apply(hidden_BTD, mask_BT, embeddings_VD)
    return pooled_BV if bias_V is None else pooled_BV + bias_V


class _MaxLogits(torch.autograd.Function):
    """A bias does not depend on the position, so it can be added after the maximum."""

    @staticmethod
    def forward(
        ctx: Any, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, embeddings_VD: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_BTD, mask_BT, embeddings_VD)
        pooled_BV = hidden_BTD.new_empty(len(hidden_BTD), len(embeddings_VD))
        for hidden_TD, mask_T, pooled_V in zip(hidden_BTD, mask_BT, pooled_BV, strict=True):
            kept_TD = hidden_TD[mask_T]
            for part_CD, pooled_C in zip(
                embeddings_VD.split(_CHUNK_COLUMNS), pooled_V.split(_CHUNK_COLUMNS), strict=True
            ):
                torch.amax(kept_TD @ part_CD.T, dim=0, out=pooled_C)
        return pooled_BV

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_BTD, mask_BT, embeddings_VD = ctx.saved_tensors
        (gradient_BV,) = gradients
        of_hidden_BTD = torch.zeros_like(hidden_BTD)
        of_embeddings_VD = torch.zeros_like(embeddings_VD)
        for text, gradient_V in enumerate(gradient_BV):
            columns_C = gradient_V.nonzero().squeeze(1)
            gradient_C1 = gradient_V[columns_C].unsqueeze(1)
            embeddings_CD = embeddings_VD[columns_C]
            hidden_TD = hidden_BTD[text]
            logits_TC = hidden_TD @ embeddings_CD.T
            best_C = logits_TC.masked_fill(~mask_BT[text].unsqueeze(1), -torch.inf).argmax(dim=0)
            of_hidden_BTD[text].index_add_(0, best_C, gradient_C1 * embeddings_CD)
            of_embeddings_VD.index_add_(0, columns_C, gradient_C1 * hidden_TD[best_C])
        return of_hidden_BTD, None, of_embeddings_VD
