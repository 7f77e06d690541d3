"""Loads published weights into a transformers model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlrag.errors import GenerationError
from rlrag.generation.backends.weight_layout import WeightLayout, check_tied
from rlrag.generation.weights import GeneratorWeights, check_shapes


class ModelWeights:
    """The weights of a model that was loaded from a directory, which others may replace."""

    def __init__(self, model: Any, model_dir: Path, dtype: torch.dtype) -> None:
        self._model = model
        self._model_dir = model_dir
        self._dtype = dtype

    @cached_property
    def _layout(self) -> WeightLayout:
        return WeightLayout.of(self._model_dir)

    def check(self, shapes: Mapping[str, Sequence[int]], adapter: bool) -> None:
        """Refuse a set of weights, or an adapter, by its names and shapes.

        A second name of a tied tensor, and buffers, may be left out of a set.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        required = {name: tensor.shape for name, tensor in self._model.named_parameters()}
        if adapter:
            self._check_files(required)
            self._layout.check(shapes, adapter)
            return
        held = {name: tensor.shape for name, tensor in self._model.state_dict().items()}
        check_shapes(required, shapes, optional=held)

    def load(self, weights: GeneratorWeights) -> None:
        """Copy the tensors into the model, in its number format.

        An adapter is merged into the weights on disk, one tensor at a time. A set that does not fit
        is refused before the model is touched.

        Raises:
            GenerationError: when the tensors do not fit the model.
            OSError, SafetensorError: when the weights on disk cannot be read again to merge an
                adapter; part of the model may be new then.
        """
        self.check(weights.shapes, weights.is_adapter)
        tied = _tied_names(self._model)
        if weights.adapter_scale is None:
            check_tied(weights.tensors, tied)
            self._copy(weights.tensors.items())
            return
        # What the model has no place for, or ties, it left in the files when it was loaded too.
        held = self._model.state_dict().keys() - tied.keys()
        merged = self._layout.merged(weights.tensors, weights.adapter_scale, self._dtype)
        self._copy((name, tensor) for name, tensor in merged if name in held)

    def _check_files(self, required: Mapping[str, Sequence[int]]) -> None:
        """An adapter is merged into what the files hold, so they must hold every weight."""
        shapes = self._layout.shapes
        other = [name for name, shape in required.items() if shapes.get(name) != tuple(shape)]
        if other:
            raise GenerationError(
                f"transformers renames or reshapes {len(other)} weights of {self._model_dir} "
                f"when it loads them, first {other[0]!r}, so an adapter cannot be merged into "
                "the files; train and push whole weights (generator_training.method full)"
            )

    def _copy(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        held = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors:
                held[name].copy_(tensor)


def _tied_names(model: Any) -> dict[str, str]:
    """Second names of tied parameters, each with the name that stands for it."""
    first: dict[int, str] = {}
    second = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            second[name] = first[id(parameter)]
    return second
