"""Low-rank adapters (LoRA) for a causal language model.

An adapter can be merged into its weight. Several adapted models may stand around
one copy of the frozen weights.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from rlrag.errors import ConfigError

_Module = TypeVar("_Module", bound=nn.Module)


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
        # A router of experts is a subclass, whose outputs are no plain product.
        if type(module) is nn.Linear and module is not head
    ]
    if not layers:
        raise ConfigError(
            f"a LoRA adapter needs linear layers, but {type(model).__name__} has none; train all "
            "its weights instead"
        )
    number: Any = alpha  # peft declares an integer and computes with any number
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=number, lora_dropout=0.0, target_modules=layers), model
    )


def copy_around_frozen(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A deep copy that holds the very tensors of the parameters that are frozen.

    Nobody writes to those, so that copy and original need them only once. The copy has modules of
    its own: an adapter that is added to it, or a forward pass in another thread, does not reach the
    original. Moving either to another device would move what they share; move before copying.

    Args:
        module: What is copied; its parameters without gradient are shared.
        memo: What a surrounding deep copy has copied already.
    """
    memo = {} if memo is None else memo
    memo |= {id(p): p for p in module.parameters() if not p.requires_grad}
    copied = copy.copy(module)
    memo[id(module)] = copied
    vars(copied).update(copy.deepcopy(vars(module), memo))
    return copied


def merge_adapter(
    weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
) -> torch.Tensor:
    """W + scale B A (Hu et al., 2021, arXiv 2106.09685) as a new float32 tensor.

    Learner and engines both merge by this function, so that they get the same numbers.

    Args:
        weight: W of shape (outputs, inputs), in any number format.
        down: A of shape (rank, inputs), float32.
        up: B of shape (outputs, rank), float32.
        scale: alpha / rank.

    Example:
        >>> merge_adapter(torch.ones(2, 1), torch.tensor([[3.0]]), torch.tensor([[1.0], [2.0]]), 2)
        tensor([[ 7.],
                [13.]])
    """
    return torch.addmm(weight.float(), up, down, alpha=scale)
