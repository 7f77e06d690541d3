"""A numbered set of generator weights that engines can load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GeneratorWeights:
    """One published set of weights: a whole model, or a low-rank adapter of the engines' own.

    `version` counts the sets that a run published; 0 is what the engines started with. `digest` is
    a hash of the tensors and the scale: equal digests give equal results in engines of one model,
    whichever run made them. None says that the set is what the engines started with, so that their
    results are those of engines that were given nothing.

    Without `adapter_scale`, `tensors` are all weights, named as the Hugging Face model names its
    parameters. With it they are A and B of the adapted layers, named by `adapter_names`: an engine
    answers with W + adapter_scale B A, where W is the weight that it started with, and every other
    weight is as it was at the start too.
    """

    version: int
    digest: str | None
    tensors: Mapping[str, torch.Tensor]
    adapter_scale: float | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether an engine has to merge the tensors into its own weights."""
        return self.adapter_scale is not None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes by name, which an engine can check before it has the tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def pack_weights(
    tensors: Mapping[str, torch.Tensor], version: int, adapter_scale: float | None = None
) -> GeneratorWeights:
    """Hash tensors on the CPU and number them; the tensors are not copied.

    Example:
        >>> first = pack_weights({"w": torch.zeros(2)}, version=1)
        >>> first.digest == pack_weights({"w": torch.zeros(2)}, version=9).digest
        True
    """
    digest = hashlib.sha256()
    if adapter_scale is not None:
        digest.update(f"adapter, scale {adapter_scale!r}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return GeneratorWeights(version, digest.hexdigest()[:16], tensors, adapter_scale)
