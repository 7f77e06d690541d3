"""Train a recipe, evaluate what came out and print the comparison.

    python -m jobs.train quickstart
    python -m jobs.train nq --run-dir runs/nq --seed 1 --dro.num-samples 8
    python -m jobs.train dro-paper --dry-run True

The same command continues a run that was stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from jobs.cluster import cluster
from jobs.command_line import parse, pick_recipe, run_program
from jobs.recipes import RECIPES
from rlrag.config import RunConfig
from rlrag.errors import RlragError
from rlrag.generation.build import measure_speed, open_generator, resolve_config
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.models import resolve_model
from rlrag.training.run_directory import RunDirectory

if TYPE_CHECKING:  # these bring torch and FAISS, which a refused command line does without
    from rlrag.pipeline import Library, TrainingData


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `jobs.train`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path
    """Where configuration, metrics, checkpoints, bundle and result go."""
    dry_run: bool = False
    """Only print the plan: steps, generator tokens, memory and placement."""


def main(argv: Sequence[str]) -> None:
    """Train, bundle, evaluate."""
    recipe, flags = pick_recipe(argv, RECIPES, "python -m jobs.train")
    default = TrainArguments(recipe, Path("runs") / recipe.recipe)
    arguments = parse(TrainArguments, default, flags, f"python -m jobs.train {recipe.recipe}")
    config, run_dir = arguments.config, RunDirectory(arguments.run_dir)
    if arguments.dry_run:
        from rlrag.training.plan import describe_plan

        print(describe_plan(config))
        return
    run_dir.claim(config)

    from rlrag.training.reporting import library_chatter_in

    try:
        with library_chatter_in(run_dir.logs / "libraries.log"), cluster(config.training.launcher):
            _run(config, run_dir)
    except RlragError:
        run_dir.release()
        raise


def _run(config: RunConfig, run_dir: RunDirectory) -> None:
    from rlrag.pipeline import open_library, open_training_data

    # Before minutes go into an index.
    resolve_model(config.generator.model, config.cache_path)
    if config.selector.kind != "features":
        resolve_model(config.selector.model, config.cache_path)
    say(f"{config.recipe}: reading {config.data.corpus} and its index")
    library = open_library(config)
    data = open_training_data(config, library)
    say(
        f"{len(library.corpus):,} passages; {len(data.train):,} questions to train on, "
        f"{len(data.validation) if data.validation else 0} held back; starting the generator"
    )
    with _generator(config) as (generator, prompts):
        _train(config, run_dir, data, generator, prompts)
        step = _save_bundle(config, run_dir, data)
        say(f"best at step {step}; evaluating {run_dir.bundle}")
        if not config.trains_generator:
            _evaluate(config, run_dir, library, data, generator, prompts)
            return
    # The engines hold trained weights now, and the baselines are answered without them.
    with _generator(config) as (generator, prompts):
        _evaluate(config, run_dir, library, data, generator, prompts)


@contextmanager
def _generator(config: RunConfig) -> Iterator[tuple[CachedGenerator, PromptBuilder]]:
    """The generator with the weights that training starts from."""
    launcher = config.training.launcher
    generator, prompts = open_generator(config.generator, launcher, config.cache_path)
    try:
        yield generator, prompts
    finally:
        generator.close()


def _train(
    config: RunConfig,
    run_dir: RunDirectory,
    data: TrainingData,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.training.budget import estimate_budget
    from rlrag.training.launch import train_locally, train_on_ray
    from rlrag.training.reporting import consumers, following

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


def _save_bundle(config: RunConfig, run_dir: RunDirectory, data: TrainingData) -> int:
    """Write the best checkpoint as a bundle; returns its step."""
    from rlrag.bundle import save_bundle
    from rlrag.pipeline import open_policy
    from rlrag.storage import restore_weights
    from rlrag.training.checkpoints import CheckpointStore
    from rlrag.training.loop import Progress
    from rlrag.training.parts import open_whole_generator

    store = CheckpointStore(run_dir.checkpoints)
    step = Progress(**store.load(store.steps()[-1])[1]).best_step
    files, _ = store.load(step)
    policy = open_policy(config, data.train)
    restore_weights(policy, files["policy"], f"checkpoint {step}")
    save_generator = None
    if config.trains_generator:
        trained = open_whole_generator(config)
        trained.load_trainable(files["generator"])
        save_generator = trained.save_pretrained
    save_bundle(run_dir.bundle, config, policy, data.train, data.hashes, step, save_generator)
    return step


def _evaluate(
    config: RunConfig,
    run_dir: RunDirectory,
    library: Library,
    data: TrainingData,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.bundle import load_bundle
    from rlrag.evaluation.systems import evaluate
    from rlrag.evaluation.table import render
    from rlrag.pipeline import open_evaluation_data, open_reward

    bundle = load_bundle(run_dir.bundle)
    candidates, questions_hash = open_evaluation_data(config, library)
    weights = bundle.generator_weights(
        resolve_config(config.generator, config.training.launcher).dtype
    )
    table = evaluate(
        config,
        bundle.policy,
        candidates,
        open_reward(config, generator, prompts),
        progress=lambda name: say(f"  {name}"),
        tune_generator=lambda: generator.load_weights(weights) if weights else None,
    )
    record = table.to_json() | {
        "hashes": {**data.hashes, "questions": questions_hash},
        "bundle_step": bundle.facts.step,
    }
    run_dir.evaluation.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(render(table))
    say(f"written to {run_dir.evaluation}")


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_program(main)
