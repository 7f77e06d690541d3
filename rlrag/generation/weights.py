"""Versioned generator weights, checks that they fit a model, and the protocols to push them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlrag.errors import GenerationError

if TYPE_CHECKING:
    import torch

_NUM_NAMED = 3


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
        >>> import torch
        >>> first = pack_weights({"w": torch.zeros(2)}, version=1)
        >>> first.digest == pack_weights({"w": torch.zeros(2)}, version=9).digest
        True
    """
    import torch

    digest = hashlib.sha256()
    if adapter_scale is not None:
        digest.update(f"adapter, scale {adapter_scale!r}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return GeneratorWeights(version, digest.hexdigest()[:16], tensors, adapter_scale)


@runtime_checkable
class ChecksWeights(Protocol):
    """An engine that tells beforehand whether weights fit, so that nobody gives up the old ones."""

    def check_weights(self, shapes: Mapping[str, Sequence[int]], adapter: bool = False) -> None:
        """Refuse a set by its tensors' names and shapes; the engine goes on as before.

        Args:
            shapes: Shapes by name.
            adapter: Whether they are those of an adapter, not of a whole model.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        ...


@runtime_checkable
class FollowsWeights(Protocol):
    """A client of engines that another process gives their weights."""

    def expect_weights(self, version: int, digest: str | None) -> None:
        """From now on take results of this set alone."""
        ...


class KeepsItsWeights:
    """A generator whose weights cannot be changed from here; `_who` names it in errors."""

    _who: str

    @property
    def version(self) -> int:
        """Always 0."""
        return 0

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Refuse them.

        Raises:
            GenerationError: always.
        """
        raise GenerationError(
            f"the weights of {self._who} cannot be replaced; to train the generator use "
            "generator.backend vllm or transformers"
        )


def check_shapes(
    required: Mapping[str, Sequence[int]],
    given: Mapping[str, Sequence[int]],
    optional: Mapping[str, Sequence[int]] | None = None,
    advice: str = "push tensors under the model's own parameter names, with adapters merged in",
) -> None:
    """Compare the tensors of a set with those that a model has.

    Args:
        required: Shapes by name that a set must hold.
        given: Shapes by name that it holds.
        optional: Shapes by name that it may hold besides.
        advice: What to do where they differ.

    Raises:
        GenerationError: with the first few names of each kind of difference.

    Example:
        >>> check_shapes({"w": (2, 3)}, {"w": (2, 3)})
        >>> check_shapes({"w": (2, 3)}, {"w": (3, 2)})
        Traceback (most recent call last):
        ...
        rlrag.errors.GenerationError: the weights do not fit the model: 1 of another shape \
('w' is (3, 2), not (2, 3)); push tensors under the model's own parameter names, with adapters \
merged in
    """
    known = {**(optional or {}), **required}
    _refuse(
        {
            "missing": [repr(name) for name in required if name not in given],
            "unexpected": [repr(name) for name in given if name not in known],
            "of another shape": [
                f"{name!r} is {tuple(shape)}, not {tuple(known[name])}"
                for name, shape in given.items()
                if name in known and tuple(shape) != tuple(known[name])
            ],
        },
        "the weights do not fit the model",
        advice,
    )


def adapter_names(weight: str) -> tuple[str, str]:
    """Names under which A and B of a weight's adapter are published.

    Example:
        >>> adapter_names("model.layers.0.mlp.up_proj.weight")
        ('model.layers.0.mlp.up_proj.lora_A.weight', 'model.layers.0.mlp.up_proj.lora_B.weight')
    """
    layer = weight.removesuffix(".weight")
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def check_adapter(weights: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]) -> None:
    """Compare the tensors of an adapter with the weights that it is to be merged into.

    Args:
        weights: Shapes of a model's weights by name.
        given: Shapes by name that the adapter holds: A (rank, inputs) and B (outputs, rank) of
            each weight that it changes, of shape (outputs, inputs).

    Raises:
        GenerationError: with the first few names of each kind of difference.

    Example:
        >>> weights = {"up.weight": (5, 3)}
        >>> check_adapter(weights, {"up.lora_A.weight": (2, 3), "up.lora_B.weight": (5, 2)})
        >>> check_adapter(weights, {"up.lora_A.weight": (2, 4), "up.lora_B.weight": (5, 2)})
        Traceback (most recent call last):
        ...
        rlrag.errors.GenerationError: the adapter does not fit the model: 1 of another shape \
('up.lora_A.weight' is (2, 4), not (rank, 3)); push A and B of each adapted weight \
under the names of `adapter_names`, for the model that the engines were started with
    """
    unexpected, missing, misshapen = set(given), [], []
    for weight, shape in weights.items():
        names = adapter_names(weight)
        found = [name for name in names if name in given]
        if not found or len(shape) != 2:
            continue
        unexpected -= set(found)
        missing += [repr(name) for name in names if name not in given]
        if len(found) == 2:
            misshapen += _misshapen(names, [tuple(given[name]) for name in names], shape)
    _refuse(
        {
            "missing": ["A and B of any weight"] if not given else missing,
            "unexpected": [repr(name) for name in given if name in unexpected],
            "of another shape": misshapen,
        },
        "the adapter does not fit the model",
        "push A and B of each adapted weight under the names of `adapter_names`, for the model "
        "that the engines were started with",
    )


def _misshapen(
    names: tuple[str, str], given: Sequence[tuple[int, ...]], weight: Sequence[int]
) -> list[str]:
    """What is wrong with the shapes of A and B; both must have the same rank, at least 1."""
    (down, up), (num_outputs, num_inputs) = given, weight
    rank = down[0] if down else 0
    if rank < 1 or down != (rank, num_inputs):
        return [f"{names[0]!r} is {down}, not (rank, {num_inputs})"]
    if up != (num_outputs, rank):
        return [f"{names[1]!r} is {up}, not {(num_outputs, rank)}"]
    return []


def _refuse(wrong: Mapping[str, list[str]], what: str, way_out: str) -> None:
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in wrong.items() if names]
    if found:
        raise GenerationError(f"{what}: {'; '.join(found)}; {way_out}")


def _first(names: list[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
