"""Tensor names and shapes that an engine expects of pushed weights.

No engine is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlrag.errors import GenerationError
from rlrag.generation.weights import adapter_names, check_adapter, check_shapes
from rlrag.models.adapters import merge_adapter

OUTPUT_MODULE = "lm_head"
OUTPUT_LAYER = f"{OUTPUT_MODULE}.weight"
_EXPERTS = ".experts."
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class WeightLayout:
    """Names, shapes and files of a model's first set of weights.

    `embedding` names the tensor that is the output layer too; None when the model has both.
    """

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]
    embedding: str | None

    @classmethod
    def of(cls, model_dir: Path) -> WeightLayout:
        """Read the headers of the safetensors files.

        Raises:
            GenerationError: when the output layer is tied and nothing looks like the embedding.
        """
        from safetensors import safe_open

        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, Path] = {}
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    files[name] = path
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        # An output layer of its own may have another name, such as GPT-NeoX's `embed_out`.
        if not config.get("tie_word_embeddings", OUTPUT_LAYER not in shapes):
            return cls(shapes, files, None)
        shapes.pop(OUTPUT_LAYER, None)
        found = [name for name in shapes if name.endswith(_EMBEDDINGS)]
        if len(found) != 1:
            raise GenerationError(
                f"the model in {model_dir} ties its output layer to its embedding, but "
                f"{len(found)} tensors have the name of an embedding ({', '.join(_EMBEDDINGS)}); "
                f"save it with a separate {OUTPUT_LAYER} and tie_word_embeddings false"
            )
        return cls(shapes, files, found[0])

    def check(self, given: Mapping[str, Sequence[int]], adapter: bool = False) -> None:
        """Refuse a set, or an adapter, by its names and shapes.

        Raises:
            GenerationError: naming what is missing, unexpected or of another shape.
        """
        if adapter:
            check_adapter(self.shapes, given)
            return
        optional = {OUTPUT_LAYER: self.shapes[self.embedding]} if self.embedding else {}
        if set(given) - set(self.shapes) - set(optional):
            check_shapes(
                self.shapes,
                given,
                optional,
                "transformers names or packs the weights of this model otherwise than its files "
                "do, which engines go by; use generator.backend transformers, or "
                "generator_training.method lora",
            )
        check_shapes(self.shapes, given, optional)

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return any(_EXPERTS in name for name in self.shapes)

    @torch.no_grad()
    def merged(
        self, adapter: Mapping[str, torch.Tensor], scale: float, dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight of the directory with the adapter merged in, one after another.

        A weight is read when it is asked for, merged in float32 and then rounded to `dtype`. Drop
        it before the next one: it may lie in a mapped file.

        Args:
            adapter: Tensors that passed `check`.
            scale: What B A is multiplied by.
            dtype: The format of the engine.

        Raises:
            OSError, SafetensorError: when a file cannot be read any more.
        """
        for name in self.shapes:
            weight = self._read(name)
            down, up = (adapter.get(half) for half in adapter_names(name))
            if down is not None and up is not None:
                weight = merge_adapter(weight, down, up, scale)
            yield name, weight.to(dtype)

    def _read(self, name: str) -> torch.Tensor:
        # Opened for each tensor: as long as a file stays open, all that was read of it counts as
        # this process's memory, at last a whole copy of the model.
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def pairs(
        self, tensors: Iterable[tuple[str, torch.Tensor]], has_output_layer: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by name, a tied embedding also as the output layer where there is one.

        vLLM (0.32) packs the output layer apart on a CPU, and would keep the old one without a
        word if only the embedding came. Its Gemma 2 has none, and dies of one that comes.
        """
        for name, tensor in tensors:
            if name == self.embedding and has_output_layer:
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
                f"the model ties {second!r} to {first!r}, but the pushed weights of the two "
                "differ; push only one of them"
            )
