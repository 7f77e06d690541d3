"""Gradients of several workers are summed in pieces of any size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlrag.testing.thread_workers import ThreadWorker, make_group, run_together
from rlrag.training.learners import optimiser
from rlrag.training.learners.optimiser import share_gradient

SHAPES = ((2, 3), (4,), (), (5, 1))  # 24, 16, 4 and 20 bytes


class Counting:
    """A worker that counts its sums."""

    def __init__(self, worker: ThreadWorker) -> None:
        self._worker, self.rank, self.size, self.num_sums = worker, worker.rank, worker.size, 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return self._worker.sum(tensor)

    def barrier(self) -> None:
        self._worker.barrier()


@pytest.mark.parametrize(
    ("piece_bytes", "num_pieces"), [(1, 4), (40, 2), (43, 2), (44, 2), (64, 1)]
)
def test_workers_sum_their_gradients_whatever_the_pieces(monkeypatch, piece_bytes, num_pieces):
    """Parameter n has 10 n + 1 on one worker and 10 n + 2 on the other; of 1 the first has none."""
    monkeypatch.setattr(optimiser, "_BUCKET_BYTES", piece_bytes)

    def work(worker: Counting) -> tuple[list[torch.Tensor], float, int]:
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        for n, parameter in enumerate(parameters):
            if (n, worker.rank) != (1, 0):
                parameter.grad = torch.full_like(parameter, 10 * n + 1 + worker.rank)
        _, norm = share_gradient(parameters, worker)
        return [parameter.grad for parameter in parameters], norm, worker.num_sums

    group = [Counting(worker) for worker in make_group(2)]
    expected = [
        torch.full(shape, value) for shape, value in zip(SHAPES, (3.0, 12, 43, 63), strict=True)
    ]
    total = math.sqrt(sum(each.square().sum().item() for each in expected))
    for found, norm, num_sums in run_together([lambda w=w: work(w) for w in group]):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert norm == pytest.approx(total)
        assert num_sums == num_pieces
