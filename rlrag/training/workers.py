"""The learner's view of its fellow workers: who am I, how many are we, add this up over all."""

from __future__ import annotations

from typing import Protocol

import torch


class Workers(Protocol):
    """A group of learner processes that hold the same weights."""

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all workers; every worker must call it with the same shape."""
        ...

    def barrier(self) -> None:
        """Return when every worker has arrived."""
        ...


class SingleWorker:
    """The group of one: a process that launched the loop by itself."""

    rank = 0
    size = 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def barrier(self) -> None:
        """Nobody to wait for."""


class TorchWorkers:
    """The processes of torch.distributed's default group, as Ray Train sets it up."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce a copy; the group's own timeout bounds the wait."""
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def barrier(self) -> None:
        """Wait for all workers; the group's own timeout bounds the wait."""
        torch.distributed.barrier()
