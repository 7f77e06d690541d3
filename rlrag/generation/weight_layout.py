"""A model directory in; the tensors that its published weights must hold out, no engine needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlrag.errors import GenerationError
from rlrag.generation.weight_protocols import check_shapes

OUTPUT_LAYER = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class WeightLayout:
    """Names and shapes of a model's first set of weights.

    `embedding` names the tensor that is the output layer too; None when the model has both.
    """

    shapes: Mapping[str, tuple[int, ...]]
    embedding: str | None

    @classmethod
    def of(cls, model_dir: Path) -> WeightLayout:
        """Read the headers of the safetensors files.

        Raises:
            GenerationError: when the output layer is tied and nothing looks like the embedding.
        """
        from safetensors import safe_open

        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        if OUTPUT_LAYER in shapes and not config.get("tie_word_embeddings"):
            return cls(shapes, None)
        shapes.pop(OUTPUT_LAYER, None)
        found = [name for name in shapes if name.endswith(_EMBEDDINGS)]
        if len(found) != 1:
            raise GenerationError(
                f"the model in {model_dir} ties its output layer to its embedding, but "
                f"{len(found)} tensors are named like one ({', '.join(_EMBEDDINGS)}); save it with "
                f"an own {OUTPUT_LAYER} and tie_word_embeddings false"
            )
        return cls(shapes, found[0])

    def check(self, given: Mapping[str, Sequence[int]]) -> None:
        """Refuse a set by its names and shapes.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        optional = {OUTPUT_LAYER: self.shapes[self.embedding]} if self.embedding else {}
        check_shapes(self.shapes, given, optional)

    def pairs(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by name, a tied embedding also as the output layer.

        vLLM (0.32) packs the output layer apart on a CPU, and would keep the old one without a
        word if only the embedding came.
        """
        for name, tensor in tensors.items():
            if name == self.embedding:
                yield OUTPUT_LAYER, tensor
            if name != OUTPUT_LAYER or not self.embedding:
                yield name, tensor


def check_tied(tensors: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> None:
    """Refuse a set that holds a tied tensor twice, with different values.

    Args:
        tensors: The set.
        tied: Second names, each with the name that stands for the tensor.

    Raises:
        GenerationError: naming both.
    """
    for second, first in tied.items():
        if second in tensors and not torch.equal(tensors[second], tensors[first]):
            raise GenerationError(
                f"the model ties {second!r} to {first!r}, but the weights differ between them; "
                "push one of them alone"
            )
