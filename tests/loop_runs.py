"""A configuration and questions in; the training loop in this process, which a test may stop, out.

The selector is small, the generator that is trained a tiny language model. The prompts of
`WordPrompts` are bytes, which that model reads too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import RunConfig
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import TrainingData
from rlrag.runs.directory import RunDirectory
from rlrag.training.distributed.workers import SingleWorker, Workers
from rlrag.training.dro.trainer import DROTrainer
from rlrag.training.loop import TrainingLoop
from rlrag.training.trainer import TrainerContext


class StopAfter(Exception):
    """Raised by a test to end a run at a chosen step, as a kill would."""


def changed(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """The configuration with some fields set, checked as one that is read from a file.

    Another algorithm starts from its defaults.
    """
    values = json.loads(config.to_json())
    for name, fields in sections.items():
        if name == "algorithm" and fields.get("name", config.algorithm.name) != (
            config.algorithm.name
        ):
            values[name] = {}
        values[name].update(fields)
    return RunConfig.from_json(json.dumps(values))


def co_training(
    config: RunConfig, model_dir: Path, dro: Mapping[str, Any] | None = None, **training: Any
) -> RunConfig:
    """Selector and a tiny generator, trained together in float32."""
    return changed(
        config,
        generator={"model": str(model_dir), "dtype": "float32", "max_new_tokens": 3},
        algorithm={"parts": ["selector", "generator"], "num_samples": 4, **(dro or {})},
        generator_training={
            "precision": "float32",
            "lora_rank": 2,
            "learning_rate": 1e-2,
        },
        training=training,
    )


def start(
    config: RunConfig,
    data: TrainingData,
    directory: Path,
    stop_at: int | None = None,
    generator: Generator | None = None,
    workers: Workers | None = None,
    prompts: PromptBuilder | WordPrompts | None = None,
) -> TrainingLoop[DROTrainer]:
    """A loop that begins a run in `directory` or continues it.

    Where several workers run, whoever launches them has claimed the directory.
    """
    run_dir = RunDirectory(directory)
    workers = workers or SingleWorker()
    if workers.size == 1:
        run_dir.claim(config)
    generator, prompts = generator or ReadingGenerator(), prompts or WordPrompts()

    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    library: Any = None  # DRO asks it for nothing
    context = TrainerContext(config, workers, run_dir, library, data, generator, prompts)
    return TrainingLoop(config, DROTrainer(context), run_dir, workers, on_step)


def weights(loop: TrainingLoop[DROTrainer]) -> dict[str, torch.Tensor]:
    """Everything that is trained, optimisers included, by file and name."""
    return {
        f"{file}/{name}": tensor.clone()
        for file, tensors in loop.trainer.parts.tensors().items()
        for name, tensor in tensors.items()
    }


def policy_weights(loop: TrainingLoop[DROTrainer]) -> dict[str, torch.Tensor]:
    """Copies of the policy's weights by name."""
    return {name: t.clone() for name, t in loop.trainer.parts.policy.state_dict().items()}


def steps_of(directory: Path) -> list[dict[str, float]]:
    """The records of a run without its clocks."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("_s", "_per_s"))}
        for line in lines
    ]
