"""A directory and a step in; a run that has come so far out, as training leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlrag.config import MirrorConfig, RunConfig, TrainingConfig
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory


def mirrored_config(uri: str, keep_every: int | None = None, **mirror: Any) -> RunConfig:
    return RunConfig(
        recipe="small",
        mirror=MirrorConfig(uri=uri, **mirror),
        training=TrainingConfig(keep_every=keep_every),
    )


class Run:
    """What the loop leaves in a run directory, without what it trains."""

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self.config = config
        self.dir = RunDirectory(directory)
        self.dir.claim(config)
        self.store = CheckpointStore(self.dir.checkpoints)

    def steps_to(self, last: int, best: int = 0) -> Run:
        """Record the steps up to this one; the last has a checkpoint, as step 0 has."""
        first = len(self.dir.read_metrics())
        for step in range(first, last + 1):
            self.dir.append_metrics({"step": step})
            if step in (0, last):
                files = {"policy": {"weight": torch.full((64,), float(step))}}
                self.store.save(step, files, {"step": step, "best_step": min(best, step)})
                training = self.config.training
                self.store.keep(training.keep_checkpoints, best, training.keep_every)
        return self


def content(directory: Path) -> dict[str, bytes]:
    """Every file below that is not hidden, without logs."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.relative_to(directory).parts[0].startswith(("logs", "."))
    }
