"""A run directory belongs to one configuration, and its records survive stops and full disks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlrag.config import DROConfig, RunConfig
from rlrag.errors import ConfigError, DataError, InUseError, RunDirectoryError
from rlrag.files.text import hidden_beside
from rlrag.runs.directory import RunDirectory

CONFIG = RunConfig(recipe="small")


def claimed(path: Path) -> RunDirectory:
    run_dir = RunDirectory(path)
    run_dir.claim(CONFIG)
    return run_dir


def test_a_claim_writes_the_configuration_and_may_be_repeated(tmp_path):
    run_dir = claimed(tmp_path / "runs" / "one")
    run_dir.append_metrics({"step": 0})
    assert RunConfig.from_json(run_dir.config.read_text()) == CONFIG
    assert run_dir.logs.is_dir()
    claimed(tmp_path / "runs" / "one")
    assert run_dir.read_metrics() == [{"step": 0}]
    assert sorted(path.name for path in run_dir.path.iterdir()) == [
        "config.json",
        "logs",
        "metrics.jsonl",
    ]


def test_the_paths_are_those_that_others_rely_on(tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    names = {
        "config": "config.json",
        "metrics": "metrics.jsonl",
        "checkpoints": "checkpoints",
        "bundle": "bundle",
        "evaluation": "evaluation.json",
        "questions": "evaluation.questions.jsonl",
    }
    assert {key: getattr(run_dir, key) for key in names} == {
        key: tmp_path / "run" / name for key, name in names.items()
    }
    assert not run_dir.path.exists()


def test_home_and_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert RunDirectory(Path("~/runs/a")).path == tmp_path / "home" / "runs" / "a"
    assert RunDirectory(Path("runs/a")).path == tmp_path / "runs" / "a"


def test_another_configuration_is_refused_with_every_field_that_differs(tmp_path):
    run_dir = claimed(tmp_path / "run")
    other = CONFIG.model_copy(update={"seed": 3, "algorithm": DROConfig(num_samples=4)})
    with pytest.raises(RunDirectoryError) as caught:
        run_dir.claim(other)
    message = str(caught.value)
    assert message.startswith(f"{run_dir.path} belongs to a run with another configuration (")
    assert "(algorithm.num_samples: 8 there, 4 given; seed: 0 there, 3 given)" in message
    assert "choose another --run-dir" in message
    assert RunConfig.from_json(run_dir.config.read_text()) == CONFIG


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="contains files but no config"):
        claimed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_pools_and_turns_of_a_run_that_failed_before_its_first_record_are_taken_over(tmp_path):
    """They cost generator tokens, and say themselves what they were made from."""
    run_dir = claimed(tmp_path / "run")
    run_dir.pools.mkdir()
    run_dir.rounds.mkdir()
    run_dir.release()
    assert not run_dir.config.exists()
    assert claimed(tmp_path / "run").config.is_file()


def test_an_empty_directory_may_be_claimed(tmp_path):
    assert claimed(tmp_path).config.is_file()


def test_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match=r"run is a file; choose another --run-dir"):
        claimed(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=r"cannot write to .*run/below"):
        claimed(tmp_path / "run" / "below")


@pytest.mark.parametrize("text", ["", "{", '{"sed": 1}', "\udcff"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=str(tmp_path / "config.json")):
        claimed(tmp_path)


def test_a_run_that_failed_before_its_first_record_gives_the_directory_back(tmp_path):
    run_dir = claimed(tmp_path / "run")
    (run_dir.logs / "libraries.log").write_text("said")
    run_dir.release()
    corrected = CONFIG.model_copy(update={"seed": 3})
    run_dir.claim(corrected)
    run_dir.append_metrics({"step": 0})
    run_dir.release()
    with pytest.raises(RunDirectoryError, match="seed: 3 there, 0 given"):
        run_dir.claim(CONFIG)


def test_a_process_that_fails_leaves_what_another_one_made(tmp_path):
    first = claimed(tmp_path / "run")
    first.feedback.write_text("log")
    second = claimed(tmp_path / "run")
    second.release()
    assert first.config.is_file()
    assert first.feedback.is_file()
    first.release()
    assert not first.config.exists()


def test_a_directory_in_use_is_refused_and_left_as_it_is(tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    said: list[str] = []
    with run_dir.in_use(said.append):
        RunDirectory(tmp_path / "run").check(CONFIG)  # nobody has claimed it yet
        with (
            pytest.raises(InUseError, match=rf"{run_dir.path} is in use by process "),
            RunDirectory(tmp_path / "run").in_use(said.append),
        ):
            raise AssertionError
        run_dir.claim(CONFIG)
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["config.json", "logs"]
    assert said == []


def test_whoever_takes_the_directory_clears_what_killed_writers_left(tmp_path):
    run_dir = claimed(tmp_path / "run")
    turn = RunDirectory(run_dir.rounds / "1-retriever")
    for each in (run_dir, turn):
        each.experience.mkdir(parents=True)
        for place in (each.metrics, each.config, each.experience / "worker-0.jsonl"):
            hidden_beside(place).write_text("half of")
        for place in (each.bundle, each.checkpoints / "step-000060"):
            hidden_beside(place).mkdir(parents=True)
    with run_dir.in_use(print):
        assert not list(run_dir.path.rglob(".*"))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    place = RunDirectory(tmp_path / "file" / "run")
    with pytest.raises(RunDirectoryError, match=r"cannot write to .*file/run"), place.in_use(print):
        raise AssertionError


def test_data_that_changed_between_a_stop_and_its_continuation_is_refused(tmp_path):
    run_dir = claimed(tmp_path / "run")
    run_dir.check_sources({"corpus": "c1", "train_questions": "q1"})
    run_dir.check_sources({"corpus": "c2", "train_questions": "q2"})  # nothing was trained yet
    run_dir.append_metrics({"step": 0})
    run_dir.check_sources({"corpus": "c2", "train_questions": "q2"})
    with pytest.raises(RunDirectoryError, match=r"a different version of train_questions"):
        run_dir.check_sources({"corpus": "c2", "train_questions": "q3"})
    with pytest.raises(
        RunDirectoryError, match=r"a different version of corpus and train_questions"
    ):
        run_dir.check_sources({"corpus": "c3", "train_questions": "q3"})
    with pytest.raises(RunDirectoryError, match=r"a different version of feedback"):
        run_dir.check_sources({"corpus": "c2", "train_questions": "q2", "feedback": "f1"})
    for text in ("", "[1]", "{"):
        run_dir.sources.write_text(text)
        with pytest.raises(DataError, match=r"sources\.json is damaged"):
            run_dir.check_sources({"corpus": "c2", "train_questions": "q2"})


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b'{"step": "1"}', b"\xff", b""])
def test_damaged_records_are_named_with_their_line(tmp_path, line):
    run_dir = claimed(tmp_path / "run")
    run_dir.append_metrics({"step": 0})
    with run_dir.metrics.open("ab") as stream:
        stream.write(line + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is damaged"):
        run_dir.read_metrics()


def test_records_that_a_checkpoint_contains_must_be_there(tmp_path):
    run_dir = claimed(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"metrics\.jsonl has no record of step 0, .* checkpoint of step 0"
    ):
        run_dir.check_records(0)
    for step in (0, 1, 3):
        run_dir.append_metrics({"step": step})
    run_dir.check_records(1)
    with pytest.raises(
        DataError, match=r"has no record of step 2, which the checkpoint of step 3 includes"
    ):
        run_dir.check_records(3)


def test_records_are_read_back_in_order(tmp_path):
    run_dir = claimed(tmp_path)
    assert run_dir.read_metrics() == []
    records = [{"step": step, "loss": 0.1 * step, "f1": float(step)} for step in range(3)]
    for record in records:
        run_dir.append_metrics(record)
    assert run_dir.read_metrics() == records
    assert [json.loads(line) for line in run_dir.metrics.read_text().splitlines()] == records


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, cut):
    run_dir = claimed(tmp_path)
    for step in range(3):
        run_dir.append_metrics({"step": step, "loss": 0.5})
    whole = run_dir.metrics.read_bytes()
    run_dir.metrics.write_bytes(whole[:-cut])
    assert [record["step"] for record in run_dir.read_metrics()] == [0, 1]
    run_dir.truncate_metrics(2)
    run_dir.append_metrics({"step": 2, "loss": 0.5})
    assert run_dir.metrics.read_bytes() == whole


@pytest.mark.parametrize(("num_steps", "num_left"), [(-1, 0), (0, 1), (2, 3), (9, 4)])
def test_records_after_the_checkpoint_are_dropped(tmp_path, num_steps, num_left):
    run_dir = claimed(tmp_path)
    for step in range(4):
        run_dir.append_metrics({"step": step})
    run_dir.truncate_metrics(num_steps)
    assert [record["step"] for record in run_dir.read_metrics()] == list(range(num_left))


# A limit on the size of files stands for the full disk; see test_storage.py.
_FULL_DISK = """
import resource, sys
from pathlib import Path
from rlrag.config import RunConfig
from rlrag.errors import RlragError
from rlrag.files.text import hidden_beside
from rlrag.runs.directory import RunDirectory

run_dir = RunDirectory(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
config = RunConfig(recipe="small")
for attempt in (
    lambda: run_dir.claim(config),
    lambda: run_dir.truncate_metrics(40),
    lambda: [run_dir.append_metrics({"step": step}) for step in range(50, 90)],
):
    try:
        attempt()
    except RlragError as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_loses_no_record_and_no_configuration(tmp_path):
    run_dir = claimed(tmp_path / "run")
    for step in range(50):
        run_dir.append_metrics({"step": step})
    config = run_dir.config.read_text()
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(run_dir.path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    claim, truncate, append = done.stdout.splitlines()
    assert claim.startswith(f"RunDirectoryError cannot write to {run_dir.path}: File too large")
    for said in (truncate, append):
        assert said.startswith(f"CheckpointError cannot write {run_dir.metrics}: File too large")
        assert "run the same command again" in said
    assert run_dir.config.read_text() == config
    assert [record["step"] for record in run_dir.read_metrics()][:50] == list(range(50))
    assert sorted(path.name for path in run_dir.path.iterdir()) == [
        "config.json",
        "logs",
        "metrics.jsonl",
    ]


def test_a_folder_named_in_latin_1_is_refused_at_the_start(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode("réseau".encode("latin-1"))
    with pytest.raises(RunDirectoryError, match=r"seau' is not valid UTF-8; rename"):
        RunDirectory(folder).check(RunConfig())
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(RunDirectoryError, match="is not valid UTF-8"):
        RunDirectory(Path("run")).check(RunConfig())
    RunDirectory(tmp_path / "réseau").check(RunConfig())
    with pytest.raises(ValidationError, match="unicode string"):
        RunConfig(cache_dir=str(folder))
