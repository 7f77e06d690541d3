"""Contract tests for your own trainers, and a small run to test them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlrag.config import (
    Algorithm,
    EnvironmentConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.environment.sample_task import sample_candidates
from rlrag.pipeline import Library, TrainingData
from rlrag.retrieval.build import open_retrievers
from rlrag.runs.checkpoints import WEIGHTS
from rlrag.runs.directory import RunDirectory
from rlrag.runs.forking import weights_in
from rlrag.testing.reader import ReadingGenerator, WordPrompts
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.launch import open_trainer
from rlrag.training.trainer import Files, Trainer, TrainerContext

_NUM_STEPS = 4
_TOLERANCE = 1e-4


def sample_context(directory: Path, algorithm: Algorithm) -> TrainerContext:
    """A run on the built-in task whose generator is no language model.

    Args:
        directory: An empty folder.
        algorithm: What trains, as `OwnTrainerConfig(name="package.module:name")`.
    """
    table = sample_candidates()
    retrieval = RetrievalConfig(kind="bm25", encoder=None, num_candidates=table.num_candidates)
    training = TrainingConfig(
        launcher="local",
        batch_size=4,
        num_epochs=2,
        learning_rate=1e-2,
    )
    config = RunConfig(
        cache_dir=str(directory / "cache"),
        retrieval=retrieval,
        environment=EnvironmentConfig(num_selected=1),
        algorithm=algorithm,
        training=training,
    )
    prompts: Any = WordPrompts()
    return TrainerContext(
        config=config,
        workers=SingleWorker(),
        run_dir=RunDirectory(directory / "run"),
        library=Library(table.corpus, open_retrievers(table.corpus, retrieval, config.cache_path)),
        data=TrainingData(table, table, {}),
        generator=ReadingGenerator(),
        prompts=prompts,
    )


def check_trainer(context: TrainerContext) -> None:
    """Whether a trainer learns, continues to the same weights, and shares its work.

    A stopped run continues from a checkpoint as if nothing had been; a checkpoint holds the weights
    of each part, and can be started from without the rest; two workers hold equal weights, those
    that one alone has. Building a trainer may not wait for the other workers.

    Args:
        context: A run with at least four steps that names the trainer in `algorithm.name`; such
            as `sample_context`.

    Raises:
        AssertionError: what is broken.
        TrainerError: what a trainer of somebody's own gave or raised.
    """
    alone = _Run(context)
    assert alone.trainer.num_steps >= _NUM_STEPS, (
        f"num_steps is {alone.trainer.num_steps}; check it on a run of at least {_NUM_STEPS}"
    )
    alone.trainer.warm_start()
    first = alone.tensors()
    for part in context.config.algorithm.parts:
        assert WEIGHTS[part] in first, f"tensors has no file {WEIGHTS[part]!r} of the {part}"
    found = alone.trainer.validate(0)
    assert not found or alone.trainer.best_by in found, "best_by names no metric of validate"
    assert _differing(alone.tensors(), first) is None, "validate changes what a checkpoint keeps"
    half = alone.steps(0, _NUM_STEPS // 2)
    whole = alone.steps(_NUM_STEPS // 2, _NUM_STEPS)
    for part in context.config.algorithm.parts:
        name = WEIGHTS[part]
        assert _differing({name: whole[name]}, first), f"no step changes the weights of the {part}"
    again = _Run(context)
    again.trainer.resume(_NUM_STEPS // 2, half, first)
    assert (what := _differing(again.tensors(), half)) is None, f"load did not take over {what}"
    resumed = again.steps(_NUM_STEPS // 2, _NUM_STEPS)
    assert (what := _differing(resumed, whole)) is None, f"a resumed run ends with another {what}"
    weights = weights_in(first)  # what training.start_from gives
    again.trainer.resume(0, weights, weights)
    again.close()
    alone.close()

    def take_part(run: _Run) -> Files:
        run.trainer.resume(0, first, first)
        found = run.steps(0, _NUM_STEPS)
        run.close()
        return found

    # Built one after the other: transformers does not load two models in two threads at once.
    runs = [_Run(replace(context, workers=worker)) for worker in make_group(2)]
    one, other = run_together([partial(take_part, run) for run in runs])
    assert (what := _differing(one, other)) is None, f"two workers hold another {what} each"
    what = _differing(one, whole, _TOLERANCE)
    assert what is None, f"two workers end with another {what} than one alone"


class _Run:
    """A trainer, and copies of what it would keep."""

    def __init__(self, context: TrainerContext) -> None:
        self.trainer: Trainer = open_trainer(context)

    def steps(self, start: int, end: int) -> dict[str, dict[str, torch.Tensor]]:
        for step in range(start, end):
            self.trainer.step(step, pauses_after=True)
        return self.tensors()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            file: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for file, tensors in self.trainer.tensors().items()
        }

    def close(self) -> None:
        self.trainer.close()


def _differing(files: Files, others: Files, tolerance: float = 0.0) -> str | None:
    """The first tensor of `files` that is another one in `others`."""
    for file, tensors in files.items():
        there: Mapping[str, torch.Tensor] = others.get(file, {})
        for name, tensor in tensors.items():
            if name not in there or not torch.allclose(
                tensor.double(), there[name].double(), rtol=0.0, atol=tolerance, equal_nan=True
            ):
                return f"{file}/{name}"
    return None
