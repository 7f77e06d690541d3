"""Runs the training script of another library in its own environment and records the outcome."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT
from benchmarks.peers.plan import write_json
from rlrag.errors import SetupError

_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Peer:
    """One peer: its script, which lies beside the `requirements.txt` of its environment.

    `ranks` says that what it picks is a ranking, best first, so that the other order is measured
    too: a generator may attend best to what stands last. `continues` says that the script goes on
    from the checkpoints that it left where it was stopped; others start again.
    """

    script: Path
    ranks: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Finished:
    """What a peer left in its output folder, and how long its script took.

    `result` has `picks`, `generator` or `encoder`, and `generator_tokens`, `training_examples`. Of
    a script that went on from a checkpoint it also has `seconds_before`, the time until that, which
    `seconds` contains.
    """

    output: Path
    result: dict[str, Any]
    seconds: float


def finished_peer(
    name: str, peer: Peer, work: Path, open_python: Callable[[Path], Path], timeout_s: float
) -> Finished:
    """The output of a peer: as it was found if it has finished before, else by running it.

    What it says goes to `output.log` in its folder, which lies in that of the plan.

    Args:
        name: Also that of its folder.
        peer: What is run.
        work: Folder of the plan.
        open_python: From its `requirements.txt` to the interpreter of its environment.
        timeout_s: Longest time for its script.

    Raises:
        SetupError: when its environment cannot be made, or it fails, leaves no result or takes too
            long; its message is one line for the table.
    """
    output = work / name
    if (output / "finished.json").is_file():
        return _read(output)
    python = open_python(peer.script.parent / "requirements.txt")
    if not peer.continues:
        shutil.rmtree(output, ignore_errors=True)
    output.mkdir(exist_ok=True)
    started = time.monotonic()
    with (output / "output.log").open("a") as log:
        code = _run([str(python), str(peer.script), str(work), str(output)], log, timeout_s)
    seconds = time.monotonic() - started
    if code is None:
        raise SetupError(f"not finished in {timeout_s / 60:.0f} minutes; raise --minutes")
    if code or not (output / "result.json").is_file():
        raise SetupError(f"exit code {code}: {_last_line(output / 'output.log')}")
    before = json.loads((output / "result.json").read_text()).get("seconds_before", 0.0)
    write_json(output / "finished.json", {"seconds": before + seconds})
    return _read(output)


def _read(output: Path) -> Finished:
    seconds = json.loads((output / "finished.json").read_text())["seconds"]
    return Finished(output, json.loads((output / "result.json").read_text()), seconds)


def _run(command: list[str], log: Any, timeout_s: float) -> int | None:
    """The exit code, None when the time was up; what the script started ends with it."""
    # No hub: models come as files, and a peer that asks for another one must say so at once.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_TIMEOUT_S)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")
