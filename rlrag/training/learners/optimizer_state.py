"""Optimiser state as tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from rlrag.errors import CheckpointError
from rlrag.training.distributed.sharding import sliced_like, whole


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Copies on the CPU of an optimiser's state, named `parameter:slot`."""
    return {
        f"{name}:{slot}": whole(torch.as_tensor(value)).to("cpu", copy=True)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Take over what `optimizer_tensors` gave; `parameters` in the optimiser's order.

    Raises:
        CheckpointError: when a tensor belongs to a parameter that is not trained.
    """
    numbers = {name: number for number, name in enumerate(parameters)}
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, slot = key.rsplit(":", 1)
        if name not in numbers:
            raise CheckpointError(
                f"the checkpoint holds an optimiser state for {name!r}, which is not trained; "
                "use the configuration that it was saved with"
            )
        parameter = parameters[name]
        own = tensor.clone()
        slots.setdefault(numbers[name], {})[slot] = (
            sliced_like(own, parameter) if tensor.shape == parameter.shape else own
        )
    state = optimizer.state_dict()
    state["state"] = slots
    optimizer.load_state_dict(state)


class SavesOptimizer:
    """A learner whose optimiser changes named parameters; `optimizer_tensors` is its state."""

    optimizer: torch.optim.Optimizer
    _parameters: Mapping[str, nn.Parameter]

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the optimiser's state, for a checkpoint."""
        return optimizer_tensors(self.optimizer, self._parameters)

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `optimizer_tensors` gave.

        Raises:
            CheckpointError: when a tensor belongs to a parameter that this learner does not train.
        """
        restore_optimizer(self.optimizer, self._parameters, tensors)
