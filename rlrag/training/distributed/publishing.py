"""Sends newly trained weights to the engines."""

from __future__ import annotations

from rlrag.generation.protocol import Generator
from rlrag.generation.weight_protocols import FollowsWeights
from rlrag.generation.weights import GeneratorWeights
from rlrag.training.distributed.workers import Workers


def hand_over(weights: GeneratorWeights, generator: Generator, workers: Workers) -> None:
    """Give the engines new weights once no worker has a batch on its way.

    All workers call this together: one sends the weights, the others learn what to expect.
    """
    workers.barrier()
    if workers.rank == 0:
        generator.load_weights(weights)
    workers.barrier()
    if workers.rank != 0 and isinstance(generator, FollowsWeights):
        generator.expect_weights(weights.version, weights.digest)
