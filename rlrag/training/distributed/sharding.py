"""Shards a model over the workers with FSDP2.

A sharded tensor is a DTensor: every worker holds a slice of it. Functions that make it whole, or
slice it, are called by all workers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rlrag.errors import ConfigError


def shard(model: nn.Module, blocks: Sequence[nn.Module], device: str, bfloat16: bool) -> None:
    """Spread the weights of each block, and then of what is left, over all workers in place.

    A worker holds one block whole at a time, while it computes; the rest stays sliced. With
    `bfloat16` the gathered weights, and so the computation, are in bfloat16, while the slices and
    the sum of the gradients stay in float32. (Autocast would keep a half-precision copy of every
    weight until the backward pass, which is what sharding is to avoid.)

    Raises:
        ConfigError: when this process belongs to no group of workers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not torch.distributed.is_initialized():
        raise ConfigError(
            "generator_training.sharding 'fsdp2' shards the generator over a torch.distributed "
            "process group, but this process is in none; use training.launcher 'ray', or "
            "sharding 'replicated'"
        )
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bfloat16
        else MixedPrecisionPolicy()
    )
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a sliced one is a slice of; any other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's slice of a sliced tensor; any other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sliced_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Slice a whole tensor as `reference` is sliced; unchanged when that is whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(reference, DTensor):
        return tensor
    mesh = reference.device_mesh
    # Every worker has the whole tensor already: without a source none sends it to the others.
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, reference.placements, src_data_rank=None
    )
