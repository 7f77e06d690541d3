"""Tensors of a trained generator in; a numbered set of weights that engines can take over out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GeneratorWeights:
    """One published set of weights.

    `version` counts the sets that a run published; 0 is what the engines started with. `digest` is
    a hash of the tensors: equal digests give equal results, whichever run made them. `tensors` are
    named as the Hugging Face model names its parameters, with adapters merged in.
    """

    version: int
    digest: str
    tensors: Mapping[str, torch.Tensor]


def pack_weights(tensors: Mapping[str, torch.Tensor], version: int) -> GeneratorWeights:
    """Hash tensors on the CPU and number them; the tensors are not copied.

    Example:
        >>> first = pack_weights({"w": torch.zeros(2)}, version=1)
        >>> first.digest == pack_weights({"w": torch.zeros(2)}, version=9).digest
        True
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return GeneratorWeights(version, digest.hexdigest()[:16], tensors)
