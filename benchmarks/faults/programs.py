"""Starts training programs as subprocesses, and watches, stops and kills them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.05
_FAMILY_POLL_S = 1.0
_LEAVE_TIMEOUT_S = 60.0


def quiet_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a program that runs beside others on few cores."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**inherited, "OMP_NUM_THREADS": "1", **variables}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole records of `metrics.jsonl`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def copy_indexes(source: Path | None, target: Path) -> None:
    """Give a run's cache the models and indexes of another, and nothing that was generated."""
    if source is not None and source.is_dir() and not target.exists():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("generations.sqlite*"))


class Family:
    """A process and all that it ever started, also those whose parent has died since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[psutil.Process, str] = {}

    def look(self) -> None:
        """Take note of the processes that there are now."""
        try:
            found = self._root.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in found:
            title = _title(process)
            if title:
                self._seen[process] = title

    def named(self, title: str) -> list[psutil.Process]:
        """Members that run now and have this in their title."""
        self.look()
        return [p for p in self._seen if title in _title(p) and _runs(p)]

    def num_seen(self, title: str) -> int:
        """Members that ever had this in their title."""
        return sum(title in seen for seen in self._seen.values())

    def left(self, timeout_s: float) -> list[psutil.Process]:
        """Members that still run after this time."""
        deadline = time.monotonic() + timeout_s
        while any(map(_runs, self._seen)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return [p for p in self._seen if _runs(p)]

    def end(self) -> None:
        """Kill each member that is left."""
        self.look()
        for process in [self._root, *self._seen]:
            try:
                process.kill()  # psutil compares start times, so a reused pid is safe
            except psutil.NoSuchProcess:
                continue


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TrainingProgram:
    """One started training command; its output lies in `folder`, its run in `folder/run`."""

    def __init__(
        self, folder: Path, flags: Sequence[str], cache_dir: Path, variables: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir = folder / "run"
        self._out, self._err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", "jobs.train", "factbook", *flags]
        command += ["--run-dir", str(self.run_dir), "--cache-dir", str(cache_dir)]
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=quiet_environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.family = Family(self.pid)

    def stdout(self) -> str:
        """What the program has printed."""
        return self._out.read_text()

    def stderr(self) -> str:
        """What the program has said on stderr."""
        return self._err.read_text()

    def ended(self) -> bool:
        """Whether the program has ended."""
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """The exit code; an `AssertionError` with what was said when it does not come in time."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"no end in {timeout_s:g} s: {self.stderr()}"
            self.family.look()
            time.sleep(_FAMILY_POLL_S)
        return self._process.returncode

    def wait_for_step(self, step: int, timeout_s: float) -> int:
        """Return the last recorded step as soon as it is `step` or later."""
        deadline = time.monotonic() + timeout_s
        while True:
            metrics = read_metrics(self.run_dir)
            if metrics and metrics[-1]["step"] >= step:
                self.family.look()
                return int(metrics[-1]["step"])
            assert self._process.poll() is None, f"ended before step {step}: {self.stderr()}"
            assert time.monotonic() < deadline, f"no step {step} in {timeout_s:g} s"
            time.sleep(_POLL_S)

    def leftovers(self) -> list[str]:
        """Processes of the program that do not end by themselves after it."""
        return [_title(process) for process in self.family.left(_LEAVE_TIMEOUT_S)]

    def end(self) -> None:
        """Kill what still runs."""
        self.family.end()
        self._process.wait()
