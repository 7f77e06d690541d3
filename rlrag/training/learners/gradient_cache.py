"""Gradient caching: contrastive losses over large batches with bounded memory.

Gradient caching (Gao et al., 2021, arXiv 2101.06983) for losses that compare all texts of a batch:
only a few texts have a graph at a time, and the weights' gradient is that of all of them at once.

Shape letters: B texts of a role, D vector length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from rlrag.retrieval.trainable.protocol import Embedded, Role

# A piece ends early where the next text would be mostly padding, unless it has few texts yet: each
# piece has a price of its own.
_MIN_LENGTH_SHARE = 0.75
_MIN_PIECE_TEXTS = 8


class Embeds(Protocol):
    """What gives vectors: an encoder, or one of its ways to embed."""

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        """Vectors of the texts, with gradient."""
        ...


class CachedTexts:
    """Vectors of texts, computed in pieces, through which a gradient can be sent back later.

    A piece has texts of one role and of alike length, so that little of it is padding. Graphs of
    the longest pieces are kept, as many as the limit allows; the others are embedded without a
    graph, and again with one when their gradient is known. Texts within the limit are thus embedded
    once.

    Args:
        encoder: Gives the same vector for a text every time.
        texts: The texts of each role.
        micro_batch_texts: Most texts that have a graph at a time.
    """

    def __init__(
        self, encoder: Embeds, texts: Mapping[Role, Sequence[str]], micro_batch_texts: int
    ) -> None:
        self._encoder = encoder
        self._texts = texts
        pieces = sorted(_pieces(texts, micro_batch_texts), key=lambda piece: piece[2])
        num_again, num_texts = len(pieces), 0
        while num_again and num_texts + len(pieces[num_again - 1][1]) <= micro_batch_texts:
            num_again -= 1
            num_texts += len(pieces[num_again][1])
        self._again = pieces[:num_again]
        with torch.no_grad():
            found = [(role, rows, self._embed(role, rows)) for role, rows, _ in self._again]
        self._kept = [(role, rows, self._embed(role, rows)) for role, rows, _ in pieces[num_again:]]
        self.embedded = {
            role: _joined([(rows, part) for name, rows, part in found + self._kept if name == role])
            for role in texts
            if len(texts[role])
        }
        """Vectors of all texts of a role in their order, without a graph."""

    @property
    def vector_size(self) -> int:
        """Length of a vector; 0 without texts."""
        return next((e.vectors_BD.shape[1] for e in self.embedded.values()), 0)

    @property
    def has_bags(self) -> bool:
        """Whether the encoder gives bags of tokens; False without texts."""
        return any(e.bags_BD is not None for e in self.embedded.values())

    def backward(self, gradients: Mapping[Role, torch.Tensor]) -> None:
        """Add to the weights' gradients what the vectors' gradients make of them; call it once."""
        while self._kept:
            role, rows, part = self._kept.pop()
            _backward(part, gradients[role][rows])
        for role, rows, _ in self._again:
            _backward(self._embed(role, rows), gradients[role][rows])

    def _embed(self, role: Role, rows: Sequence[int]) -> Embedded:
        return self._encoder.embed([self._texts[role][row] for row in rows], role)


def _backward(part: Embedded, gradient_BD: torch.Tensor) -> None:
    if part.vectors_BD.requires_grad:  # the encoder of one role may be frozen
        part.vectors_BD.backward(gradient_BD)


def _pieces(
    texts: Mapping[Role, Sequence[str]], size: int
) -> Iterator[tuple[Role, list[int], int]]:
    """Rows of at most `size` texts of one role, longest first, and the first one's length."""
    for role, of_role in texts.items():
        piece: list[int] = []
        for row in sorted(range(len(of_role)), key=lambda row: len(of_role[row]), reverse=True):
            longest = len(of_role[piece[0]]) if piece else 0
            is_padded = len(of_role[row]) < _MIN_LENGTH_SHARE * longest
            if len(piece) == size or (is_padded and len(piece) >= _MIN_PIECE_TEXTS):
                yield role, piece, longest
                piece = []
            piece.append(row)
        if piece:
            yield role, piece, len(of_role[piece[0]])


def _joined(parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
    """The pieces of one role, in the order of the texts, without a graph."""
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    vectors_BD = torch.cat([part.vectors_BD.detach() for _, part in parts])
    bags = [part.bags_BD for _, part in parts if part.bags_BD is not None]
    return Embedded(vectors_BD[order], torch.cat(bags)[order] if bags else None)
