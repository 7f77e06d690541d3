"""Profiles selected training steps with PyTorch's profiler.

    profile/step-000010.json.gz   what PyTorch computed in a step, on rank 0
    profile/ray-timeline.json     which task ran when on which Ray worker, of the whole run

Each step has a trace of its own and is written before the next one begins, so that the events of
one step are all that is held in memory. A trace that cannot be written is named in the log and ends
no run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from rlrag.rewards.bounded_calls import CallFailure, ThreadCalls
from rlrag.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

_TIMELINE_TIMEOUT_S = 60.0


class StepProfiler:
    """Traces the chosen steps of one worker."""

    def __init__(self, steps: range, run_dir: RunDirectory) -> None:
        self._steps = steps
        self._directory = _directory(run_dir)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the block when it is a chosen step; one that raises leaves no trace."""
        if number not in self._steps:
            yield
            return
        with torch.profiler.profile() as trace:
            yield
        path = self._directory / f"step-{number:06d}.json.gz"
        staging = path.with_name(f".{path.name}")  # its ending tells the profiler to compress
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(staging))
            staging.replace(path)
        except (OSError, RuntimeError) as error:
            logger.warning("the profile of step %d could not be written: %s", number, error)
            with suppress(OSError):
                staging.unlink()


def save_ray_timeline(run_dir: RunDirectory) -> None:
    """Write what the cluster remembers of the run's tasks, from the process that started them."""
    import ray

    path = _directory(run_dir) / "ray-timeline.json"

    def write() -> None:
        staging = path.with_name(f".{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        ray.timeline(str(staging))
        staging.replace(path)

    (outcome,) = ThreadCalls(write, _TIMELINE_TIMEOUT_S, at_once=1)([{}])
    if isinstance(outcome, CallFailure):
        logger.warning("Ray's timeline could not be written to %s: %s", path, outcome.cause)


def _directory(run_dir: RunDirectory) -> Path:
    return run_dir.path / "profile"
