"""The trainable causal language model, with all weights or a LoRA adapter.

The weights are float32. With LoRA (Hu et al., 2021, arXiv 2106.09685) each linear layer W of
attention and feed-forward becomes W + (alpha / rank) B A, where W stays as it is and A and B are
trained; B starts at zero, so that an untrained adapter changes nothing.

Shape letters: S sequences, T tokens, A answer tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlrag.algorithms.sequence_logp import answer_batch, shared_length, summed_logp
from rlrag.config import GeneratorTrainingConfig
from rlrag.errors import CheckpointError, GenerationError
from rlrag.files.directories import MANIFEST, check_finite
from rlrag.generation.weights import GeneratorWeights, adapter_names, pack_weights
from rlrag.models.adapters import add_adapter, copy_around_frozen, merge_adapter
from rlrag.models.causal_lm import check_prefix_reading, load_causal_lm
from rlrag.models.directories import resolve_device, resolve_dtype
from rlrag.selection.listwise_lm import ATTENTION
from rlrag.training.distributed.sharding import shard, sliced_like, whole

_ADVICE = (
    "name another generator.model: one to be trained must be a causal language model whose layers "
    "all keep keys and values"
)
LORA_ALPHA = 32
"""An adapter's output is scaled by alpha / rank, which is 2 at the default rank. With AdamW another
alpha does about what another learning rate does, and that is a setting."""
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_ADAPTED = ".base_layer.weight"  # peft's name for a weight with an adapter beside it


class TrainableGenerator:
    """A causal language model with gradients and without dropout.

    With `sharding` "fsdp2" every worker holds a slice of each weight: all workers then call
    `answer_logp`, `trainable_tensors`, `load_trainable`, `published_weights`, `stream_merged` and
    `merged_tensors` together, and equally often.
    """

    def __init__(
        self,
        model_dir: Path,
        config: GeneratorTrainingConfig,
        device: str,
        seed: int,
        base: Any = None,
        lora_alpha: float = LORA_ALPHA,
    ) -> None:
        """Load the model; with LoRA add an adapter drawn from `seed`.

        Args:
            model_dir: Directory of a causal language model.
            config: What is trained of it, and how.
            device: Where it lies, in torch's words or "auto".
            seed: Determines the adapter.
            base: What `load_base` made of the same directory, on the same device: the adapter is
                put around its weights, which others may use too. Only for replicated LoRA.
            lora_alpha: The adapter's output is scaled by this / rank.

        Raises:
            GenerationError: when transformers cannot load the model.
            ConfigError: when the model is of no kind that can be trained, has no linear layers to
                adapt, or no group of workers is there to shard over.
        """
        self.device = torch.device(resolve_device(device))
        self._model_dir = model_dir
        self._config = config
        self._scale = lora_alpha / config.lora_rank
        bfloat16 = resolve_dtype(config.precision, self.device.type) == "bfloat16"
        self._model = (
            load_causal_lm(model_dir, torch.float32, _ADVICE)
            if base is None
            else copy_around_frozen(base)
        )
        if config.method == "lora":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                add_adapter(self._model, config.lora_rank, lora_alpha)
        self._model.eval()
        if config.gradient_checkpointing:
            _recompute_activations(self._model)
        sharded = config.sharding == "fsdp2"
        # Recomputed activations leave no keys and values; sharded weights are gathered once a pass.
        self._shares_prefix = not (sharded or config.gradient_checkpointing)
        self._autocast = bfloat16 and not sharded
        if sharded:
            shard(self._model, _blocks(self._model), self.device.type, bfloat16)
        else:
            self._model.to(self.device)
        if self._shares_prefix:
            check_prefix_reading(self._model, model_dir, _ADVICE)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that a learner changes, by name: the adapter's, or all."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def answer_logp(
        self, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
    ) -> torch.Tensor:
        """Teacher-forced log p(answer | prompt), summed over the answer's tokens; float32 (S,).

        Differentiable. What all prompts of the batch begin with, worked examples for one, is read
        once: the sequences share its keys and values, and their gradients flow back through them.
        The vocabulary matrix, the largest of a small model, is applied only where an answer token
        is predicted.

        Raises:
            GenerationError: when a prompt or answer is empty, or both are longer than the model
                reads.
        """
        self._check(prompts, answers)
        shared = shared_length(prompts) if self._shares_prefix else 0
        batch = answer_batch([prompt[shared:] for prompt in prompts], answers, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            past = self._read_prefix(prompts[0][:shared], len(prompts)) if shared else None
            with self._output_at(batch.rows_A, batch.columns_A):
                logits_AV = self._model(
                    input_ids=batch.tokens_ST, past_key_values=past, use_cache=past is not None
                ).logits
        return summed_logp(logits_AV, batch.targets_A, batch.lengths_S)

    def _read_prefix(self, token_ids: tuple[int, ...], num_sequences: int) -> Any:
        """Keys and values of these tokens, with gradient, once for each sequence."""
        nowhere = torch.zeros(0, dtype=torch.long, device=self.device)
        tokens_1T = torch.tensor([token_ids], device=self.device)
        with self._output_at(nowhere, nowhere):
            past = self._model(input_ids=tokens_1T, use_cache=True).past_key_values
        past.batch_repeat_interleave(num_sequences)
        return past

    @contextmanager
    def _output_at(self, rows_A: torch.Tensor, columns_A: torch.Tensor) -> Iterator[None]:
        """Let the model compute logits at these places alone, shape (A, V)."""

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (inputs[0][rows_A, columns_A],)

        hook = self._model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences of like length, for one forward pass each.

        A batch takes at most `micro_batch_tokens` tokens, padding included; a sequence longer than
        that is alone. The longest come first, so that memory runs out at once or not at all.
        """
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[batches[-1][0]] if batches else 0
            if batches and (len(batches[-1]) + 1) * longest <= self._config.micro_batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def trainable_tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of what is trained, for a checkpoint."""
        return {
            name: whole(parameter.detach()).to("cpu", copy=True)
            for name, parameter in self.trainable_parameters().items()
        }

    @torch.no_grad()
    def load_trainable(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `trainable_tensors` gave.

        Raises:
            CheckpointError: when names or shapes differ from those that this model trains.
        """
        parameters = self.trainable_parameters()
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != shapes:
            names = sorted({name for name, _ in set(given.items()) ^ set(shapes.items())})
            raise CheckpointError(
                f"{len(names)} generator tensors do not fit the configured model, first "
                f"{names[0]!r}; use the generator_training configuration that they were saved "
                "with"
            )
        for name, parameter in parameters.items():
            parameter.copy_(sliced_like(tensors[name], parameter))

    @torch.no_grad()
    def published_weights(self, version: int, dtype: torch.dtype) -> GeneratorWeights:
        """What engines of the same model need to answer as this one, on the CPU.

        Of LoRA the adapter in float32, which engines merge as `stream_merged` does, and else all
        weights, rounded to `dtype`, the format of the engines.
        """
        if self._config.method != "lora":
            return pack_weights(self.merged_tensors(dtype), version)
        adapter = {}
        for name, _ in self._model.named_parameters():
            layer = name.removesuffix(_ADAPTED)
            if layer != name:
                halves = self._adapter(layer)
                for published, half in zip(adapter_names(f"{layer}.weight"), halves, strict=True):
                    adapter[published] = half.to("cpu", copy=True)
        return pack_weights(adapter, version, self._scale)

    def _adapter(self, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a layer, whole."""
        down, up = (
            whole(self._model.get_parameter(f"{layer}.lora_{part}.default.weight")) for part in "AB"
        )
        return down, up

    @torch.no_grad()
    def stream_merged(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight of the base model with the adapter merged in, one after another.

        Names are those of the Hugging Face model; a vocabulary matrix that is tied to the
        embedding comes once. The tensors are new ones on the CPU, merged in float32 and then
        rounded to `dtype`; the training weights stay as they are.
        """
        for name, parameter in self._model.named_parameters():
            if ".lora_" in name:
                continue
            tensor = whole(parameter)
            layer = name.removesuffix(_ADAPTED)
            if layer != name:
                tensor = merge_adapter(tensor, *self._adapter(layer), self._scale)
            yield name.replace(".base_layer.", "."), tensor.to("cpu", dtype, copy=True)
        tied = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for name, buffer in self._model.state_dict().items():
            if name not in tied:
                yield name, whole(buffer).to("cpu", copy=True)

    def merged_tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """All of `stream_merged`: one copy of the model."""
        return dict(self.stream_merged(dtype))

    def save_pretrained(self, directory: Path) -> None:
        """Write the merged model in float32 where transformers and vLLM can load it.

        An engine that loads it in another format rounds as `merged_tensors` does. Of a sharded
        generator all workers call `merged_tensors`, and one of them `save_model`.
        """
        save_model(directory, self._model_dir, self.merged_tensors(torch.float32))

    def _check(
        self, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
    ) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            total = len(prompt) + len(answer)
            if not prompt or not answer:
                raise GenerationError(
                    f"training sequence {number} has {len(prompt)} prompt and {len(answer)} "
                    "answer tokens; both need at least one"
                )
            if limit is not None and total > limit:
                raise GenerationError(
                    f"training sequence {number} takes {total} tokens but the model reads at "
                    f"most {limit}; lower prompt.max_prompt_tokens"
                )


def save_model(directory: Path, model_dir: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a Hugging Face directory: float32 weights, and what else `model_dir` holds.

    Files above 5 GB are split.
    """
    from huggingface_hub import save_torch_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(model_dir.iterdir()):
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        if wanted and path.name != MANIFEST:
            shutil.copyfile(path, directory / path.name)
    settings = json.loads((model_dir / "config.json").read_text())
    settings.pop("torch_dtype", None)  # the name before transformers 4.56
    settings["dtype"] = "float32"
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    check_finite(tensors, str(directory))
    save_torch_state_dict(dict(tensors), directory)


def load_base(model_dir: Path) -> Any:
    """A frozen model for the adapters of a generator and of a `ListwiseLMPolicy`.

    Raises:
        ConfigError: when the model is of no kind that can be trained.
        GenerationError: when transformers cannot load it.
    """
    model = load_causal_lm(model_dir, torch.float32, _ADVICE, ATTENTION)
    return model.requires_grad_(False)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _recompute_activations(model: Any) -> None:
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "preserve_rng_state": False}  # nothing random is computed
    )
    for block in _blocks(model):
        # transformers 5 recomputes in training mode alone; the block's own flag, without that of
        # the modules in it, is what it looks at.
        block.training = True
