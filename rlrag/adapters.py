"""A causal language model in; the same with low-rank adapters that alone are trained out."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlrag.errors import ConfigError


def add_adapter(model: Any, rank: int, alpha: float) -> None:
    """Put a LoRA adapter on every linear layer but the vocabulary matrix, and freeze the rest.

    Each layer W becomes W + (alpha / rank) B A (Hu et al., 2021, arXiv 2106.09685). A is drawn from
    torch's random state and B starts at zero, so that an untrained adapter changes nothing.

    Raises:
        ConfigError: when the model has no linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if not layers:
        raise ConfigError(
            f"an adapter is put on linear layers and {type(model).__name__} has none; train all "
            "its weights"
        )
    number: Any = alpha  # peft declares an integer and computes with any number
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=number, lora_dropout=0.0, target_modules=layers), model
    )
