"""An optimiser in, tensors for a checkpoint out, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of an optimiser's state, named `number of the parameter.slot`."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Take over what `optimizer_tensors` gave."""
    state = optimizer.state_dict()
    state["state"] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(state)
