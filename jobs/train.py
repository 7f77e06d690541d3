"""Train a recipe, evaluate what came out and print the comparison.

    python -m jobs.train quickstart
    python -m jobs.train nq --run-dir runs/nq --seed 1 --dro.num-samples 8
    python -m jobs.train dro-paper --dry-run True
    python -m jobs.train quickstart --run-dir runs/served --experience feedback.sqlite

The same command continues a run that was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ValidationError

from jobs.cluster import cluster
from jobs.command_line import parse, pick_recipe, run_program
from jobs.recipes import RECIPES
from jobs.rounds import run_rounds
from jobs.single_run import run_once
from rlrag.config import RunConfig, describe_validation_error
from rlrag.errors import ConfigError, RlragError
from rlrag.training.run_directory import RunDirectory


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `jobs.train`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    run_dir: Path
    """Where configuration, metrics, checkpoints, bundle and result go."""
    experience: str | None = None
    """A service's log of feedback to train the selector on; short for `--training.experience`."""
    dry_run: bool = False
    """Only print the plan: steps, generator tokens, memory and placement."""


def main(argv: Sequence[str]) -> None:
    """Train, bundle, evaluate."""
    recipe, flags = pick_recipe(argv, RECIPES, "python -m jobs.train")
    default = TrainArguments(recipe, Path("runs") / recipe.recipe)
    arguments = parse(TrainArguments, default, flags, f"python -m jobs.train {recipe.recipe}")
    config, run_dir = config_of(arguments), RunDirectory(arguments.run_dir)
    if arguments.dry_run:
        from rlrag.training.plan import describe_plan

        print(describe_plan(config))
        return
    run_dir.claim(config)

    from rlrag.training.reporting import library_chatter_in

    try:
        with library_chatter_in(run_dir.logs / "libraries.log"), cluster(config.training.launcher):
            if config.trains_in_turns:
                run_rounds(config, run_dir)
            else:
                run_once(config, run_dir)
    except RlragError:
        run_dir.release()
        raise


def config_of(arguments: TrainArguments) -> RunConfig:
    """The configuration, with the log that the short flag names.

    Raises:
        ConfigError: when two logs are named, or the configuration cannot be trained on a log.
    """
    config, log = arguments.config, arguments.experience
    if log is None:
        return config
    if config.training.experience not in (None, log):
        raise ConfigError(
            f"--experience is {log!r} and --training.experience {config.training.experience!r}; "
            "give one of them"
        )
    values = config.model_dump()
    values["training"]["experience"] = log
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from error


if __name__ == "__main__":
    run_program(main)
