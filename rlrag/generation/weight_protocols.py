"""Names and shapes of published tensors in, an error that names those that do not fit out.

Also what an engine or a client can do with published weights beyond `Generator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from rlrag.errors import GenerationError

_NUM_NAMED = 3


@runtime_checkable
class ChecksWeights(Protocol):
    """An engine that tells beforehand whether weights fit, so that nobody gives up the old ones."""

    def check_weights(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a set by its tensors' names and shapes; the engine goes on as before.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        ...


@runtime_checkable
class FollowsWeights(Protocol):
    """A client of engines that another process gives their weights."""

    def expect_weights(self, version: int, digest: str) -> None:
        """From now on take results of this set alone."""
        ...


def check_shapes(
    required: Mapping[str, Sequence[int]],
    given: Mapping[str, Sequence[int]],
    optional: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Compare the tensors of a set with those that a model has.

    Args:
        required: Shapes by name that a set must hold.
        given: Shapes by name that it holds.
        optional: Shapes by name that it may hold besides.

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
    wrong = {
        "missing": [repr(name) for name in required if name not in given],
        "unexpected": [repr(name) for name in given if name not in known],
        "of another shape": [
            f"{name!r} is {tuple(shape)}, not {tuple(known[name])}"
            for name, shape in given.items()
            if name in known and tuple(shape) != tuple(known[name])
        ],
    }
    found = [f"{len(names)} {kind} ({_first(names)})" for kind, names in wrong.items() if names]
    if found:
        raise GenerationError(
            f"the weights do not fit the model: {'; '.join(found)}; push tensors under the "
            "model's own parameter names, with adapters merged in"
        )


def _first(names: list[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
