"""All-reduce of gradients over workers, and their norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from rlrag.training.distributed.sharding import local
from rlrag.training.distributed.workers import Workers

# Gradients are summed over the workers in pieces of this size, which bounds the copy of each.
_BUCKET_BYTES = 64 * 2**20


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


def clip_gradient(gradient: Sequence[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale a gradient of this global norm down to `max_norm`, where it is above."""
    if norm > max_norm:
        for tensor in gradient:
            tensor.mul_(max_norm / norm)


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
