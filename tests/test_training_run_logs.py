"""What a process of a run says, line by line, as objects that name run, step and actor."""

from __future__ import annotations

import json
import logging
import stat
import tempfile
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from rlrag.errors import SetupError
from rlrag.json_logs import JsonLines
from rlrag.runs.directory import RunDirectory
from rlrag.runs.log_files import note_step, worker_log
from rlrag.runs.reporting import (
    following,
    library_chatter_in,
    private_library_chatter,
)

FIELDS = ["time", "level", "logger", "run", "step", "actor", "message", "exception"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(message: str, *args: object, **more: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "faiss", "levelname": "WARNING", "msg": message, "args": args, **more}
    )


def test_a_record_is_one_object_on_one_line():
    text = JsonLines("nq", "driver", 7).format(
        record("100 %% of %s\nand \u2028 more \udc80", "it", created=1_700_000_000.25)
    )
    assert text.isascii()
    assert "\n" not in text
    found = json.loads(text)
    assert list(found) == FIELDS
    assert found == {
        "time": "2023-11-14T22:13:20.250+00:00",
        "level": "WARNING",
        "logger": "faiss",
        "run": "nq",
        "step": 7,
        "actor": "driver",
        "message": "100 % of it\nand \u2028 more \udc80",
        "exception": None,
    }


def test_a_traceback_and_a_stack_are_kept_apart_from_the_message():
    try:
        raise ValueError("too short")
    except ValueError as error:
        caught = (type(error), error, error.__traceback__)
    text = JsonLines("nq", "driver").format(
        record("failed", exc_info=caught, stack_info="Stack (most recent call last):\n  here")
    )
    found = json.loads(text)
    assert found["message"] == "failed"
    assert found["step"] is None
    assert found["exception"].startswith("Traceback (most recent call last):\n")
    assert found["exception"].endswith(
        "ValueError: too short\nStack (most recent call last):\n  here"
    )


def test_a_worker_keeps_what_it_says_and_what_ended_it(tmp_path, capfd):
    run_dir = RunDirectory(tmp_path / "nq" / "rounds" / "2-selection")
    run_dir.path.mkdir(parents=True)
    for step in (39, 40):
        run_dir.append_metrics({"step": step})
    before = list(logging.getLogger().handlers)

    def work() -> None:
        with worker_log(run_dir, 3):
            logging.getLogger("ray.train").info("set up")
            note_step(41)
            warnings.warn("slow", UserWarning, stacklevel=1)
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        work()
    first, second, last = lines(run_dir.logs / "worker-3.log")
    for line in (first, second, last):
        assert list(line) == FIELDS
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
        assert (line["run"], line["actor"]) == ("nq/2-selection", "worker-3")
    assert (first["step"], first["level"], first["logger"]) == (40, "INFO", "ray.train")
    assert (second["step"], second["logger"]) == (41, "py.warnings")
    assert "UserWarning: slow" in second["message"]
    assert (last["level"], last["message"]) == ("ERROR", "ended by ConnectionError")
    assert last["exception"].endswith("ConnectionError: gone")
    assert capfd.readouterr().err == ""
    assert logging.getLogger().handlers == before


def test_a_restarted_worker_goes_on_in_its_file(tmp_path):
    run_dir = RunDirectory(tmp_path / "nq")
    for text in ("first", "second"):
        with worker_log(run_dir, 0):
            logging.getLogger("rlrag").info(text)
    assert [line["message"] for line in lines(run_dir.logs / "worker-0.log")] == ["first", "second"]
    assert {line["step"] for line in lines(run_dir.logs / "worker-0.log")} == {None}


def test_the_driver_names_the_last_step_that_was_recorded(tmp_path, capsys):
    run_dir = RunDirectory(tmp_path / "nq")
    log = logging.getLogger("rlrag.generation")

    def run() -> None:
        with library_chatter_in(run_dir.logs / "libraries.log"):
            log.info("opening")
            run_dir.append_metrics({"step": 0})
            with following(run_dir.metrics, []):
                log.info("training")
                run_dir.append_metrics({"step": 1})
            log.info("evaluating")
            with following(tmp_path / "next" / "metrics.jsonl", []):
                log.info("next turn")
            raise ValueError("too few")

    with pytest.raises(ValueError, match="too few"):
        run()
    found = lines(run_dir.logs / "libraries.log")
    assert [(line["message"], line["step"]) for line in found] == [
        ("opening", None),
        ("training", 0),
        ("evaluating", 1),
        ("next turn", None),
        ("ended by ValueError", None),
    ]
    assert {(line["run"], line["actor"]) for line in found} == {("nq", "driver")}
    assert capsys.readouterr().err == "", "the program says itself what ended it"


def test_outside_of_a_run_the_file_stands_for_it(tmp_path):
    with library_chatter_in(tmp_path / "rlrag-evaluate.log"):
        logging.getLogger("rlrag").info("said")
    (line,) = lines(tmp_path / "rlrag-evaluate.log")
    assert line["run"] == "rlrag-evaluate"


def test_a_log_in_the_shared_temporary_folder_is_private_and_follows_no_link(
    tmp_path, monkeypatch, capsys
):
    """Another user may have put a link at any name that could be foreseen."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "precious"
    target.write_text("precious")
    for name in ("rlrag-evaluate.log", "rlrag-evaluate"):
        (tmp_path / name).symlink_to(target)
    before = set(tmp_path.iterdir())

    def made() -> list[Path]:
        return sorted(set(tmp_path.iterdir()) - before)

    with private_library_chatter("rlrag-evaluate"), private_library_chatter("rlrag-evaluate"):
        first, second = made()
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in (first, second)} == {0o700}
    assert made() == []
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="too few"), private_library_chatter("rlrag-evaluate"):
        raise ValueError("too few")
    (kept,) = made()
    (line,) = lines(kept / "rlrag-evaluate.log")
    assert line["message"] == "ended by ValueError"
    assert f"is in {kept / 'rlrag-evaluate.log'}" in capsys.readouterr().err
    assert target.read_text() == "precious"

    def full(prefix: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with (
        pytest.raises(SetupError, match=r"No space left on device; free space.*TMPDIR"),
        private_library_chatter("rlrag-evaluate"),
    ):
        pass


def test_programs_give_no_fixed_name_in_the_shared_temporary_folder():
    root = Path(__file__).parents[1]
    files = [path for part in ("rlrag",) for path in (root / part).rglob("*.py")]
    assert [path for path in files if "gettempdir" in path.read_text()] == []
