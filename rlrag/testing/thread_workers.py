"""Training workers as threads of one process, for tests of distributed training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
_TIMEOUT_S = 300.0


class _Meeting:
    """Where the workers of one group wait for each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.brought: list[torch.Tensor | None] = [None] * size


class ThreadWorker:
    """One of the group; implements `Workers`."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = len(meeting.brought)
        self._meeting = meeting

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the group."""
        self._meeting.brought[self.rank] = tensor.detach().clone()
        self.barrier()
        total = torch.stack([t for t in self._meeting.brought if t is not None]).sum(dim=0)
        self.barrier()
        return total

    def barrier(self) -> None:
        """Wait for the others."""
        self._meeting.barrier.wait(_TIMEOUT_S)


def make_group(size: int) -> list[ThreadWorker]:
    """The workers of a group."""
    meeting = _Meeting(size)
    return [ThreadWorker(rank, meeting) for rank in range(size)]


def run_together(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run each worker's task in a thread of its own; results in their order.

    A worker that fails lets the others wait in vain: they give up after the group's time limit.
    """
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [future.result(_TIMEOUT_S) for future in [threads.submit(t) for t in tasks]]
