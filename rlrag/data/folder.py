"""The data folder that RLRAG_DATA_DIR names: its layout, and how to fill it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlrag.config import DATA_DIR_VARIABLE
from rlrag.submitted_job import is_submitted, where_to_look

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class PublishedSet:
    """A public data set: what its publishers call its files, and its place on the hub.

    Where the hub has files alone, `hub_files` names that of each split.
    """

    files: str
    hub_id: str
    hub_subset: str | None = None
    hub_splits: tuple[str, str] = ("train", "validation")
    hub_files: Mapping[str, str] | None = None


PUBLISHED: Mapping[str, PublishedSet] = {
    "nq": PublishedSet(
        "biencoder-nq-train.json and biencoder-nq-dev.json of DPR, or NQ-open.train.jsonl and "
        "NQ-open.dev.jsonl with psgs_w100.tsv",
        "json",
        hub_splits=("train", "dev"),
        hub_files={
            split: f"hf://datasets/Tevatron/wikipedia-nq/nq-{split}.jsonl.gz" for split in SPLITS
        },
    ),
    "hotpotqa": PublishedSet(
        "hotpot_train_v1.1.json and hotpot_dev_distractor_v1.json",
        "hotpotqa/hotpot_qa",
        "distractor",
    ),
    "musique": PublishedSet(
        "musique_ans_v1.0_train.jsonl and musique_ans_v1.0_dev.jsonl", "dgslibisey/MuSiQue"
    ),
    "squad2": PublishedSet("train-v2.0.json and dev-v2.0.json", "rajpurkar/squad_v2"),
    "2wiki": PublishedSet(
        "train.json and dev.json of 2WikiMultihopQA", "framolfese/2WikiMultihopQA"
    ),
}
"""The data sets that `rlrag data` knows, by the name of their files in the folder."""


def corpus_path(folder: Path | str, name: str) -> Path:
    """The passages of a data set."""
    return Path(folder, "corpus", f"{name}.jsonl.gz")


def questions_path(folder: Path | str, name: str, split: str) -> Path:
    """The questions of a split of a data set."""
    return Path(folder, "questions", f"{name}.{split}.jsonl")


def how_to_get(path: Path) -> str:
    """What to do about a file that does not exist."""
    command = command_that_makes(path)
    if not _is_of_unset_folder(path):
        return where_to_look(path) + (f", or make the file: {command}" if command else "")
    advice = (
        f"check the path, or set the environment variable {DATA_DIR_VARIABLE} to the data folder"
    )
    if command:
        advice += f", which this makes: {command}"
    if is_submitted():
        advice += (
            "; a job does not get that of the shell that submits it: begin the submitted command "
            f"with 'env {DATA_DIR_VARIABLE}=DIR', where every node sees DIR"
        )
    return advice


def command_that_makes(path: Path) -> str | None:
    """The command that makes a file of the data folder; None for any other file."""
    name, parent = path.name.partition(".")[0], path.parent.parent
    of_name = [corpus_path(parent, name), *(questions_path(parent, name, s) for s in SPLITS)]
    if name not in PUBLISHED or path not in of_name:
        return None
    if _is_of_unset_folder(path):
        return f"rlrag data {name} --output DIR"
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if folder and parent == Path(folder):
        return f"rlrag data {name} --output {shlex.quote(folder)}"
    return None


def _is_of_unset_folder(path: Path) -> bool:
    return bool(path.parts) and path.parts[0].strip("${}") == DATA_DIR_VARIABLE
