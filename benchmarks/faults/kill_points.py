"""Kills a short run at 200 random moments and checks that it resumes to equal weights.

Run `python -m benchmarks.faults.kill_points`. The run is that of `benchmarks.faults.endurance` with
a checkpoint every other step: the real loop, trainer, cache and checkpoints in one process, a
stand-in for the generator. SIGKILL comes at a moment drawn evenly from the time that an undisturbed
run takes, and to every other run a second time after it was started again. Each run must end with
the tensors of the undisturbed one to the last bit, with each step recorded once and equally, and
with nothing half-written beside its products.

Processes are forked from one that has loaded everything, as loading takes longer than the run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.endurance import endurance_config, train
from benchmarks.faults.programs import read_metrics
from rlrag.config import RunConfig

RESULTS_FILE = Path(__file__).parents[1] / "results" / "kill_points.md"
_TIMEOUT_S = 300.0
_NUM_STEPS = 60
_NOT_COMPARED = ("generator_tokens_spent", "generator_tokens_saved")
"""What a run that is started again finds in its cache, it does not pay for twice."""


@dataclass(frozen=True)
class Killed:
    """What one disturbed run was like; `step` is the last one that was recorded at each kill."""

    steps: tuple[int, ...]
    was_writing: tuple[bool, ...]
    num_attempts: int
    difference: str


def _config(folder: Path, overlap: bool) -> RunConfig:
    config = endurance_config(folder, _NUM_STEPS)
    changed = {"checkpoint_every": 2, "validate_every": 6}
    return config.model_copy(
        update={
            "algorithm": config.dro.model_copy(update={"overlap": overlap}),
            "training": config.training.model_copy(update=changed),
        }
    )


def start(folder: Path, overlap: bool) -> Any:
    """Begin the run, or go on with it, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(folder, _config(folder, overlap), _NUM_STEPS)
    )
    process.start()
    return process


def tensors(folder: Path) -> dict[str, bytes]:
    """The files of the last checkpoint that hold tensors."""
    last = max((folder / "run" / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))}


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all steps, without clocks."""
    return [
        {k: v for k, v in record.items() if not k.endswith("_s") and k not in _NOT_COMPARED}
        for record in read_metrics(folder / "run")
    ]


def difference(folder: Path, whole: Path) -> str:
    """What a run that ended has other than an undisturbed one; empty when nothing."""
    if tensors(folder) != tensors(whole):
        return "tensors"
    ours, theirs = records(folder), records(whole)
    if ours != theirs:
        steps = [one["step"] for one, other in zip(ours, theirs, strict=False) if one != other]
        return f"{len(ours)} records for {len(theirs)}, first other one {steps[:1]}"
    half = [path.name for path in (folder / "run").rglob(".*")]
    return f"left {half}" if half else ""


def kill(folder: Path, overlap: bool, moments_s: Sequence[float], whole: Path) -> Killed:
    """Run to the end, with a kill so many seconds into each of the first attempts."""
    steps, was_writing = [], []
    num_attempts = 0
    for moment_s in moments_s:
        process = start(folder, overlap)
        num_attempts += 1
        time.sleep(moment_s)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(_TIMEOUT_S)
        if process.exitcode == 0:
            break
        recorded = read_metrics(folder / "run")
        steps.append(int(recorded[-1]["step"]) if recorded else -1)
        was_writing.append(any((folder / "run" / "checkpoints").glob(".step-*")))
    else:
        process = start(folder, overlap)
        num_attempts += 1
        process.join(_TIMEOUT_S)
        if process.exitcode != 0:
            process.kill()
            return Killed(tuple(steps), tuple(was_writing), num_attempts, "did not end")
    return Killed(tuple(steps), tuple(was_writing), num_attempts, difference(folder, whole))


def report(found: Sequence[Killed], run_s: float) -> str:
    """The counts as Markdown."""
    steps = [step for one in found for step in one.steps]
    places = Counter(
        "before the first record"
        if step < 0
        else f"steps {step // 10 * 10} to {step // 10 * 10 + 9}"
        for step in steps
    )
    other = [one.difference for one in found if one.difference]
    lines = [
        f"# Kill points: {len(found)} runs that were killed at random moments",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.faults.kill_points`, whose module says what is done. An "
        "undisturbed run of "
        f"{_NUM_STEPS} steps took {run_s:.1f} s; half of the runs had a batch that runs ahead.",
        "",
        f"- kills: {len(steps)}, of which {sum(map(sum, (one.was_writing for one in found)))} left "
        "a checkpoint half-written;",
        f"- runs that ended before their kill: {sum(not one.steps for one in found)};",
        f"- runs that ended other than the undisturbed one: {len(other)}"
        + (f" ({'; '.join(sorted(set(other)))})" if other else "")
        + ".",
        "",
        "| last recorded step at the kill | kills |",
        "|---|---|",
        *(f"| {place} | {number} |" for place, number in sorted(places.items())),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare and write the table; exit code 1 when a run ended otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # before the first fork: OpenMP's threads do not survive one
    rng = random.Random(options.seed)
    found = []
    with tempfile.TemporaryDirectory() as directory:
        wholes, run_s = {}, {}
        train(Path(directory) / "warm", _config(Path(directory) / "warm", False), _NUM_STEPS)
        for overlap in (False, True):
            wholes[overlap] = Path(directory) / f"whole-{overlap}"
            began = time.monotonic()
            process = start(wholes[overlap], overlap)
            process.join(_TIMEOUT_S)
            run_s[overlap] = time.monotonic() - began
            if process.exitcode != 0:
                sys.exit(f"error: the undisturbed run ended with {process.exitcode}")
        for number in range(options.runs):
            overlap = number % 2 == 1
            moments_s = [rng.uniform(0, run_s[overlap]) for _ in range(1 + number // 2 % 2)]
            folder = Path(directory) / f"run-{number}"
            found.append(kill(folder, overlap, moments_s, wholes[overlap]))
    text = report(found, run_s[False])
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 1 if any(one.difference for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
