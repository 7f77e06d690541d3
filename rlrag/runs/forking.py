"""Starts a new run from the weights of another run's checkpoint.

Of the checkpoint's files the weights are taken: optimisers, the step, the place in the data and the
index that a retriever was searched with begin anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlrag.config import RunConfig
from rlrag.errors import ConfigError
from rlrag.runs.checkpoints import WEIGHTS, CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.submitted_job import where_to_look

_STEP = re.compile(r"step-(\d+)")
_POSTERIOR = "posterior"
"""What JSA trains a retriever with, which starts where that stood too."""
_BUILT_BY = {
    "retriever": (
        "retrieval.kind",
        "retrieval.encoder",
        "retrieval.vocabulary_encoder",
        "retrieval.vocabulary_head",
        "algorithm.tied",
        "algorithm.name",
    ),
    "selector": (
        "selector.kind",
        "selector.options",
        "selector.model",
        "selector.adapter_rank",
        "environment.num_selected",
    ),
    "generator": (
        "generator.model",
        "generator_training.method",
        "generator_training.lora_rank",
    ),
}
"""Fields that two runs must share for the weights of a part to mean the same in both."""


def check_start(config: RunConfig, run_dir: RunDirectory) -> None:
    """Refuse `training.start_from` where it cannot be started from, before anything is opened.

    A run that has begun needs the checkpoint no more.

    Raises:
        ConfigError: when it is no checkpoint of a run, or one of other parts.
    """
    if config.training.start_from is None or CheckpointStore(run_dir.checkpoints).steps():
        return
    place = _checkpoint_of(config)
    source = RunDirectory(place.parent.parent)
    if not source.config.is_file():
        raise ConfigError(
            (
                f"training.start_from {place} is not a checkpoint of a run: {source.config} is "
                "missing; "
            )
            + where_to_look(place, "give RUN_DIR/checkpoints/step-N")
        )
    before = source.read_config()
    if set(before.algorithm.parts) != set(config.algorithm.parts):
        raise ConfigError(
            f"training.start_from {place} trained {' and '.join(before.algorithm.parts)}, and this "
            f"run trains {' and '.join(config.algorithm.parts)}; give a checkpoint of the same "
            "parts, or train these"
        )
    fields = {name for part in config.algorithm.parts for name in _BUILT_BY[part]}
    differing = [
        f"{name}: {_value(before, name)!r} there, {_value(config, name)!r} here"
        for name in sorted(fields)
        if _value(before, name) != _value(config, name)
    ]
    if differing:
        raise ConfigError(
            f"training.start_from {place} does not fit ({'; '.join(differing)}); use the values of "
            "that run"
        )


def starting_weights(config: RunConfig) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of `training.start_from`, by file as a checkpoint keeps them.

    Raises:
        ConfigError: when it is no checkpoint, or lacks a part.
        CheckpointError: when it is damaged.
    """
    place = _checkpoint_of(config)
    named = _STEP.fullmatch(place.name)
    assert named is not None
    files, _ = CheckpointStore(place.parent).load(int(named[1]))
    weights = weights_in(files)
    lacking = [part for part in config.algorithm.parts if WEIGHTS[part] not in weights]
    if lacking:
        raise ConfigError(
            f"training.start_from {place} has no weights for the {' and the '.join(lacking)}; "
            "give a checkpoint of a run that trained the same parts"
        )
    return weights


def weights_in(files: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Those of a checkpoint's files that another run can start from."""
    return {name: files[name] for name in (*WEIGHTS.values(), _POSTERIOR) if name in files}


def _checkpoint_of(config: RunConfig) -> Path:
    assert config.training.start_from is not None
    place = Path(config.training.start_from).expanduser().absolute()
    named = _STEP.fullmatch(place.name)
    if named is None or int(named[1]) not in CheckpointStore(place.parent).steps():
        raise ConfigError(
            f"training.start_from {place} is not a checkpoint; "
            + where_to_look(place, "give RUN_DIR/checkpoints/step-N of a run of the same parts")
        )
    return place


def _value(config: RunConfig, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field, None)  # an algorithm may do without it
