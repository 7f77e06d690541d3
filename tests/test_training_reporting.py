"""What people and trackers are told of a run: each step once, in short lines, undisturbed."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from rlrag.errors import SetupError
from rlrag.runs.reporting import (
    LEGEND,
    ProgressLine,
    TensorBoardLog,
    consumers,
    following,
    library_chatter_in,
)

LARGE = {
    "step": 99_999.0,
    "reward": -1234.5678,
    "ess": 7.999,
    "zero_signal_share": 1.0,
    "rollouts_per_s": 12_345.6,
    "validation/em": 1.0,
    "validation/f1": 1.0,
}


class Terminal(io.StringIO):
    """A stream that people watch."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_short_line_a_step():
    log = io.StringIO()
    line = ProgressLine(100_000, log)
    for step in (99_998, 99_999, 100_000):
        line.update({**LARGE, "step": float(step)})
    line.close()
    legend, *lines = log.getvalue().splitlines()
    assert legend == LEGEND
    assert len(lines) == 3
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in log.getvalue()
    assert "\r" not in log.getvalue()
    assert lines[0] == (
        "step 99998/100000  EM 1.00  F1 1.00  reward -1234.57  ESS 8.00  same 1.00  12345.6/s"
    )
    assert "left" not in lines[0]
    assert all(re.search(r"  \d+:[0-5]\d left$", text) for text in lines[1:])
    assert lines[2].endswith("  0:00 left")


def test_a_terminal_has_one_line_that_is_drawn_again():
    terminal = Terminal()
    line = ProgressLine(10, terminal)
    for step in range(3):
        line.update({"step": float(step)})
    legend, below = terminal.getvalue().split("\n")
    assert legend == LEGEND
    drawn = below.split("\r\x1b[2K")
    assert [text[:9] for text in drawn] == ["", "step 0/10", "step 1/10", "step 2/10"]
    line.close()
    assert terminal.getvalue().endswith("left\n")


def test_the_last_validation_stays_in_view_in_the_figures_of_the_table():
    log = io.StringIO()
    line = ProgressLine(10, log)
    line.update({"step": 0.0, "reward/exact_match": 0.5, "zero_signal_share": 0.25})
    line.update({"step": 1.0, "validation/em": 0.185, "validation/f1": 0.25})
    line.update({"step": 2.0, "reward/exact_match": 0.5})
    _, *lines = log.getvalue().splitlines()
    shown = [re.findall(r"(EM|F1|same) (\S+)", text) for text in lines]
    validated = [("EM", ".185"), ("F1", ".250")]
    assert shown == [[("same", ".250")], validated, validated]


def test_the_legend_says_what_every_column_means():
    log = io.StringIO()
    ProgressLine(10, log).update(LARGE)
    legend, line = log.getvalue().splitlines()
    columns = re.findall(r"[A-Za-z]\w*|/s", line)
    assert columns == ["step", "EM", "F1", "reward", "ESS", "same", "/s"]
    for column in (*columns[1:], "left"):
        assert re.search(rf"(^| ){column}(: | and F1: )", legend), column


@pytest.mark.parametrize(
    ("pace_s", "left"), [(0.0, "0:00"), (59.7, "1:00"), (1.0, "0:01"), (4000.0, "66:40")]
)
def test_the_time_left_follows_the_pace_so_far(monkeypatch, pace_s, left):
    clock = iter([1000.0, 1000.0 + 3 * pace_s])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    line = ProgressLine(6, log)
    line.update({"step": 2.0})
    line.update({"step": 5.0})
    assert log.getvalue().splitlines()[2].endswith(f"  {left} left")


class Recorder:
    """Remembers the steps that it was given."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.given: list[Mapping[str, float]] = []
        self.closed = 0

    def update(self, metrics: Mapping[str, float]) -> None:
        self.steps.append(int(metrics["step"]))
        self.given.append(metrics)

    def close(self) -> None:
        self.closed += 1


class Closed(Recorder):
    """Made from a directory, as trackers are."""

    def __init__(self, directory: Path) -> None:
        super().__init__()


def append(path: Path, *steps: int) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps({"step": step}) + "\n" for step in steps)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends, "the lines were not fed within a minute"
        time.sleep(0.02)


def test_appended_lines_are_fed_once_and_in_order(tmp_path):
    path, one, two = tmp_path / "metrics.jsonl", Recorder(), Recorder()
    with following(path, [one, two]):
        append(path, 0, 1)
        wait_for(lambda: two.steps == [0, 1])
        append(path, 2)
        with path.open("a") as stream:
            stream.write('{"step"')
            stream.flush()
            wait_for(lambda: two.steps == [0, 1, 2])
            stream.write(": 3}\n")
        append(path, 4)
    assert one.steps == two.steps == [0, 1, 2, 3, 4]


def test_an_alarm_is_said_once_and_trackers_get_numbers_alone(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    recorder, tensorboard = Recorder(), TensorBoardLog(tmp_path)
    with following(path, [recorder, tensorboard]):
        append(path, 1)
        record = {"step": 2, "ess": 1.0, "alarms": {"collapse": "one selection has all"}}
        record["failures"] = ["too long"]
        path.open("a").write(json.dumps(record) + "\n")
        append(path, 3)
    tensorboard.close()
    assert recorder.steps == [1, 2, 3]
    assert recorder.given[1] == {"step": 2, "ess": 1.0, "alarms/collapse": 1.0}
    assert capsys.readouterr().err == "step 2: alarm collapse: one selection has all\n"


def test_what_is_appended_last_is_fed_before_the_block_ends(tmp_path):
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    with following(path, [recorder]):
        append(path, *range(50))
    assert recorder.steps == list(range(50))


def test_lines_of_an_earlier_run_are_not_fed_again(tmp_path):
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    append(path, 0, 1, 2, 3)
    with following(path, [recorder]):
        path.write_text("")
        append(path, 0, 1, 2, 3, 4)
    assert recorder.steps == [4]


def test_a_restart_that_truncates_the_file_and_repeats_steps_is_survived(tmp_path):
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    with following(path, [recorder]):
        append(path, 0, 1, 2, 3)
        wait_for(lambda: recorder.steps == [0, 1, 2, 3])
        path.write_text('{"step": 0}\n{"step": 1}\n')
        append(path, 2, 3, 4)
        wait_for(lambda: recorder.steps[-1] == 4)
        path.unlink()
        append(path, 5)
    assert recorder.steps == [0, 1, 2, 3, 4, 5]


class Failing(Recorder):
    """A tracker whose service goes away before its third record."""

    def update(self, metrics: Mapping[str, float]) -> None:
        if len(self.steps) == 2:
            raise ConnectionError("the service\ndoes not answer")
        super().update(metrics)

    def close(self) -> None:
        super().close()
        raise ConnectionError("still not")


@pytest.mark.parametrize("watched", [True, False])
def test_a_tracker_that_raises_is_dropped_with_one_line_and_the_others_go_on(
    tmp_path, monkeypatch, caplog, watched
):
    stderr = Terminal() if watched else io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    path, before, failing, after = tmp_path / "metrics.jsonl", Recorder(), Failing(), Recorder()
    with caplog.at_level(logging.INFO), following(path, [before, failing, after]):
        append(path, 0, 1, 2)
        wait_for(lambda: after.steps == [0, 1, 2])
        append(path, 3, 4)
    assert before.steps == after.steps == [0, 1, 2, 3, 4]
    assert failing.steps == [0, 1]
    assert stderr.getvalue() == ("\r\x1b[2K" if watched else "") + (
        "Failing is dropped from step 2 on: ConnectionError: the service does not answer; "
        "metrics.jsonl has every step\n"
    )
    assert "Traceback" in caplog.text  # for the file of the libraries


def test_a_closed_stderr_does_not_stop_the_trackers(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    path, recorder = tmp_path / "metrics.jsonl", Recorder()
    with following(path, [ProgressLine(3), recorder]):
        append(path, 0, 1, 2)
    assert recorder.steps == [0, 1, 2]


def test_a_tracker_that_cannot_be_closed_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "rlrag.runs.reporting._LOGS", {"wandb": lambda directory: Failing(), "mlflow": Closed}
    )
    with consumers(["wandb", "mlflow"], tmp_path, 10) as found:
        pass
    assert [consumer.closed for consumer in found[1:]] == [1, 1]
    assert capsys.readouterr().err.splitlines() == [
        "Failing could not be closed and may lack the last steps: ConnectionError: still not; "
        "metrics.jsonl has every step"
    ]


def test_a_tracker_that_hangs_is_named_in_bounded_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rlrag.runs.reporting._JOIN_TIMEOUT_S", 0.5)
    answered = threading.Event()

    class Hanging(Recorder):
        def update(self, metrics: Mapping[str, float]) -> None:
            answered.wait(60)

    with following(tmp_path / "metrics.jsonl", [Hanging()]):
        append(tmp_path / "metrics.jsonl", 0)
    answered.set()
    assert "a tracker did not take the last steps within 0.5 s" in capsys.readouterr().err


class Ended(Exception):
    """Ends a block as a failing run does."""


def test_a_failing_run_is_told_to_the_end(tmp_path):
    path, recorder = tmp_path / "metrics.jsonl", Recorder()

    def run() -> None:
        with following(path, [recorder]):
            append(path, 0)
            raise Ended

    with pytest.raises(Ended):
        run()
    assert recorder.steps == [0]


def test_tensorboard_gets_every_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with consumers(["tensorboard"], tmp_path, 10) as found:
        assert [type(consumer) for consumer in found] == [ProgressLine, TensorBoardLog]
        for step in range(3):
            found[1].update({"step": float(step), "reward": -step / 2})
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0])).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(0, 0.0), (1, -0.5), (2, -1.0)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_says_which_extra_to_install(tmp_path, name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    with (
        pytest.raises(SetupError, match=rf"loggers names {name}; install the extra '{name}'"),
        consumers([name], tmp_path, 10),
    ):
        raise AssertionError("the block must not start")


def test_libraries_speak_to_the_file_and_ours_warn_on_the_terminal_too(tmp_path, capfd):
    from transformers.utils import logging as transformers_logging

    path = tmp_path / "logs" / "libraries.log"
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    library = transformers_logging.get_logger("transformers.models")
    propagates = logging.getLogger("transformers").propagate  # transformers turns it on in CI
    capfd.readouterr()
    with library_chatter_in(path):
        logging.getLogger("sentence_transformers").info("loading a model")
        logging.getLogger("faiss").warning("no AVX512")
        library.warning("a word of transformers")
        warnings.warn(" ".join(["a", "word", "of", "Python"]), UserWarning, stacklevel=1)
        logging.getLogger("rlrag.data").info("read 10 lines")
        logging.getLogger("rlrag.data").warning("dropped 2 lines")
        bar = transformers_logging.tqdm(range(3), desc="a bar of transformers")
        list(bar)
    said = capfd.readouterr()
    assert said.err.splitlines() == ["dropped 2 lines"]
    assert said.out == ""
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    said_by = [(line["level"], line["logger"], line["message"]) for line in kept]
    assert "a word of Python" in said_by.pop(3)[2]
    assert said_by == [
        ("INFO", "sentence_transformers", "loading a model"),
        ("WARNING", "faiss", "no AVX512"),
        ("WARNING", "transformers.models", "a word of transformers"),
        ("INFO", "rlrag.data", "read 10 lines"),
        ("WARNING", "rlrag.data", "dropped 2 lines"),
    ]
    assert root.handlers == handlers
    assert root.level == level
    assert transformers_logging.is_progress_bar_enabled()
    assert logging.getLogger("transformers").handlers
    assert logging.getLogger("transformers").propagate is propagates
