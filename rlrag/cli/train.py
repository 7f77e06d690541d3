r"""Train a recipe, evaluate what came out and print the comparison.

    rlrag train quickstart
    rlrag train nq --run-dir runs/nq --seed 1 --algorithm.num-samples 8
    rlrag train dro-paper --dry-run
    rlrag train factbook --algorithm.name feedback --algorithm.log feedback.sqlite \
        --selector.weights runs/factbook/bundle/selector.safetensors
    rlrag train nq --run-dir runs/fork --from runs/nq/checkpoints/step-000120

The same command continues a run that was stopped. SIGTERM makes a run write a checkpoint and end
with exit code 75; a second one ends it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ValidationError

from rlrag.cli.cluster import cluster
from rlrag.cli.command_line import parse, pick_recipe, program_name
from rlrag.cli.opened_bundle import say
from rlrag.cli.rounds import run_rounds
from rlrag.cli.single_run import run_once, say_next
from rlrag.config import RunConfig, describe_validation_error
from rlrag.data.feedback import count_selections
from rlrag.errors import ConfigError, RlragError
from rlrag.recipes import RECIPES
from rlrag.runs.directory import RunDirectory
from rlrag.runs.preemption import ended_by_sigterm
from rlrag.submitted_job import check_outlives_job


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `rlrag train`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path
    """Directory for configuration, metrics, checkpoints, bundle and result."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start from the weights of this checkpoint of another run; short for
    `--training.start-from`."""
    dry_run: bool = False
    """Only print the plan: steps, generator tokens, memory and placement."""


def main(argv: Sequence[str]) -> None:
    """Train, bundle, evaluate."""
    prog = program_name("train")
    recipe, flags = pick_recipe(argv, RECIPES, prog)
    default = TrainArguments(recipe, Path("runs") / recipe.recipe)
    arguments = parse(TrainArguments, default, flags, f"{prog} {recipe.recipe}")
    config = config_of(arguments)
    check_outlives_job("--run-dir", arguments.run_dir)
    check_outlives_job("--cache-dir", config.cache_dir)
    if arguments.dry_run:
        from rlrag.training.plan import describe_plan

        print(describe_plan(config))
        return
    train(config, arguments.run_dir)
    say_next(config, RunDirectory(arguments.run_dir))


def train(config: RunConfig, run_dir: Path | str) -> Path:
    """Train, bundle and compare with the baselines; a run that was stopped is continued.

    Args:
        config: The run; `rlrag.recipes.RECIPES` has complete ones by name.
        run_dir: Where configuration, metrics, checkpoints, bundle and result go.

    Returns:
        The directory of the bundle.

    Raises:
        RlragError: what is wrong with configuration, data or machine, or what ended the run.
    """
    directory = RunDirectory(Path(run_dir))
    check_log(config, directory)
    directory.check(config)
    with directory.in_use(say):
        try:
            with ended_by_sigterm() as listen_again:
                directory.claim(config)
                _train(config, directory, listen_again)
        except RlragError:
            directory.release()
            raise
    return directory.bundle


def _train(config: RunConfig, run_dir: RunDirectory, when_connected: Callable[[], None]) -> None:
    from rlrag.runs.forking import check_start
    from rlrag.runs.mirror import mirrored
    from rlrag.runs.reporting import library_chatter_in

    with (
        library_chatter_in(run_dir.logs / "libraries.log"),
        mirrored(config, run_dir, say),
    ):
        check_start(config, run_dir)
        _run(config, run_dir, when_connected)


def _run(config: RunConfig, run_dir: RunDirectory, when_connected: Callable[[], None]) -> None:
    with cluster(config.training.launcher):
        when_connected()
        if config.trains_in_turns:
            run_rounds(config, run_dir)
        else:
            run_once(config, run_dir)


def check_log(config: RunConfig, run_dir: RunDirectory) -> None:
    """Refuse a log of feedback that cannot be read, before anything is started.

    A run that has begun reads its own copy, which may have to be fetched from its mirror.

    Raises:
        DataError: when the log is missing, damaged or of another format.
    """
    learns = config.feedback
    if learns is not None and config.mirror.uri is None and not run_dir.feedback.exists():
        count_selections(Path(learns.log))


def config_of(arguments: TrainArguments) -> RunConfig:
    """The configuration, with the checkpoint that `--from` names.

    Raises:
        ConfigError: when it contradicts the long form of that flag, or the configuration.
    """
    if arguments.start_from is None:
        return arguments.config
    values = arguments.config.model_dump()
    start = str(Path(arguments.start_from).expanduser().absolute())
    if values["training"]["start_from"] not in (None, start):
        raise ConfigError(
            f"--from is {start!r} and --training.start-from "
            f"{values['training']['start_from']!r}; give one of them"
        )
    values["training"]["start_from"] = start
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from error
