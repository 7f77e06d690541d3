"""A configuration and a run directory in; a trained bundle and its comparison out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from rlrag.config import RunConfig
from rlrag.generation.build import measure_speed, open_generator, resolve_config
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.models import resolve_model
from rlrag.training.run_directory import RunDirectory

if TYPE_CHECKING:  # these bring torch and FAISS, which a refused command line does without
    from rlrag.pipeline import Library, TrainingData


def run_once(
    config: RunConfig, run_dir: RunDirectory, evaluate: bool = True, experience: Path | None = None
) -> None:
    """Train the configured parts together, write the bundle and compare it with its baselines.

    Args:
        config: The run.
        run_dir: Its claimed directory.
        evaluate: Whether the comparison follows.
        experience: Log of selections that were rewarded before, which a retriever may learn from.
    """
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
        num_steps = _prepare(config, run_dir, data, generator, prompts, experience)
        _train(config, run_dir, num_steps, library, data, generator, prompts)
        step = _save_bundle(config, run_dir, data)
        say(f"best at step {step}: {run_dir.bundle}")
        if evaluate and not config.trains_generator:
            _evaluate(config, run_dir, library, generator, prompts)
    if evaluate and config.trains_generator:
        evaluate_bundle(config, run_dir, library)


def evaluate_bundle(config: RunConfig, run_dir: RunDirectory, library: Library) -> None:
    """Compare the bundle with its baselines, beginning with an untrained generator."""
    with _generator(config) as (generator, prompts):
        _evaluate(config, run_dir, library, generator, prompts)


@contextmanager
def _generator(config: RunConfig) -> Iterator[tuple[CachedGenerator, PromptBuilder]]:
    """The generator with the weights that training starts from."""
    launcher = config.training.launcher
    generator, prompts = open_generator(config.generator, launcher, config.cache_path)
    try:
        yield generator, prompts
    finally:
        generator.close()


def _prepare(
    config: RunConfig,
    run_dir: RunDirectory,
    data: TrainingData,
    generator: CachedGenerator,
    prompts: PromptBuilder,
    experience: Path | None,
) -> int:
    """Say what the run will cost, and do what comes before its loop; returns the loop's steps."""
    from rlrag.training.budget import estimate_budget
    from rlrag.training.schedule import openrag_schedule

    budget = estimate_budget(config, data, prompts)
    say(budget.describe(measure_speed(generator.inner, budget.sample_prompts)))
    if not config.trains_retriever:
        return budget.num_steps
    from rlrag.training.offline_stage import run_offline_stage

    pools = run_offline_stage(
        config, data.train, generator, prompts, run_dir.pools, say, experience
    )
    return openrag_schedule(config, len(pools.usable)).num_steps


def _train(
    config: RunConfig,
    run_dir: RunDirectory,
    num_steps: int,
    library: Library,
    data: TrainingData,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.training.launch import train_locally, train_on_ray
    from rlrag.training.reporting import consumers, following

    with (
        consumers(config.training.loggers, run_dir.logs, num_steps) as found,
        following(run_dir.metrics, found),
    ):
        if config.training.launcher == "ray":
            train_on_ray(config, generator, prompts, run_dir)
        else:
            train_locally(config, library, data, generator, prompts, run_dir)


def _save_bundle(config: RunConfig, run_dir: RunDirectory, data: TrainingData) -> int:
    """Write the best checkpoint as a bundle; returns its step."""
    from rlrag.bundle import save_bundle
    from rlrag.pipeline import open_policy
    from rlrag.retrieval.open_trainable import open_trainable_encoder
    from rlrag.storage import restore_weights
    from rlrag.training.checkpoints import CheckpointStore
    from rlrag.training.loop import Progress
    from rlrag.training.parts import open_whole_generator

    store = CheckpointStore(run_dir.checkpoints)
    step = Progress(**store.load(store.steps()[-1])[1]).best_step
    files, _ = store.load(step)
    policy = open_policy(config, data.train)
    save_generator = save_retriever = None
    if config.trains_retriever:
        encoder = open_trainable_encoder(config.retrieval, config.openrag, config.cache_path)
        restore_weights(encoder, files["retriever"], f"the retriever of checkpoint {step}")
        save_retriever = encoder.save_pretrained
    else:
        restore_weights(policy, files["policy"], f"the policy of checkpoint {step}")
    if config.trains_generator:
        trained = open_whole_generator(config)
        trained.load_trainable(files["generator"])
        save_generator = trained.save_pretrained
    save_bundle(
        run_dir.bundle,
        config,
        policy,
        data.train,
        data.hashes,
        step,
        save_generator,
        save_retriever,
    )
    return step


def _evaluate(
    config: RunConfig,
    run_dir: RunDirectory,
    library: Library,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.bundle import load_bundle
    from rlrag.evaluation.systems import evaluate
    from rlrag.evaluation.table import render
    from rlrag.pipeline import open_evaluation_data, open_reward, other_retrievers

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
        retrievers=other_retrievers(config, library, bundle.retriever_dir),
    )
    record = table.to_json() | {
        "hashes": {**bundle.facts.hashes, "questions": questions_hash},
        "bundle_step": bundle.facts.step,
    }
    run_dir.evaluation.write_text(json.dumps(record, indent=2) + "\n")
    Console().print(render(table))
    say(f"written to {run_dir.evaluation}")


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)
