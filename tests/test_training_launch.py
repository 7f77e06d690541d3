"""What is opened and checked before a run's first step, and how it ends, without Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from loop_runs import changed, co_training, steps_of
from stand_ins import ReadingGenerator, WordPrompts
from test_training_engine_check import Stale

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, PreemptedError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.training.launch import needs_scores, train_locally

NO_LIBRARY: Any = None  # DRO asks it for nothing
DENSE = {"retrieval": {"kind": "dense"}}


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, True),
        ({"reward": {"functions": ["exact_match"]}}, False),
        ({"algorithm": {"name": "openrag"}, **DENSE}, True),
        ({"algorithm": {"name": "openrag", "labels": "gold"}, **DENSE}, False),
        (
            {
                "algorithm": {"name": "jsa"},
                **DENSE,
                "reward": {"functions": ["exact_match"]},
            },
            True,
        ),
        (
            {
                "algorithm": {"name": "openrag", "labels": "generator_else_gold"},
                **DENSE,
                "reward": {"functions": ["exact_match"]},
            },
            True,
        ),
    ],
)
def test_likelihoods_are_asked_for_where_something_learns_from_them(changes, needs):
    assert needs_scores(changed(RunConfig(), **changes)) == needs


def run_dir_of(config: RunConfig, directory: Path) -> RunDirectory:
    run_dir = RunDirectory(directory)
    run_dir.claim(config)
    return run_dir


@pytest.mark.parametrize("engine", [TransformersGenerator, Stale])
def test_engines_that_do_not_take_weights_over_train_nothing(
    small_config, few_data, model_dir, tmp_path, engine
):
    config = co_training(small_config, model_dir, batch_size=4, num_epochs=1, validate_every=9)
    config = changed(config, generator={"device": "cpu"})
    run_dir = run_dir_of(config, tmp_path / "run")
    prompts = PromptBuilder(config.generator.prompt, load_tokenizer(model_dir))
    engines = engine(model_dir, "float32", "cpu")
    arguments = (config, NO_LIBRARY, few_data, engines, prompts, run_dir)
    if engine is Stale:
        with pytest.raises(ConfigError, match="check before training"):
            train_locally(*arguments)
        assert CheckpointStore(run_dir.checkpoints).steps() == []
    else:
        train_locally(*arguments)
        assert engines.version == steps_of(run_dir.path)[-1]["step"] == 3


def test_a_signal_ends_a_local_run_after_its_step(small_config, training_data, tmp_path):
    run_dir = run_dir_of(small_config, tmp_path / "run")

    class Signalling(ReadingGenerator):
        """Gets a SIGTERM in the third step."""

        def score(self, prompts, answers):
            if len(run_dir.read_metrics()) == 3 and not run_dir.stop_is_asked():
                os.kill(os.getpid(), signal.SIGTERM)
            return super().score(prompts, answers)

    before = signal.signal(signal.SIGTERM, lambda signum, frame: None)  # the tests go on
    try:
        with pytest.raises(PreemptedError, match="with a checkpoint of step 3"):
            train_locally(
                small_config, NO_LIBRARY, training_data, Signalling(), WordPrompts(), run_dir
            )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert CheckpointStore(run_dir.checkpoints).steps()[-1] == 3
