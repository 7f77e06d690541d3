"""Keeps a pool's newest weights in Ray's object store for engines that restart.

The learner puts one copy into Ray's object store, tensor by tensor, and engines on its node read it
there without a copy of their own. Such an object ends with the process that put it, and the learner
may end long before the pool. If the `WeightStore` actor put the tensors itself, each would lie
there twice until Ray has freed the first. So it reads them instead, which keeps their memory in
place whatever becomes of the learner, and hands out copies once the originals cannot be had.

The old set is given up before the new one comes, which spares most of a second copy. Ray (2.60)
frees objects a moment later, in batches of a hundred or once a second; so there is one object a
tensor, the largest are given up first, and the largest new ones come last. What this costs: an
engine that restarts while a set is on its way has to wait until it has arrived.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from rlrag.errors import GenerationError, GeneratorTimeoutError, RlragError

if TYPE_CHECKING:  # the store's own process does without torch
    import torch

    from rlrag.generation.weights import GeneratorWeights

logger = logging.getLogger(__name__)

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
    """A complete set; `refs` lead to its `PackedTensor`s, those of an adapter with a scale."""

    tag: WeightsTag
    refs: tuple[ray.ObjectRef, ...]
    adapter_scale: float | None = None


class WeightStore:
    """What runs in an actor: the newest complete set, or none while one is on its way."""

    def __init__(self) -> None:
        self._tag: WeightsTag | None = None
        self._newest: StoredWeights | None = None
        self._held: list[tuple[PackedTensor, ray.ObjectRef]] = []

    def begin(self, tag: WeightsTag) -> None:
        """Give up what is held; `tag` follows."""
        held = sorted(self._held, key=lambda h: h[0].data.nbytes)
        self._tag, self._newest, self._held = tag, None, []
        while held:
            held.pop()  # the largest first

    def finish(self, stored: StoredWeights) -> None:
        """From now on `newest` is this set.

        Raises:
            GenerationError: when another set was begun meanwhile.
        """
        self._check(stored.tag)
        tensors = ray.get(list(stored.refs), timeout=_CALL_TIMEOUT_S)
        self._held = list(zip(tensors, stored.refs, strict=True))
        self._newest = stored

    def newest(self) -> StoredWeights | None:
        """The complete set, if there is one."""
        return self._newest

    def copy(self, tag: WeightsTag, number: int) -> PackedTensor:
        """A tensor of the set, which does not depend on the process that pushed it.

        Raises:
            GenerationError: when another set was begun meanwhile.
        """
        self._check(tag)
        return self._held[number][0]

    def _check(self, tag: WeightsTag) -> None:
        if tag != self._tag:
            raise GenerationError(
                f"the weight store was asked about weights of {tag} but has "
                f"{self._tag or 'none'}: two processes push to the same pool, or the store was "
                "restarted; push from only one process, and push again"
            )


def store_weights(store: Any, weights: GeneratorWeights) -> WeightsTag:
    """Put a set into the object store and give it to the pool's weight store.

    Raises:
        GenerationError: when the weight store is gone or the object store is full.
        GeneratorTimeoutError: when the weight store does not answer.
    """
    tag = WeightsTag(weights.version, weights.digest)
    call_store(store.begin.remote(tag), "begin a set of weights")
    tensors = weights.tensors
    by_size = sorted(tensors, key=lambda name: tensors[name].nbytes)
    refs = {name: _put(_pack(name, tensors[name])) for name in by_size}
    stored = StoredWeights(tag, tuple(refs[name] for name in tensors), weights.adapter_scale)
    call_store(store.finish.remote(stored), "take a set of weights")
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


def fetch_tensors(store: Any, stored: StoredWeights, timeout_s: float) -> dict[str, torch.Tensor]:
    """Tensors that share the object store's memory; read them, never write.

    Raises:
        GenerationError: when a tensor is lost or does not arrive in time.
    """
    try:
        packed = ray.get(list(stored.refs), timeout=timeout_s)
    except ObjectLostError:
        logger.info(
            "the process that pushed %s has ended; copying from the weight store", stored.tag
        )
        packed = [
            call_store(store.copy.remote(stored.tag, number), "copy a tensor")
            for number in range(len(stored.refs))
        ]
    except (RayError, GetTimeoutError) as error:
        raise GenerationError(
            f"the weights of {stored.tag} could not be fetched from Ray's object store: "
            f"{type(error).__name__}: {error}; push them again"
        ) from error
    return {tensor.name: _unpack(tensor) for tensor in packed}


def _put(packed: PackedTensor) -> ray.ObjectRef:
    try:
        return ray.put(packed)
    except RayError as error:
        raise GenerationError(
            f"Ray's object store has no room for {packed.name!r}, {packed.data.nbytes:,} bytes: "
            f"{error}; start Ray with an object_store_memory of twice the weights or more"
        ) from error


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
