"""Get the data of a recipe from the hub or from your own files.

    rlrag data nq --output data
    rlrag data nq --from biencoder-nq-train.json.gz biencoder-nq-dev.json.gz --output data
    rlrag data nq --from NQ-open.train.jsonl NQ-open.dev.jsonl psgs_w100.tsv.gz --output data
    rlrag data hotpotqa --from hotpot_train_v1.1.json hotpot_dev_distractor_v1.json --output data \
        --max-questions 5000

Data sets: nq, hotpotqa, musique, squad2, 2wiki. The folder then holds corpus/NAME.jsonl.gz and
questions/NAME.train.jsonl and NAME.dev.jsonl; recipes read the folder that the environment variable
RLRAG_DATA_DIR names. Without --from the extra `hub` is needed.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rlrag.cli.command_line import parse, program_name
from rlrag.config import DATA_DIR_VARIABLE, RunConfig
from rlrag.data.folder import PUBLISHED, SPLITS, PublishedSet
from rlrag.data.json_objects import read_json_objects
from rlrag.data.published import Written, convert, read_passages_tsv
from rlrag.data.readers import PlacedRecords, read_hub
from rlrag.errors import ConfigError, DataError, SetupError, nearest_name
from rlrag.submitted_job import check_outlives_job

_SPLIT_WORDS = {"train": "train", "dev": "dev", "validation": "dev"}


@dataclass(frozen=True)
class DataArguments:
    """Flags of `rlrag data`."""

    name: tyro.conf.Positional[str]
    """Data set: nq, hotpotqa, musique, squad2 or 2wiki."""
    output: Path
    """Folder to write to; it may hold other data sets."""
    files: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Original files of the data set, plain or gzip, each with `train` or `dev` in its name; for nq
    also a TSV file with more passages. Downloads from the hub when unset."""
    max_questions: int | None = None
    """Keep a fixed random sample of this many questions of each split, and only the passages that
    belong to them; all when unset."""
    overwrite: bool = False
    """Replace the files of this data set in the folder."""
    cache_dir: Path = Path(RunConfig().cache_dir)
    """Folder for downloads."""


def main(argv: Sequence[str], load: Callable[..., tuple[str, PlacedRecords]] = read_hub) -> None:
    """Read, convert, write, and print the counts.

    Args:
        argv: The words after the command.
        load: What reads a split of a data set on the hub.
    """
    arguments = parse(DataArguments, None, argv, program_name("data"))
    name, folder = arguments.name, arguments.output.expanduser()
    if name not in PUBLISHED:
        hint = nearest_name(name, PUBLISHED, f"there are: {', '.join(PUBLISHED)}")
        raise ConfigError(f"unknown data set {name!r}; {hint}")
    if arguments.max_questions is not None and arguments.max_questions < 1:
        raise ConfigError(f"--max-questions is {arguments.max_questions}; give at least 1")
    check_outlives_job("--output", folder)
    tables = [path for path in arguments.files if ".tsv" in path.suffixes]
    if tables and name != "nq":
        raise ConfigError(f"--from {tables[0]}: only nq takes a TSV file of passages")
    if arguments.files:
        splits = _of_files(name, [path for path in arguments.files if path not in tables])
    else:
        splits = _of_hub(PUBLISHED[name], arguments.cache_dir.expanduser() / "hub", load)
    written = convert(
        name,
        splits,
        folder,
        passages=itertools.chain.from_iterable(map(read_passages_tsv, tables)),
        max_questions=arguments.max_questions,
        overwrite=arguments.overwrite,
    )
    _report(name, folder, written)


def _of_files(name: str, files: Sequence[Path]) -> Mapping[str, PlacedRecords]:
    """The records by split, which the files' names tell.

    Raises:
        ConfigError: when a name does not tell it, or no file has a split.
    """
    of_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        words = re.split("[^a-z]+", path.name.lower())
        named = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
        if len(named) != 1:
            raise ConfigError(
                f"--from {path}: its name must contain either train or dev, which tells its "
                "split; rename it"
            )
        of_split[named.pop()].append(path)
    for split, paths in of_split.items():
        if not paths:
            raise ConfigError(
                f"--from has no file of {split} questions, which the recipes need; give "
                f"{PUBLISHED[name].files}"
            )
    return {
        split: itertools.chain.from_iterable(map(read_json_objects, paths))
        for split, paths in of_split.items()
    }


def _of_hub(
    source: PublishedSet, cache_dir: Path, load: Callable[..., tuple[str, PlacedRecords]]
) -> Mapping[str, PlacedRecords]:
    found = {}
    for split, theirs in zip(SPLITS, source.hub_splits, strict=True):
        try:
            _, found[split] = load(
                source.hub_id, source.hub_subset, theirs, cache_dir, source.hub_files
            )
        except (DataError, SetupError) as error:
            raise type(error)(f"{error}; or give --from {source.files}") from error
    return found


def _report(name: str, folder: Path, written: Written) -> None:
    for split, count in written.num_questions.items():
        print(f"{name}: {count:,} {split} questions")
    print(f"{name}: {written.num_passages:,} passages")
    for left_out in written.left_out:
        print(f"left out: {left_out}")
    print(f"for recipes: export {DATA_DIR_VARIABLE}={shlex.quote(str(folder.absolute()))}")
