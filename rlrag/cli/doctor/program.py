"""Check that a run can work before you start it: machine, packages, data, models, directories.

    rlrag doctor
    rlrag doctor nq --run-dir runs/nq --seed 1 --algorithm.num-samples 8
    rlrag doctor nq --json checks.json --ports 8000

Recipe and flags are those of `rlrag train`; without a recipe it is `quickstart`. One line a check,
failures last. Exit code 0 when nothing failed, 4 when something of the environment did, else 2
where configuration or run directory are wrong and 3 where data are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rlrag.cli.command_line import parse, pick_recipe, program_name
from rlrag.cli.doctor import accelerator, files, machine, packages, ray_cluster
from rlrag.cli.doctor.checks import Answer, Finding, ok, run_check
from rlrag.cli.train import TrainArguments, config_of
from rlrag.config import RunConfig
from rlrag.errors import ConfigError, DataError, RlragError, SetupError
from rlrag.models.directories import named_models
from rlrag.recipes import RECIPES
from rlrag.runs.directory import RunDirectory
from rlrag.training.needs import Needs, needs_of

_DEFAULT = "quickstart"
_ERRORS: dict[str, type[RlragError]] = {
    "environment": SetupError,
    "config": ConfigError,
    "data": DataError,
}
"""In the order of which counts where several fail."""


@dataclass(frozen=True)
class DoctorArguments(TrainArguments):
    """Flags of `rlrag doctor`: those of the run to check, and its own."""

    json: Path | None = None
    """Also write the findings to this JSON file."""
    ports: tuple[int, ...] = ()
    """Ports that must be free; those of Ray and the service when unset."""
    check_timeout_s: float = 120.0
    """Time limit of one check."""


def main(argv: Sequence[str]) -> None:
    """Check everything, print what was found.

    Raises:
        RlragError: when something failed; its class says what.
    """
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [_DEFAULT, *argv]
    prog = program_name("doctor")
    recipe, flags = pick_recipe(argv, RECIPES, prog)
    default = DoctorArguments(recipe, Path("runs") / recipe.recipe)
    arguments = parse(DoctorArguments, default, flags, f"{prog} {recipe.recipe}")
    if arguments.check_timeout_s <= 0:
        raise ConfigError(f"--check-timeout-s is {arguments.check_timeout_s:g}; give more than 0")
    config = config_of(arguments)
    found = []
    for name, check in checks_of(config, arguments).items():
        found.append(run_check(name, check, arguments.check_timeout_s))
        if found[-1].status != "failed":
            print(found[-1].line(), flush=True)
    failures = [finding for finding in found if finding.status == "failed"]
    for finding in failures:
        print(finding.line(), flush=True)
    if arguments.json is not None:
        _write(arguments.json, config, found)
    if failures:
        raise _error(failures)


def checks_of(config: RunConfig, arguments: DoctorArguments) -> dict[str, Callable[[], Answer]]:
    """Every check of a run, by name, in the order in which a run would come upon them."""
    run_dir, cache_dir = RunDirectory(arguments.run_dir), config.cache_path
    data, timeout_s = config.data, arguments.check_timeout_s / 2
    needs = _Once(config)
    checks: dict[str, Callable[[], Answer]] = {
        "python": packages.check_python,
        "packages": lambda: packages.check_packages(config),
        "run directory": lambda: files.check_run_directory(config, run_dir),
        "run storage": lambda: files.check_storage(run_dir.path, "--run-dir"),
        "cache storage": lambda: files.check_storage(cache_dir, "--cache-dir"),
        "disk": lambda: machine.check_disk(needs(), run_dir.path, cache_dir),
        "open files": lambda: machine.check_open_files(config),
        "ray": lambda: ray_cluster.check_cluster(config, needs(), timeout_s),
    }
    on_this_machine: dict[str, Callable[[], Answer]] = {
        "compiler": lambda: machine.check_compiler(config),
        "shared memory": lambda: machine.check_shared_memory(config),
        "memory": lambda: machine.check_memory(needs()),
        "gpu": lambda: accelerator.check_gpus(needs(), accelerator.read_gpus()),
        "ports": lambda: machine.check_ports(arguments.ports),
    }
    if ray_cluster.is_elsewhere(config):
        on_this_machine = dict.fromkeys(on_this_machine, _of_the_cluster)
    checks |= on_this_machine
    # This process serves them wherever the workers are.
    checks["metrics port"] = lambda: machine.check_metrics_port(config)
    checks |= {
        "corpus": lambda: files.check_corpus(data.corpus, data.passage_words),
        "train questions": lambda: files.check_questions(data.train_questions, cache_dir),
        "eval questions": lambda: files.check_questions(data.eval_questions, cache_dir),
        "split": lambda: files.check_split(config),
        "other files": lambda: files.check_other_files(config, run_dir),
        "rewards": lambda: files.check_rewards(config),
        "own parts": lambda: files.check_own_parts(config),
        "environment": lambda: files.check_environment_of(config),
        "generator model": lambda: files.check_generator(config),
    }
    for part, model in named_models(config).items():
        if part != "generator":
            name = f"{part.removesuffix('_encoder')} model"
            checks[name] = partial(files.check_model, model, cache_dir)
    return checks


class _Once:
    """What a run needs, computed by the first check that asks, within that check's time."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._needs: Needs | None = None

    def __call__(self) -> Needs:
        if self._needs is None:
            self._needs = needs_of(self._config)
        return self._needs


def _of_the_cluster() -> Answer:
    return ok("not checked: the run uses the cluster at RAY_ADDRESS")


def _write(path: Path, config: RunConfig, found: Sequence[Finding]) -> None:
    record = {"recipe": config.recipe, "checks": [asdict(finding) for finding in found]}
    try:
        path.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"cannot write --json {path}: {error.strerror or error}; choose another file"
        ) from error
    print(f"written to {path}", file=sys.stderr)


def _error(failures: Sequence[Finding]) -> RlragError:
    kinds = {finding.kind for finding in failures}
    kind = next(kind for kind in _ERRORS if kind in kinds)
    names = ", ".join(finding.name for finding in failures)
    return _ERRORS[kind](
        f"{len(failures)} of the checks failed: {names}; their lines above say what to do"
    )
