"""The generator protocol: generate answers, and score given answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlrag.errors import GenerationError
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:  # weights bring torch, which a client of a remote generator does without
    from rlrag.generation.weights import GeneratorWeights


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are decoded; part of the cache key of every generation."""

    max_new_tokens: int = 12
    temperature: float = 0.0
    stop: tuple[str, ...] = ("\n",)
    seed: int = 0


@dataclass(slots=True)
class TokenCount:
    """Tokens that a generator computed (`spent`) and that a cache saved (`saved`).

    Each counts prompt tokens plus answer tokens of every request.
    """

    spent: int = 0
    saved: int = 0
    num_requests: int = 0
    num_cached: int = 0


@runtime_checkable
class Generator(Protocol):
    """A language model whose weights change only by `load_weights`.

    Calls keep the order of their arguments: element i of the result answers element i of the
    input. An empty input gives an empty list. Implementations raise `GenerationError` (or
    `GeneratorTimeoutError`) and never return a partial list; one that knows which prompt is to
    blame gives that prompt the error in the place of a result, so that the others keep theirs.
    """

    @property
    def identity(self) -> str:
        """Hash of weights, dtype and back end; equal identities give equal results."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights; every result carries the version that made it. 0 at the start."""
        ...

    @property
    def tokens(self) -> TokenCount:
        """Tokens counted since this object was made."""
        ...

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Answer with these weights from the next call on; `identity` and `version` change.

        Raises:
            GenerationError: when the tensors do not fit the model.
        """
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Sequence[Generation | GenerationError]:
        """Decode one answer a prompt; text ends before the first stop string and is stripped."""
        ...

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> Sequence[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt); `answers[i]` are the token ids after prompt i."""
        ...

    def close(self) -> None:
        """Free engines and actors; the object is unusable afterwards."""
        ...
