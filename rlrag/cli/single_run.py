"""Runs one training: build the parts, train, write the bundle, compare with baselines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlrag import plugins
from rlrag.cli.opened_bundle import say, say_evaluation, write_output
from rlrag.config import RunConfig
from rlrag.errors import CheckpointError
from rlrag.generation.build import (
    check_positions,
    check_scores,
    measure_speed,
    open_generator,
    resolve_config,
)
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder
from rlrag.models.directories import resolve_generator, resolve_model
from rlrag.runs.directory import RunDirectory
from rlrag.runs.log_files import run_name

if TYPE_CHECKING:  # these bring torch and FAISS, which a refused command line does without
    import torch

    from rlrag.bundle_files import Evaluated
    from rlrag.pipeline import Library, TrainingData
    from rlrag.runs.checkpoints import CheckpointStore
    from rlrag.training.feedback.selections import LoggedData
    from rlrag.training.trainer import Files


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
    from rlrag.environment.rollout import check_environment
    from rlrag.pipeline import open_training_data

    evaluate = evaluate and bool(config.systems)
    library = open_all(config, evaluate)
    if config.feedback is not None:
        _train_on_log(config, run_dir, library, Path(config.feedback.log))
        if evaluate:
            evaluate_bundle(config, run_dir, library)
        return
    data = open_training_data(config, library)
    check_environment(config.environment, data.train)
    run_dir.check_sources(data.hashes)
    say(
        f"{len(data.train.corpus):,} passages; {len(data.train):,} questions to train on, "
        f"{len(data.validation) if data.validation else 0} held back; starting the generator"
    )
    with _generator(config, run_dir) as (generator, prompts):
        num_steps = _prepare(config, run_dir, data, generator, prompts, experience)
        _train(config, run_dir, num_steps, library, data, generator, prompts)
        step = _save_bundle(config, run_dir, data)
        say(f"best at step {step}: {run_dir.bundle}")
        if evaluate and not config.trains_generator:
            _evaluate(config, run_dir, library, generator, prompts)
    if evaluate and config.trains_generator:
        evaluate_bundle(config, run_dir, library)


def say_next(config: RunConfig, run_dir: RunDirectory) -> None:
    """Say which commands draw the run and, where it ended with a bundle, serve it."""
    from rlrag.bundle_files import code_to_answer

    place = run_dir.path
    report = ("--run-dir", str(place), "--output", str(place / "report.html"))
    say(f"see the report by: {shlex.join(('rlrag', 'report', *report))}")
    if run_dir.bundle.is_dir():
        code = " ".join(code_to_answer(config))
        settings = (f"allow_code={code}",) if code else ()
        say(f"serve it by: {shlex.join(('rlrag', 'serve', str(run_dir.bundle), *settings))}")


def open_all(config: RunConfig, evaluate: bool) -> Library:
    """Open everything that the run reads, so that a mistake costs no training; returns the library.

    Models, rewards, the environment's name and questions come before minutes go into an index, and
    the candidates of the final comparison before the first step.

    Raises:
        RlragError: naming what cannot be opened.
    """
    from rlrag.data.load import load_questions
    from rlrag.data.split import remarks, training_questions
    from rlrag.environment.episodes import registered
    from rlrag.pipeline import open_evaluation_data, open_library, other_retrievers
    from rlrag.rewards.composite import RewardModel

    check_positions(config.generator, resolve_generator(config.generator, config.cache_path))
    if config.selector.reads_texts:
        resolve_model(config.selector.model, config.cache_path)
    RewardModel(config.reward)
    plugins.check_named(config)
    registered(config.environment.id)
    evaluation = None
    if evaluate:
        evaluation = load_questions(config.data.eval_questions, config.cache_path)
        evaluation = evaluation.sample(config.data.max_eval_questions, seed=0)
    if config.feedback is None:
        for sentence in remarks(config, training_questions(config), evaluation):
            say(f"warning: {sentence}")
    if config.data.corpus is None:
        say(f"{config.recipe}: no corpus; {config.retrieval.kind} brings the passages")
    else:
        say(f"{config.recipe}: reading {config.data.corpus} and its index")
    library = open_library(config)
    if evaluate:
        open_evaluation_data(config, library)
        for name, candidates in other_retrievers(config, library, None).items():
            # Shards would have their actors twice.
            if name in config.systems and config.retrieval.num_shards == 1:
                candidates()
    return library


def evaluate_bundle(config: RunConfig, run_dir: RunDirectory, library: Library) -> None:
    """Compare the bundle with its baselines, beginning with an untrained generator."""
    say("final evaluation: starting the generator")
    with _generator(config, run_dir) as (generator, prompts):
        _evaluate(config, run_dir, library, generator, prompts)


def _train_on_log(config: RunConfig, run_dir: RunDirectory, library: Library, log: Path) -> None:
    """Train the selector on what a service logged and write the bundle; asks no generator.

    The service may go on writing: the run keeps the log as it was when it began.
    """
    from rlrag.data.feedback import copy_feedback
    from rlrag.environment.rollout import check_environment
    from rlrag.training.feedback.selections import open_logged_data
    from rlrag.training.feedback.trainer import logged_schedule
    from rlrag.training.launch import train_on_log

    if not run_dir.feedback.exists():
        copy_feedback(log, run_dir.feedback)
    logged = open_logged_data(config, library, run_dir.feedback)
    check_environment(config.environment, logged.train.candidates)
    run_dir.check_sources(data_of_log(library, logged).hashes)
    num_steps = logged_schedule(config, len(logged.train)).num_steps
    say(f"{logged.describe()}; {num_steps:,} steps without generator tokens")
    with _followed(config, run_dir, num_steps):
        train_on_log(config, logged, run_dir)
    step = _save_bundle(config, run_dir, data_of_log(library, logged))
    say(f"best at step {step}: {run_dir.bundle}")
    for place, title in ((0, "before training"), (step, "of the bundle")):
        found = {record["step"]: record for record in run_dir.read_metrics()}[place]
        if "validation/value" in found:
            say(_describe_estimate(title, found))


def data_of_log(library: Library, logged: LoggedData) -> TrainingData:
    """What a bundle says of the data, where a service's log was trained on."""
    from rlrag.pipeline import TrainingData

    hashes = {"corpus": library.corpus.content_hash, "experience": logged.content_hash}
    return TrainingData(logged.train.candidates, None, hashes)


def _describe_estimate(title: str, metrics: dict[str, Any]) -> str:
    from rlrag.training.feedback.trainer import CONFIDENCE

    low, high = metrics["validation/value_low"], metrics["validation/value_high"]
    return (
        f"held-back reward {title}: {metrics['validation/value']:.3f} "
        f"({100 * CONFIDENCE:g} %: {low:.3f} to {high:.3f}), "
        f"effective sample size {metrics['validation/ess']:.1f}"
    )


@contextmanager
def _generator(
    config: RunConfig, run_dir: RunDirectory
) -> Iterator[tuple[CachedGenerator, PromptBuilder]]:
    """The generator with the weights that training starts from."""
    launcher = config.training.launcher
    generator, prompts = open_generator(
        config.generator, launcher, config.cache_path, (run_dir.logs, run_name(run_dir.path))
    )
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
) -> int | None:
    """Say what the run will cost, and do what comes before its loop; returns the loop's steps.

    These are None where they are not known.
    """
    from rlrag.training.budget import estimate_budget
    from rlrag.training.launch import needs_scores
    from rlrag.training.schedule import openrag_schedule

    budget = estimate_budget(config, data, prompts)
    speed = measure_speed(generator.inner, budget.sample_prompts)
    if (config.generator.is_remote or config.generator.is_own) and needs_scores(config):
        check_scores(generator.inner, budget.sample_prompts[0])
    say(budget.describe(speed, config.training.max_generator_tokens))
    if not config.trains_by_openrag:
        return budget.num_steps
    from rlrag.training.openrag.offline_stage import run_offline_stage

    pools = run_offline_stage(
        config, data.train, generator, prompts, run_dir.pools, say, experience
    )
    return openrag_schedule(config, len(pools.usable)).num_steps


def _train(
    config: RunConfig,
    run_dir: RunDirectory,
    num_steps: int | None,
    library: Library,
    data: TrainingData,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.training.launch import train_locally, train_on_ray

    with _followed(config, run_dir, num_steps):
        if config.training.launcher == "ray":
            train_on_ray(config, generator, prompts, run_dir)
        else:
            train_locally(config, library, data, generator, prompts, run_dir)


def best_step(store: CheckpointStore) -> int:
    """The checkpoint that a run ends with, or would end with if it stopped now.

    Raises:
        CheckpointError: when there is no checkpoint, or the newest one is damaged.
    """
    from rlrag.training.loop import Progress

    steps = store.steps()
    if not steps:
        raise CheckpointError(
            f"{store.directory} has no checkpoint yet; train first, or give another run"
        )
    return Progress(**store.load(steps[-1])[1]).best_step


def bundle_checkpoint(
    directory: Path,
    config: RunConfig,
    data: TrainingData,
    step: int,
    files: Files,
    evaluated: Evaluated | None = None,
    finish: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write a checkpoint as a bundle.

    Args:
        directory: Where the bundle goes.
        config: The run.
        data: Its training data.
        step: That of the checkpoint.
        files: Its tensors, as `CheckpointStore.load` gives them.
        evaluated: What the run's final evaluation found, if it was of this checkpoint.
        finish: See `save_bundle`.

    Raises:
        CheckpointError: when the tensors do not fit the configuration.
    """
    from rlrag.bundle import save_bundle
    from rlrag.files.directories import restore_weights
    from rlrag.pipeline import open_policy
    from rlrag.training.parts import open_whole_generator

    policy = open_policy(config, data.train)
    save_generator = save_retriever = None
    if config.trains_retriever:
        save_retriever = _trained_retriever(config, files["retriever"], step)
    if "policy" in files:
        restore_weights(policy, files["policy"], f"the policy of checkpoint {step}")
    if config.trains_generator:
        trained = open_whole_generator(config)
        trained.load_trainable(files["generator"])
        save_generator = trained.save_pretrained
    save_bundle(
        directory,
        config,
        policy,
        data.train,
        data.hashes,
        step,
        save_generator,
        save_retriever,
        evaluated,
        finish,
    )


def _trained_retriever(
    config: RunConfig, weights: Mapping[str, torch.Tensor], step: int
) -> Callable[[Path], None]:
    """What writes the encoder with these weights into a new directory."""
    from rlrag.files.directories import restore_weights
    from rlrag.retrieval.trainable.open import open_trainable_encoder
    from rlrag.retrieval.trainable.query_encoder import open_query_encoder, save_with_passages

    what = f"the retriever of checkpoint {step}"
    if config.algorithm.name != "jsa":
        encoder = open_trainable_encoder(config.retrieval, config.openrag, config.cache_path)
        restore_weights(encoder, weights, what)
        return encoder.save_pretrained
    of_questions = open_query_encoder(config.retrieval, config.cache_path)
    restore_weights(of_questions, weights, what)
    return partial(save_with_passages, of_questions, config.retrieval, config.cache_path)


@contextmanager
def _followed(config: RunConfig, run_dir: RunDirectory, num_steps: int | None) -> Iterator[None]:
    """Show every step of the block as it is recorded."""
    from rlrag.runs.reporting import consumers, following

    with (
        consumers(config.training.loggers, run_dir.logs, num_steps) as found,
        following(run_dir.metrics, found),
    ):
        yield


def _save_bundle(config: RunConfig, run_dir: RunDirectory, data: TrainingData) -> int:
    """Write the best checkpoint as a bundle; returns its step."""
    from rlrag.runs.checkpoints import CheckpointStore

    store = CheckpointStore(run_dir.checkpoints)
    step = best_step(store)
    bundle_checkpoint(run_dir.bundle, config, data, step, store.load(step)[0])
    return step


def _evaluate(
    config: RunConfig,
    run_dir: RunDirectory,
    library: Library,
    generator: CachedGenerator,
    prompts: PromptBuilder,
) -> None:
    from rlrag.bundle import add_evaluation, load_bundle
    from rlrag.bundle_files import Evaluated, GoldenQuestion, code_to_answer, golden_sample
    from rlrag.evaluation.question_records import QuestionRecorder
    from rlrag.evaluation.systems import Answered, HeldBack, evaluate
    from rlrag.evaluation.table import render
    from rlrag.generation.prompts import cut_warning
    from rlrag.pipeline import (
        candidates_of,
        open_evaluation_data,
        open_reward,
        other_retrievers,
        validation_questions,
    )

    bundle = load_bundle(run_dir.bundle, code_to_answer(config))
    candidates, questions_hash = open_evaluation_data(config, library)
    weights = bundle.generator_weights(
        resolve_config(config.generator, config.training.launcher).dtype
    )
    held_back = None
    if (validation := validation_questions(config, library)) is not None:
        held_back = HeldBack(
            candidates_of(library, validation, config),
            other_retrievers(config, library, None, validation),
        )
    golden: tuple[GoldenQuestion, ...] = ()
    recorder = QuestionRecorder(config.environment.num_selected)

    def keep(name: str, answered: Answered) -> None:
        nonlocal golden
        recorder.keep(name, answered)
        if name == _golden_system(config):
            golden = golden_sample(answered.questions, answered.selections, answered.answers)

    answering = open_reward(config, generator, prompts)
    table = evaluate(
        config,
        bundle.policy,
        candidates,
        answering,
        progress=say_evaluation(config, len(candidates)),
        tune_generator=lambda: generator.load_weights(weights) if weights else None,
        retrievers=other_retrievers(config, library, bundle.retriever_dir),
        keep=keep,
        held_back=held_back,
    )
    record = table.to_json() | {
        "hashes": {**bundle.facts.hashes, "questions": questions_hash},
        "bundle_step": bundle.facts.step,
        "prompts": answering.prompt_counts.shares(),
    }
    add_evaluation(run_dir.bundle, Evaluated(golden, record))
    recorder.write(run_dir.questions, record)
    write_output(run_dir.evaluation, json.dumps(record, indent=2) + "\n")
    Console().print(render(table))
    if warning := cut_warning(record["prompts"]):
        say(warning)
    say(f"written to {run_dir.evaluation}")


def _golden_system(config: RunConfig) -> str | None:
    """The evaluated system that answers as the bundle will; None where none repeats its answers."""
    systems = config.systems
    if config.generator.temperature:
        return None
    if "trained" not in systems and config.algorithm.parts == ("retriever",):
        # Other untrained selectors keep the retriever's order.
        return None if config.selector.kind == "listwise_lm" else "tuned_retriever"
    return "trained"
