"""A worker's view of the group: rank, size, sums and barriers."""

from __future__ import annotations

import json
from collections.abc import Collection
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


def names_of_all(names: Collection[str], workers: Workers) -> list[str]:
    """The different names that the workers have, sorted; all of them must call this together."""
    if workers.size == 1:
        return sorted(names)
    own = torch.tensor(list(json.dumps(sorted(names)).encode()), dtype=torch.int64)
    lengths_W = torch.zeros(workers.size, dtype=torch.int64)
    lengths_W[workers.rank] = len(own)
    lengths_W = workers.sum(lengths_W)
    texts_WL = torch.zeros(workers.size, int(lengths_W.max()), dtype=torch.int64)
    texts_WL[workers.rank, : len(own)] = own
    texts = zip(workers.sum(texts_WL).tolist(), lengths_W.tolist(), strict=True)
    return sorted({name for text, length in texts for name in json.loads(bytes(text[:length]))})
