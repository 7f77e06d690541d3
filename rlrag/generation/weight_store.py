"""A pool's newest weights: tensors of the learner in, what a restarted engine loads out.

One copy lies in Ray's object store, piece by piece, and engines on its node read it without a copy
of their own. An object lives as long as the process that owns it, and the learner may die; so the
`WeightStore` actor owns the pieces: it gets each as an argument, whose copy ends with the call, and
puts it itself. Giving up the old set before the first new piece arrives keeps the peak at one copy
and a piece, instead of two copies. What that costs: an engine that restarts while a set is on its
way has to wait until it has arrived.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from rlrag.errors import GenerationError, GeneratorTimeoutError, RlragError

if TYPE_CHECKING:  # the store's own process does without torch
    import torch

    from rlrag.generation.weights import GeneratorWeights

_PIECE_BYTES = 64 * 2**20
_CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class WeightsTag:
    """Which set of weights; without a digest, what the engines started with."""

    version: int = 0
    digest: str | None = None

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest or 'as loaded from disk'})"


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor as bytes, which Ray moves without a copy in every number format."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A complete set; `pieces` are references to lists of `PackedTensor`."""

    tag: WeightsTag
    pieces: tuple[ray.ObjectRef, ...]


class WeightStore:
    """What runs in an actor: the newest complete set, or none while one is on its way."""

    def __init__(self) -> None:
        self._complete: StoredWeights | None = None
        self._tag: WeightsTag | None = None
        self._pieces: list[ray.ObjectRef] = []

    def begin(self, tag: WeightsTag) -> None:
        """Give up what is held; pieces of `tag` follow."""
        self._complete = None
        self._pieces = []
        self._tag = tag

    def add(self, tag: WeightsTag, piece: list[PackedTensor]) -> None:
        """Keep one more piece.

        Raises:
            GenerationError: when another set was begun meanwhile.
        """
        self._check(tag)
        self._pieces.append(ray.put(piece))

    def finish(self, tag: WeightsTag) -> None:
        """From now on `newest` is this set.

        Raises:
            GenerationError: when another set was begun meanwhile.
        """
        self._check(tag)
        self._complete = StoredWeights(tag, tuple(self._pieces))
        self._pieces = []

    def newest(self) -> StoredWeights | None:
        """The complete set, if there is one."""
        return self._complete

    def _check(self, tag: WeightsTag) -> None:
        if tag != self._tag:
            raise GenerationError(
                f"a piece of weights of {tag} came while {self._tag or 'nothing'} was awaited: "
                "two processes push to one pool, or its weight store was restarted; let one "
                "process push, and push again"
            )


def store_weights(store: Any, weights: GeneratorWeights) -> WeightsTag:
    """Send a set to the store, one piece at a time, so that no second copy arises.

    Raises:
        GenerationError: when the store is gone or the object store is full.
        GeneratorTimeoutError: when it does not answer.
    """
    tag = WeightsTag(weights.version, weights.digest)
    call_store(store.begin.remote(tag), "begin a set of weights")
    for piece in _pieces(weights.tensors):
        call_store(store.add.remote(tag, piece), "take a piece of the weights")
    call_store(store.finish.remote(tag), "finish a set of weights")
    return tag


def call_store(ref: Any, what: str) -> Any:
    """The answer of the weight store, within a minute.

    Raises:
        GenerationError: when the store is gone or failed.
        GeneratorTimeoutError: when it does not answer.
    """
    try:
        return ray.get(ref, timeout=_CALL_TIMEOUT_S)
    except GetTimeoutError as error:
        raise GeneratorTimeoutError(
            f"the pool's weight store did not {what} within {_CALL_TIMEOUT_S:.0f} s; check the "
            "load of its node and the size of Ray's object store"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, RlragError):
            raise error.cause from error
        raise GenerationError(f"the pool's weight store could not {what}: {error}") from error
    except RayError as error:
        raise GenerationError(
            f"the pool's weight store could not {what}: {type(error).__name__}: {error}; if it "
            "died, push the weights again"
        ) from error


def fetch_tensors(stored: StoredWeights, timeout_s: float) -> dict[str, torch.Tensor]:
    """Tensors that share the object store's memory; read them, never write.

    Raises:
        GenerationError: when a piece is lost or does not arrive in time.
    """
    try:
        pieces = ray.get(list(stored.pieces), timeout=timeout_s)
    except (RayError, GetTimeoutError) as error:
        raise GenerationError(
            f"the weights of {stored.tag} could not be fetched from the pool's weight store: "
            f"{type(error).__name__}: {error}; push them again"
        ) from error
    return {packed.name: _unpack(packed) for piece in pieces for packed in piece}


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[PackedTensor]]:
    """Whole tensors, together up to `_PIECE_BYTES` where they are not larger each."""
    piece: list[PackedTensor] = []
    for name, tensor in tensors.items():
        packed = _pack(name, tensor)
        if piece and _num_bytes(piece) + packed.data.nbytes > _PIECE_BYTES:
            yield piece
            piece = []
        piece.append(packed)
    if piece:
        yield piece


def _num_bytes(piece: Sequence[PackedTensor]) -> int:
    return sum(packed.data.nbytes for packed in piece)


def _pack(name: str, tensor: torch.Tensor) -> PackedTensor:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return PackedTensor(name, dtype, tuple(tensor.shape), flat.numpy())


def _unpack(packed: PackedTensor) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():  # the memory is read-only, and nobody writes to it
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(packed.data)
    return flat.view(getattr(torch, packed.dtype)).reshape(packed.shape)
