"""The protocol of trainable encoders: vectors with gradients, saved to a directory.

Shape letters: B texts, D vector length (the vocabulary's, for an encoder into vocabulary space).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Role = Literal["question", "passage"]
"""Questions and passages may have an encoder each."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors of B texts, shape (B, D), with gradient.

    `bags_BD` holds a 1 for every token that the text contains, without gradient, where the encoder
    maps into vocabulary space; a dense encoder has none.
    """

    vectors_BD: torch.Tensor
    bags_BD: torch.Tensor | None = None


class TrainableEncoder(Protocol):
    """A text encoder whose weights a trainer changes; implemented by torch modules.

    Equal weights give equal vectors: dropout is off, also in training, so that a vector that is
    computed twice in a step is the same.
    """

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        """Vectors of the texts, with gradient."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The weights, as of a torch module."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """The weights by name, as of a torch module."""
        ...

    def save_pretrained(self, directory: Path) -> None:
        """Write a new directory from which the retriever of its kind loads these weights."""
        ...
