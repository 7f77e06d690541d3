"""Linear warm-up and decay of the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have this size, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
