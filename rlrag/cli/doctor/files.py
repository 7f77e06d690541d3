"""Checks of corpus, questions, models and directories that a run reads and writes.

Nothing is left behind, and nothing is fetched.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from itertools import islice
from pathlib import Path

from rlrag import plugins
from rlrag.cli.doctor.checks import Answer, failed, ok, warning
from rlrag.cli.doctor.machine import existing
from rlrag.config import BUILTIN_MODELS, RunConfig
from rlrag.errors import ModelNotFoundError, RlragError, RunDirectoryError
from rlrag.files.sqlite import Journal
from rlrag.models.directories import model_here, resolve_model, tokenizer_hash
from rlrag.runs.directory import RunDirectory
from rlrag.submitted_job import where_to_look

_NUM_FIRST = 1000
_HUB_TIMEOUT_S = 10.0
_LOCK_TIMEOUT_S = 10.0
_HUB_PREFIX = "hub:"


def check_corpus(spec: str | None, passage_words: int) -> Answer:
    """Whether the first passages of a corpus can be read, and how much of them is cut.

    Raises:
        DataError: naming what is missing, or the malformed line.
        SetupError: when the package of the built-in corpus is missing.
    """
    if spec is None:
        return ok("none; the retriever returns the passages with their texts")
    if spec.startswith(_HUB_PREFIX):
        return _hub_data(spec)
    from rlrag.data.checks import Tally
    from rlrag.data.load import cut_passages, first_passages

    tally, passages = Tally(), islice(first_passages(spec), _NUM_FIRST)
    num_found = sum(1 for _ in cut_passages(passages, passage_words, tally))
    if not num_found:
        return failed(
            f"{spec} has no passages with text", "check that it is the right file", "data"
        )
    cut = tally.report(spec, num_found)
    said = f"{spec}: the first {num_found:,} passages are well-formed"
    if cut.cut:
        said += (
            f"; data.passage_words {passage_words} cuts {cut.cut.count:,} of them, "
            f"{cut.cut_share:.1%} of their words"
        )
    if not cut.is_clean:
        return warning(said, "split long passages or raise data.passage_words to keep them")
    return ok(said)


def check_questions(spec: str, cache_dir: Path) -> Answer:
    """Whether all questions of a source can be read.

    Raises:
        DataError: naming what is missing, or the malformed line.
        SetupError: when the package of the built-in questions is missing.
    """
    if spec.startswith(_HUB_PREFIX):
        return _hub_data(spec)
    from rlrag.data.load import load_questions

    return ok(f"{spec}: all {len(load_questions(spec, cache_dir)):,} questions are well-formed")


def check_split(config: RunConfig) -> Answer:
    """Whether enough questions can be learned from, and what is to be known of them.

    Raises:
        DataError: when too few can.
    """
    from rlrag.data.load import load_questions
    from rlrag.data.split import are_here, remarks, training_questions

    data = config.data
    if config.feedback is not None:
        return ok("not needed: the run learns from a log")
    if not are_here(data.train_questions):
        return ok(f"not checked: {data.train_questions} is not on this machine")
    evaluation = None
    try:
        load_questions(data.train_questions, config.cache_path)
        if config.systems and are_here(data.eval_questions):
            evaluation = load_questions(data.eval_questions, config.cache_path)
            evaluation = evaluation.sample(data.max_eval_questions, seed=0)
    except RlragError:  # the checks of these files say why
        return ok("not checked: not all questions can be read")
    found = training_questions(config)
    counted = f"{len(found.train):,} of {found.num_found:,} questions are used for training"
    said = remarks(config, found, evaluation)
    if said:
        return warning("; ".join([counted, *said]), "check that this is intended")
    return ok(counted)


def _hub_data(spec: str) -> Answer:
    if importlib.util.find_spec("datasets") is None:
        return failed(f"{spec} needs the package 'datasets'", "install the extra 'hub'")
    return ok(f"{spec}: downloaded when the run starts, not checked now")


def check_other_files(config: RunConfig, run_dir: RunDirectory) -> Answer:
    """Whether log, weights, checkpoint and run file are there that the configuration names.

    Raises:
        DataError: when the log of feedback cannot be used.
        ConfigError: when the checkpoint cannot be started from.
    """
    from rlrag.cli.train import check_log
    from rlrag.runs.forking import check_start

    said = []
    if config.feedback is not None:
        check_log(config, run_dir)
        said.append(f"{config.feedback.log}: a log of feedback")
    if config.training.start_from is not None:
        check_start(config, run_dir)
        said.append(f"{config.training.start_from}: fits")
    selector = config.selector
    for field, name in (("weights", selector.weights), ("imitation_run", selector.imitation_run)):
        if name is None:
            continue
        if not Path(name).expanduser().is_file():
            return failed(
                f"selector.{field} is {name!r}, which is not a file",
                where_to_look(name, "correct the path"),
                "data",
            )
        said.append(f"{name}: found")
    return ok("; ".join(said) or "none needed")


def check_model(name: str, cache_dir: Path, with_weights: bool = True) -> Answer:
    """Whether a model, or its tokenizer alone, is on this machine, or can be fetched.

    Raises:
        ModelNotFoundError: when it is neither.
    """
    if name in BUILTIN_MODELS:
        return ok(f"{name}: built in, from a package of the extra {BUILTIN_MODELS[name]!r}")
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")):
            resolve_model(name, cache_dir)  # refuses it
        if model_here(name, cache_dir) is not None:
            return ok(f"{name}: already downloaded")
        return _on_hub(name)
    if not with_weights:
        tokenizer_hash(path)  # refuses a directory without one
    elif not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        return failed(
            f"{name} lacks config.json or .safetensors weights",
            "save the model there with save_pretrained, or correct the path",
        )
    return ok(f"{name}: found")


def _on_hub(name: str) -> Answer:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelNotFoundError(
            f"model {name!r} is not on this machine and cannot be downloaded from the hub "
            f"({reason[:200]}); give a local path, or a built-in name: "
            f"{', '.join(BUILTIN_MODELS)}"
        ) from error
    return ok(f"{name}: downloaded from the hub when the run starts")


def check_generator(config: RunConfig) -> Answer:
    """Whether the generator's model can be had, and reads prompts as long as they may get.

    Raises:
        ModelNotFoundError: when it cannot be had.
        ConfigError: when prompts may be longer than it reads.
    """
    from rlrag.generation.build import check_positions

    name = config.generator.model
    answer = check_model(name, config.cache_path, with_weights=not config.generator.is_remote)
    if answer.status == "ok" and Path(name).expanduser().is_dir():
        check_positions(config.generator, Path(name).expanduser())
    return answer


def check_rewards(config: RunConfig) -> Answer:
    """Whether the reward functions can be imported and called as they are.

    Raises:
        RlragError: naming the function that cannot.
    """
    from rlrag.rewards.composite import RewardModel

    RewardModel(config.reward)
    return ok(", ".join(config.reward.functions))


def check_own_parts(config: RunConfig) -> Answer:
    """Whether parts of somebody's own can be imported and have the options that they are given.

    Raises:
        ConfigError: naming what is wrong.
    """
    return ok(", ".join(plugins.check_named(config)) or "none")


def check_environment_of(config: RunConfig) -> Answer:
    """Whether the environment can be made, with made-up candidates, as its contract asks.

    Raises:
        RlragError: naming what is wrong.
    """
    from rlrag.environment.rollout import check_environment

    check_environment(config.environment)
    return ok(config.environment.id)


def check_run_directory(config: RunConfig, run_dir: RunDirectory) -> Answer:
    """Whether the run may use its directory, or continue there.

    Raises:
        RunDirectoryError: when another run, or something else, is there.
    """
    try:
        run_dir.check(config)
    except PermissionError as error:
        raise RunDirectoryError(
            f"cannot read {run_dir.path}: {error.strerror}; choose another --run-dir"
        ) from error
    is_there = run_dir.metrics.is_file()
    return ok(f"{run_dir.path}: {'a run to continue' if is_there else 'free for a run'}")


def check_storage(path: Path, flag: str) -> Answer:
    """Whether a directory's file system keeps what a run relies on.

    Files and directories take each other's place by rename, reach the disk by fsync, and are locked
    as SQLite does it.
    """
    there = existing(path)
    advice = f"choose a folder on another disk by {flag}, or correct its owner and mode"
    try:
        staging = Path(tempfile.mkdtemp(prefix=".rlrag-doctor-", dir=there))
    except OSError as error:
        return failed(f"{there} cannot be written: {error.strerror}", advice)
    try:
        _exercise(staging)
    except (OSError, sqlite3.Error) as error:
        return failed(f"{there} lacks what a run relies on: {error}", advice)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # a check must not fail on what it made
    return ok(f"{there} can be written, with rename, fsync and locks")


def _exercise(staging: Path) -> None:
    """Do what checkpoints and caches do.

    Raises:
        OSError, sqlite3.Error: when the file system refuses.
    """
    old, new = staging / "old", staging / "new"
    old.write_text("old")
    with new.open("w") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.write("new")
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(old)
    if old.read_text() != "new":
        raise OSError("renaming a file over another one did not replace it")
    (staging / "building").mkdir()
    (staging / "building").rename(staging / "whole")
    with closing(sqlite3.connect(staging / "cache.sqlite", timeout=_LOCK_TIMEOUT_S)) as database:
        Journal.of(staging).enter(database, _LOCK_TIMEOUT_S)
        with database:
            database.execute("CREATE TABLE found (number INTEGER)")
