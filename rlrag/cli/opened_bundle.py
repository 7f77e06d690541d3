"""Loads a bundle for a program that answers questions with it.

Used by `rlrag evaluate`, `rlrag probe` and, where results are written, the end of `rlrag train`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlrag.cli.cluster import cluster
from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError, InUseError
from rlrag.files.locks import held
from rlrag.files.text import write_whole
from rlrag.submitted_job import check_outlives_job

if TYPE_CHECKING:  # they bring torch, which flags are checked without
    from rlrag.bundle import Bundle
    from rlrag.pipeline import Pipeline


@contextmanager
def opened_pipeline(
    bundle: Bundle, config: RunConfig, launcher: str, program: str
) -> Iterator[Pipeline]:
    """The bundle's pipeline while the block runs, and the cluster that its generator needs.

    The generator has the weights that training found, until `Pipeline.tune` is called.

    Args:
        bundle: Loaded.
        config: Its configuration, changed as the program wants.
        launcher: Where the generator runs.
        program: Names the temporary log that takes what libraries print.
    """
    from rlrag.pipeline import Pipeline
    from rlrag.runs.reporting import private_library_chatter

    with (
        private_library_chatter(program),
        cluster(launcher),
        Pipeline(bundle, config, launcher, tuned=False) as pipeline,
    ):
        yield pipeline


def check_flags(limit: int | None, output: Path) -> None:
    """Refuse, before anything is loaded, what could only fail at the end.

    Raises:
        ConfigError: no questions are to be asked, or the output has no directory or is one.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; give at least 1")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: the directory {output.parent} does not exist")
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory; give the name of a file in it")
    check_outlives_job("--output", output)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other programs from writing the same output, a file or a directory, during the block.

    A pipe or a device is left to whoever reads it.

    Raises:
        InUseError: when another process is about to write it.
        CheckpointError: when nothing can be written beside it.
    """
    if is_stream(output):
        yield
        return
    lock = output.with_name(f".{output.name}.in-use")
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock, str(output), say))
        except InUseError:
            raise
        except OSError as error:
            raise _unwritable(output, error) from error
        yield


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def say_evaluation(config: RunConfig, num_questions: int) -> Callable[[str], None]:
    """Say what is evaluated now, and on how many questions; returns what counts the systems."""
    total, numbers = len(config.systems), itertools.count(1)
    say(f"evaluating {total} systems on {num_questions:,} questions")
    return lambda name: say(f"  system {next(numbers)} of {total}: {name}")


def on_other_data(
    config: RunConfig, corpus: str | None, questions: str | None, limit: int | None
) -> RunConfig:
    """The configuration with another corpus and other evaluation questions; its own for None.

    Of other questions all are asked unless a limit says how many, of its own as many as in the run.
    """
    data = config.data.model_dump()
    if corpus is not None:
        data["corpus"] = corpus
    if questions is not None:
        data |= {"eval_questions": questions, "max_eval_questions": None}
    if limit is not None:
        data["max_eval_questions"] = limit
    return type(config).model_validate(config.model_dump() | {"data": data})


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device: written to as it is, with no place for files beside."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write_output(path: Path, text: str) -> None:
    """Write a file that holds the old text or the new one; a pipe or a device is written to.

    Raises:
        CheckpointError: when it cannot be written; an older file then stays as it was.
    """
    try:
        if is_stream(path):
            path.write_text(text)
        else:
            write_whole(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}; free disk space or make the directory "
        "writable, then run the same command again"
    )
