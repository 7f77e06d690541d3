"""Train a recipe, evaluate what came out and print the comparison.

    python -m jobs.train quickstart
    python -m jobs.train nq --run-dir runs/nq --seed 1 --dro.num-samples 8

The same command continues a run that was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jobs.cluster import cluster
from jobs.command_line import parse, pick_recipe, run_program
from jobs.recipes import RECIPES
from rlrag.config import RunConfig
from rlrag.errors import RlragError
from rlrag.generation.build import measure_speed, open_generator
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.training.run_directory import RunDirectory


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `jobs.train`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path
    """Where configuration, metrics, checkpoints, bundle and result go."""


def main(argv: Sequence[str]) -> None:
    """Train, bundle, evaluate."""
    recipe, flags = pick_recipe(argv, RECIPES, "python -m jobs.train")
    default = TrainArguments(recipe, Path("runs") / recipe.recipe)
    arguments = parse(TrainArguments, default, flags, f"python -m jobs.train {recipe.recipe}")
    config, run_dir = arguments.config, RunDirectory(arguments.run_dir)
    run_dir.claim(config)

    from rlrag.training.reporting import library_chatter_in

    try:
        with library_chatter_in(run_dir.logs / "libraries.log"), cluster(config.training.launcher):
            generator, prompts = open_generator(
                config.generator, config.training.launcher, config.cache_path
            )
            try:
                _run(config, run_dir, generator, prompts)
            finally:
                generator.close()
    except RlragError:
        run_dir.release()
        raise


def _run(
    config: RunConfig, run_dir: RunDirectory, generator: CachedGenerator, prompts: PromptBuilder
) -> None:
    from rlrag.bundle import load_bundle, save_bundle
    from rlrag.evaluation.systems import evaluate
    from rlrag.evaluation.table import render
    from rlrag.pipeline import (
        open_evaluation_data,
        open_library,
        open_policy,
        open_reward,
        open_training_data,
    )
    from rlrag.training.budget import estimate_budget
    from rlrag.training.checkpoints import CheckpointStore
    from rlrag.training.launch import train_locally, train_on_ray
    from rlrag.training.loop import Progress
    from rlrag.training.reporting import consumers, following

    say(f"{config.recipe}: reading {config.data.corpus} and its index")
    library = open_library(config)
    data = open_training_data(config, library)
    say(
        f"{len(library.corpus):,} passages; {len(data.train):,} questions to train on, "
        f"{len(data.validation) if data.validation else 0} held back; starting the generator"
    )
    budget = estimate_budget(config, data, prompts)
    speed = measure_speed(generator.inner, budget.sample_prompts)
    say(budget.describe(speed))
    with (
        consumers(config.training.loggers, run_dir.logs, budget.num_steps) as found,
        following(run_dir.metrics, found),
    ):
        if config.training.launcher == "ray":
            train_on_ray(config, generator, prompts, run_dir)
        else:
            train_locally(config, data, generator, prompts, run_dir)
    store = CheckpointStore(run_dir.checkpoints)
    progress = Progress(**store.read_state(store.steps()[-1]))
    policy = open_policy(config, data.train)
    store.load_policy(progress.best_step, policy)
    save_bundle(run_dir.bundle, config, policy, data.train, data.hashes, progress.best_step)
    say(f"best at step {progress.best_step}; evaluating {run_dir.bundle}")
    candidates, questions_hash = open_evaluation_data(config, library)
    table = evaluate(
        config,
        load_bundle(run_dir.bundle).policy,
        candidates,
        open_reward(config, generator, prompts),
        progress=lambda name: say(f"  {name}"),
    )
    record = table.to_json() | {
        "hashes": {**data.hashes, "questions": questions_hash},
        "bundle_step": progress.best_step,
    }
    run_dir.evaluation.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(render(table))
    say(f"written to {run_dir.evaluation}")


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
