"""A program that stands still says so, with what is under way and where its threads are."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass

import pytest
from loop_runs import start, steps_of

from rlrag.generation.waits import awaiting, current_waits, note_answer, num_answers
from rlrag.runs.directory import RunDirectory
from rlrag.runs.log_files import worker_log
from rlrag.runs.watchdog import Watchdog, under_way

SHORT_S = 0.02
LONG_S = 60.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class Heard(logging.Handler):
    """Sets an event at the first record of a level, and keeps the messages."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.messages: list[str] = []
        self.has_stacks = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if "stacks" in record.msg and record.levelno == logging.INFO:
            self.has_stacks.set()


@pytest.fixture
def heard():
    log, handler = logging.getLogger("rlrag.runs.watchdog"), Heard()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield handler
    log.removeHandler(handler)
    log.setLevel(level)


def reports(heard: Heard) -> list[str]:
    return [message for message in heard.messages if message.startswith("no progress for")]


def stand_still_in_here(until: threading.Event) -> None:
    assert until.wait(LONG_S)


def test_a_stall_is_reported_with_its_phase_and_the_stuck_function(heard):
    with Watchdog("the beginning", period_s=SHORT_S) as watchdog:
        watchdog.progress("step 7")
        stand_still_in_here(heard.has_stacks)
    text = next(message for message in heard.messages if "stacks of all threads:\n" in message)
    assert "thread MainThread:" in text
    assert "in stand_still_in_here" in text
    assert "thread watchdog" not in text
    assert "during step 7; the run was not stopped" in reports(heard)[0]


def test_each_stall_is_reported_once_a_period_and_progress_begins_anew(heard):
    clock = Clock()
    watchdog = Watchdog("the beginning", clock=clock, period_s=100)
    found = []
    for now in (0, 50, 99, 100, 120, 199, 200, 210, 450, 460):
        clock.now = now
        found.append((now, watchdog.check()))
    assert [now for now, reported in found if reported] == [100, 200, 450]
    clock.now = 470
    watchdog.progress("step 1")
    for now, reported in ((480, False), (569, False), (570, True), (571, False)):
        clock.now = now
        assert watchdog.check() is reported
    assert [message.split(";")[0] for message in reports(heard)] == [
        "no progress for 100 s during the beginning",
        "no progress for 200 s during the beginning",
        "no progress for 450 s during the beginning",
        "no progress for 100 s during step 1",
    ]


def test_nothing_is_reported_while_progress_comes(heard):
    clock = Clock()
    watchdog = Watchdog("the beginning", clock=clock, period_s=100)
    for step in range(20):
        clock.now += 90
        watchdog.progress(f"step {step}")
        clock.now += 5
        assert not watchdog.check()
    assert heard.messages == []


def test_the_time_before_a_block_does_not_count():
    clock = Clock()
    watchdog = Watchdog("the beginning", clock=clock, period_s=LONG_S)
    clock.now = 50
    with watchdog:
        clock.now = LONG_S + 49
        assert not watchdog.check()
        clock.now = LONG_S + 50
        assert watchdog.check()


def test_an_answer_of_an_engine_is_progress():
    clock = Clock()
    watchdog = Watchdog("step 1", num_answers, clock, period_s=100)
    watchdog.check()
    clock.now = 90
    note_answer()
    assert not watchdog.check()
    clock.now = 189
    assert not watchdog.check()
    clock.now = 190
    assert watchdog.check()


def test_a_report_names_what_is_waited_for(heard):
    clock = Clock()
    watchdog = Watchdog("step 1", clock=clock, period_s=100)
    lines = [f"actor-{n} for 99 s: generate of 2 prompts" for n in range(7)]
    with awaiting(lambda: lines):
        clock.now = 100
        assert watchdog.check()
        assert current_waits() == lines
    assert current_waits() == []
    assert f"during step 1, waiting for {lines[0]}; " in reports(heard)[0]
    assert f"{lines[4]} and 2 more; the run was not stopped" in reports(heard)[0]


def test_it_stops_with_its_block_even_when_that_raises():
    names = [thread.name for thread in threading.enumerate()]

    def fail() -> None:
        with Watchdog("the beginning", period_s=LONG_S):
            assert "watchdog" in [thread.name for thread in threading.enumerate()]
            raise KeyError("gone")

    with pytest.raises(KeyError):
        fail()
    assert [thread.name for thread in threading.enumerate()] == names


def test_phases_go_to_the_innermost_watchdog_of_the_thread(heard):
    clock = Clock()
    under_way("nobody listens")
    watchdogs = [Watchdog(name, clock=clock, period_s=LONG_S) for name in ("outer", "inner")]
    with watchdogs[0] as outer, watchdogs[1]:
        under_way("step 1")
        clock.now = LONG_S
        assert outer.check()
    assert "during outer" in reports(heard)[0]
    with Watchdog("outer", clock=clock, period_s=LONG_S) as outer:
        with Watchdog("inner", clock=clock, period_s=LONG_S):
            pass
        under_way("step 2")
        clock.now += LONG_S
        assert outer.check()
    assert "during step 2" in reports(heard)[1]


def test_a_worker_keeps_the_report_in_its_log(tmp_path):
    run_dir, clock = RunDirectory(tmp_path / "nq"), Clock()
    with worker_log(run_dir, 2):
        watchdog = Watchdog("step 4", clock=clock, period_s=100)
        clock.now = 100
        watchdog.check()
    found = [json.loads(line) for line in (run_dir.logs / "worker-2.log").open()]
    assert [line["level"] for line in found] == ["WARNING", "INFO"]
    assert "during step 4" in found[0]["message"]
    assert found[1]["message"].startswith("no progress; stacks of all threads:\n")


def test_the_loop_says_what_is_under_way(small_config, training_data, tmp_path, monkeypatch):
    phases = []
    monkeypatch.setattr(Watchdog, "progress", lambda self, what: phases.append(what))
    config = small_config.model_copy(
        update={"training": small_config.training.model_copy(update={"num_epochs": 1})}
    )
    start(config, training_data, tmp_path / "run").run()
    assert steps_of(tmp_path / "run")[-1]["step"] == 3
    assert phases == [
        "the validation after step 0",
        "the checkpoint after step 0",
        *("step 1", "learning in step 1"),
        *("step 2", "learning in step 2", "the checkpoint after step 2"),
        *("step 3", "learning in step 3"),
        "the validation after step 3",
        "the checkpoint after step 3",
    ]
