"""AdamW with a schedule: one step over the gradients of all workers, and its saved state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from rlrag.errors import CheckpointError, NonFiniteLossError
from rlrag.training.distributed.sharding import local, sliced_like, whole
from rlrag.training.distributed.workers import Workers

WEIGHT_DECAY = 0.01
"""Decoupled weight decay of AdamW: torch's default, and that of the DRO paper."""
MAX_GRAD_NORM = 1.0
"""A longer gradient is scaled down to it, as is usual for language models."""
# Gradients are summed over the workers in pieces of this size, which bounds the copy of each.
_BUCKET_BYTES = 64 * 2**20


class Optimiser:
    """AdamW on named parameters of which all workers hold the same values.

    Args:
        parameters: What is trained; those that require no gradient are left out.
        learning_rate: The highest one.
        warmup_steps: Steps in which the learning rate rises.
        num_steps: Steps of the whole run, at whose end the rate is 0.
        workers: Whom a batch is shared with.
        advice: What helps where the gradient is not finite.
        name: Whose gradient it is.
        fused: Whether one kernel changes all parameters, which rounds in its own way.
        sharded: Whether the workers hold slices of the parameters, whose gradients are summed.
        weight_decay: Decoupled, of AdamW.
        max_grad_norm: A longer gradient is scaled down to it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        learning_rate: float,
        warmup_steps: int,
        num_steps: int,
        workers: Workers,
        advice: str,
        name: str = "the gradient",
        fused: bool | None = None,
        sharded: bool = False,
        weight_decay: float = WEIGHT_DECAY,
        max_grad_norm: float = MAX_GRAD_NORM,
    ) -> None:
        self.parameters = {n: p for n, p in parameters.items() if p.requires_grad}
        self._learning_rate = learning_rate
        self._max_grad_norm = max_grad_norm
        self._warmup_steps = warmup_steps
        self._num_steps = num_steps
        self._workers = workers
        self._advice = advice
        self._name = name
        self._sharded = sharded
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=fused,
        )

    def zero_grad(self) -> None:
        """Forget the gradient, before a batch adds its own."""
        self._adamw.zero_grad()

    def step(self, step: int) -> tuple[float, float]:
        """Sum the gradient over the workers, clip it and step; all workers call it together.

        Args:
            step: Number of this step, from 0.

        Returns:
            The gradient's norm before clipping, and the learning rate.

        Raises:
            NonFiniteLossError: when the gradient is not finite; nothing was changed.
        """
        gradient, norm = share_gradient(
            list(self.parameters.values()), self._workers, self._sharded
        )
        if not math.isfinite(norm):
            raise NonFiniteLossError(f"{self._name} of step {step} is not finite; {self._advice}")
        if norm > self._max_grad_norm:
            for tensor in gradient:
                tensor.mul_(self._max_grad_norm / norm)
        rate = linear_schedule(step, self._num_steps, self._warmup_steps, self._learning_rate)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        return norm, rate

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the state, named `parameter:slot`, for a checkpoint."""
        return {
            f"{name}:{slot}": whole(torch.as_tensor(value)).to("cpu", copy=True)
            for name, parameter in self.parameters.items()
            for slot, value in self._adamw.state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            CheckpointError: when a tensor belongs to a parameter that is not trained.
        """
        numbers = {name: number for number, name in enumerate(self.parameters)}
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, slot = key.rsplit(":", 1)
            if name not in numbers:
                raise CheckpointError(
                    f"the checkpoint has an optimiser state for {name!r}, which is not trained; "
                    "use the configuration that it was saved with"
                )
            parameter = self.parameters[name]
            own = tensor.clone()
            slots.setdefault(numbers[name], {})[slot] = (
                sliced_like(own, parameter) if tensor.shape == parameter.shape else own
            )
        state = self._adamw.state_dict()
        state["state"] = slots
        self._adamw.load_state_dict(state)


def linear_schedule(step: int, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup_steps` steps, then linear decay to 0 at `num_steps`.

    Steps count from 0. The first step has peak / warmup_steps, and without a warm-up the peak.

    Example:
        >>> [linear_schedule(step, 4, 2, peak=1.0) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = (num_steps - step) / max(num_steps - warmup_steps, 1)
    return peak * min(1.0, left)


def share_gradient(
    parameters: Sequence[nn.Parameter], workers: Workers, sharded: bool = False
) -> tuple[list[torch.Tensor], float]:
    """Sum the gradients over the workers in place; returns them and their global norm.

    Every worker calls this with the same parameters. One that has no gradient counts as 0. Sharded
    gradients are summed already, and of them each worker gets its own slices.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradient = [local(p.grad) for p in parameters if p.grad is not None]
    if not sharded and workers.size > 1:
        for bucket in _buckets(gradient):
            total = workers.sum(torch.cat([tensor.flatten() for tensor in bucket]))
            parts = total.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))
    square = nn.utils.get_total_norm(gradient).square()
    return gradient, (workers.sum(square) if sharded else square).sqrt().item()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of tensors that take at most 64 MiB together; a larger one is alone."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
