"""What a program that was submitted to a cluster says of files that were not uploaded with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlrag.bundle_files import read_bundle
from rlrag.cli import evaluate, export, train
from rlrag.cli.doctor.files import check_other_files
from rlrag.config import RunConfig, SelectorConfig, TrainingConfig
from rlrag.data.feedback import read_feedback
from rlrag.data.lines import check_exists
from rlrag.errors import ConfigError, RlragError
from rlrag.files.directories import load_tensors
from rlrag.models.directories import resolve_model
from rlrag.runs.directory import RunDirectory
from rlrag.runs.forking import check_start

ABSENT = "runs/absent"
EVALUATE = ["--bundle", "/b", "--corpus", "/c", "--questions", "/q", "--output", "e.json"]


def open_start(path: str) -> None:
    # The flag makes the path absolute.
    training = TrainingConfig(start_from=os.path.abspath(path))
    check_start(RunConfig(training=training), RunDirectory(Path("/shared/run")))


READERS = {
    "questions": lambda path: check_exists(Path(path)),
    "log": lambda path: read_feedback(Path(path)),
    "bundle": lambda path: read_bundle(Path(path)),
    "weights": lambda path: load_tensors(Path(path)),
    "checkpoint": lambda path: open_start(f"{path}/checkpoints/step-000010"),
    "model": lambda path: resolve_model(os.path.join(".", path), Path("cache")),
}


@pytest.fixture(params=["submitted with a directory", "submitted without", "not submitted"])
def uploaded(request, tmp_path, monkeypatch) -> bool:
    """Whether the folder that this runs in was uploaded."""
    monkeypatch.chdir(tmp_path)
    environment = {"working_dir": "gcs://_ray_pkg_0.zip"} if "with a" in request.param else {}
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if request.param != "not submitted":
        job = {"runtime_env": environment, "metadata": {}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    return bool(environment)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_was_not_uploaded_is_explained(uploaded, kind):
    with pytest.raises(RlragError) as caught:
        READERS[kind](ABSENT)
    assert (".gitignore and .rayignore" in str(caught.value)) == uploaded
    with pytest.raises(RlragError) as caught:
        READERS[kind](f"/{ABSENT}")
    assert "uploaded" not in str(caught.value)


def test_doctor_explains_it_too(uploaded):
    config = RunConfig(selector=SelectorConfig(weights=ABSENT))
    answer = check_other_files(config, RunDirectory(Path("run")))
    assert (".gitignore and .rayignore" in answer.advice) == uploaded


@pytest.mark.parametrize(
    ("main", "words", "flag"),
    [
        (train.main, ["factbook", "--run-dir", "runs/a"], "--run-dir runs/a"),
        (train.main, ["factbook", "--run-dir", "/a", "--cache-dir", "c"], "--cache-dir c"),
        (evaluate.main, EVALUATE, r"--output e\.json"),
        (export.main, ["--run-dir", "/r", "--output", "b"], "--output b"),
    ],
)
def test_nothing_is_written_where_it_would_be_deleted(uploaded, main, words, flag):
    if not uploaded:
        return
    with pytest.raises(ConfigError, match=f"^{flag} is inside the uploaded copy .* absolute path"):
        main(words)


def test_a_job_is_told_how_to_get_the_data_folder(uploaded, monkeypatch):
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    with pytest.raises(RlragError, match="set the environment variable RLRAG_DATA_DIR") as caught:
        check_exists(Path("$RLRAG_DATA_DIR/corpus/nq.jsonl.gz"))
    assert ("with 'env RLRAG_DATA_DIR=DIR'" in str(caught.value)) == submitted
