"""JSA's training loop in this process, on the task of `openrag_runs`."""

from __future__ import annotations

from pathlib import Path

import torch
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import Task, openrag_config
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import RunConfig
from rlrag.generation.protocol import Generator
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.training.distributed.workers import SingleWorker, Workers
from rlrag.training.jsa.trainer import JSATrainer
from rlrag.training.loop import TrainingLoop
from rlrag.training.trainer import TrainerContext


def jsa_config(directory: Path, **sections) -> RunConfig:
    """A run that trains the dense encoder of questions."""
    config = openrag_config(directory / "cache", directory / "encoder")
    config = changed(
        config,
        training={"num_epochs": 4},
        algorithm={
            "name": "jsa",
            "num_prior": 6,
            "num_posterior": 6,
            "learning_rate": 3e-3,
            "temperature": 0.05,
        },
    )
    return changed(config, **sections)


def start(
    config: RunConfig,
    task: Task,
    directory: Path,
    stop_at: int | None = None,
    generator: Generator | None = None,
    workers: Workers | None = None,
) -> TrainingLoop[JSATrainer]:
    """A loop that begins a run in `directory` or continues it."""
    workers, run_dir = workers or SingleWorker(), RunDirectory(directory)
    if workers.size == 1:
        run_dir.claim(config)

    def on_step(metrics) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    context = TrainerContext(
        config,
        workers,
        run_dir,
        task.library,
        task.data,
        generator or ReadingGenerator(),
        WordPrompts(),
    )
    return TrainingLoop(config, JSATrainer(context), run_dir, workers, on_step)


def last_checkpoint(directory: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint keeps, or that of a step, by file and name."""
    store = CheckpointStore(directory / "checkpoints")
    files, _ = store.load(store.steps()[-1] if step is None else step)
    return {
        f"{file}/{name}": tensor
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    }


def series(directory: Path, name: str) -> list[float]:
    return [line[name] for line in steps_of(directory) if name in line]
