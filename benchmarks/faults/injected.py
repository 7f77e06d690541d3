"""Injects faults into running programs; measures what is lost and the time to recover.

Run `python -m benchmarks.faults.injected`. Every fault meets a small run on a Ray cluster of its
own: in the training of a selector, in the offline stage of a retriever, or in its online stage,
where its index is refreshed beside training. A run that goes on by itself is let go on; one that
ends is started again by its command. Nothing is lost when the last checkpoint equals that of an
undisturbed run to the last bit, and no more requests lie in the cache.

    generator killed     SIGKILL to a generator actor
    generator hangs      SIGSTOP to it for good; the pool ends it after generator.request_timeout_s
    generator slow       it is stopped nine tenths of the time, for a minute
    poisoned question    an engine dies whenever it meets a certain prompt
    learner killed       SIGKILL to a Ray Train worker
    encoder killed       SIGKILL to the Ray task that encodes the passages anew
    object store full    another program fills Ray's object store for twenty seconds
    node lost            SIGKILL to the raylet of the only node
    head lost            SIGKILL to the cluster's head process (gcs_server)
    program killed       SIGKILL to the training program and all that it started
    preempted            SIGTERM to the training program
    checkpoint damaged   the program is killed and a byte of the newest checkpoint flipped
    disk full            the disk of run and cache, a small one of their own, is filled; it has room
                         again before the program is started again (needs root)

`benchmarks.faults.nodes` has what takes several machines: a node that dies, and one that is cut
off.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

import psutil

from benchmarks.faults.poison import asked_question, poison
from benchmarks.faults.programs import (
    TrainingProgram,
    copy_indexes,
    quiet_environment,
    read_metrics,
)
from rlrag.training.openrag.index_refresh import encode_from

RESULTS_FILE = Path(__file__).parents[1] / "results" / "faults.md"
_TIMEOUT_S = 900.0
_POLL_S = 0.05
_FAULT_STEP = 4
_SLOW_S = 60.0
ENGINE, LEARNER, ENCODER = "EngineActor", "RayTrainWorker", encode_from.__name__
_COMMON = (
    *("--training.loggers", "--training.launcher", "ray"),
    *("--generator.backend", "transformers", "--generator.dtype", "float32"),
    *("--generator.num-actors", "2", "--generator.request-timeout-s", "30"),
    *("--data.max-train-questions", "24", "--data.max-eval-questions", "4"),
    *("--training.batch-size", "2", "--training.num-epochs", "1"),
    *("--training.validate-every", "5", "--training.checkpoint-every", "2"),
    *("--data.num-validation-questions", "4"),
    *("--evaluation.systems", "retriever_order"),
    # A question is half of so small a batch.
    *("--training.max-failed-share", "0.9"),
)
_RETRIEVER = (
    *("--algorithm.name", "openrag", "--retrieval.kind", "semi_parametric"),
    *("--retrieval.encoder", "None", "--environment.num-selected", "1"),
)
STAGES: dict[str, tuple[str, ...]] = {
    "training": ("--training.log-experience", "True", "--algorithm.num-samples", "2"),
    "offline stage": (
        *_RETRIEVER,
        *("--algorithm.offline-epochs", "1", "--algorithm.online-epochs", "0"),
        *("--algorithm.num-offline", "4", "--algorithm.num-online", "4"),
    ),
    "online stage": (
        *_RETRIEVER,
        # Five of the questions are of use, so that a pass has two steps.
        *("--algorithm.offline-epochs", "0", "--algorithm.online-epochs", "4"),
        *("--algorithm.refresh-every", "5", "--algorithm.refresh-waits", "True"),
        *("--algorithm.num-offline", "4", "--algorithm.num-online", "4"),
    ),
}
"""Flags of the runs that are disturbed."""

_FILL = """
import sys, time
import numpy as np, ray

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
capacity = ray.cluster_resources()["object_store_memory"]
held = [ray.put(np.zeros(2**25, np.uint8)) for _ in range(int(1.5 * capacity / 2**25))]
print("full", flush=True)
time.sleep(20)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a disturbed run; seconds from the fault to the next finished piece of work."""

    ended_with: int | None
    recovery_s: float
    is_equal: bool
    num_twice: int
    left_out: str


class Case:
    """One run and what is done to it."""

    def __init__(self, folder: Path, stage: str, variables: dict[str, str]) -> None:
        self._folder, self._stage, self._variables = folder, stage, variables
        self.program = self.start()

    def start(self) -> TrainingProgram:
        """Start the command, or start it again."""
        flags = [*_COMMON, *STAGES[self._stage]]
        return TrainingProgram(self._folder, flags, self._folder / "cache", self._variables)

    def wait_for_work(self, more_than: int = -1) -> int:
        """Wait until so much is done that a fault meets work under way; returns how much."""
        deadline = time.monotonic() + _TIMEOUT_S
        wanted = max(_FAULT_STEP, more_than + 1)
        while self.done() < wanted:
            assert time.monotonic() < deadline, f"nothing done: {self.program.stderr()}"
            time.sleep(_POLL_S)
            self.program.family.look()
            assert not self.program.ended(), f"ended too early: {self.program.stderr()}"
        return self.done()

    def done(self) -> int:
        """Recorded steps, or computed requests of the offline stage."""
        if self._stage != "offline stage":
            metrics = read_metrics(self.program.run_dir)
            return int(metrics[-1]["step"]) if metrics else -1
        return self.num_computed()

    def weights(self) -> list[bytes]:
        """The tensors of the last checkpoint, file by file."""
        last = sorted((self.program.run_dir / "checkpoints").glob("step-*"))[-1]
        return [path.read_bytes() for path in sorted(last.glob("*.safetensors"))]

    def num_computed(self) -> int:
        """Requests that the program's generator has computed and stored so far."""
        path = self._folder / "cache" / "generations.sqlite"
        if not path.exists():
            return -1
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as connection:
            try:
                (number,) = connection.execute("SELECT COUNT(*) FROM results").fetchone()
            except sqlite3.OperationalError:  # before the table is there
                return -1
        return int(number)


def kill_one(title: str, number: int = signal.SIGKILL) -> Callable[[Case], None]:
    """Send a signal to one process of the run."""

    def act(case: Case) -> None:
        _wait_for(case, title).send_signal(number)

    return act


def slow_down(case: Case) -> None:
    """Let a generator actor work a tenth of the time."""
    engine = _wait_for(case, ENGINE)

    def act() -> None:
        deadline = time.monotonic() + _SLOW_S
        with suppress(psutil.NoSuchProcess):
            while time.monotonic() < deadline:
                engine.suspend()
                time.sleep(0.9)
                engine.resume()
                time.sleep(0.1)

    Thread(target=act, daemon=True).start()


def fill_object_store(case: Case) -> None:
    """Put more into the object store than it holds, from another program."""
    raylet = _wait_for(case, "raylet/raylet")
    (address,) = (w.partition("=")[2] for w in raylet.cmdline() if w.startswith("--gcs-address="))
    token = {k: v for k, v in raylet.environ().items() if k.startswith("RAY_AUTH_")}
    filler = subprocess.Popen(
        [sys.executable, "-c", _FILL, address],
        env=quiet_environment(**token),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert filler.stdout is not None
    assert filler.stdout.readline() == "full\n", "the object store could not be filled"


def _wait_for(case: Case, title: str) -> psutil.Process:
    """A process of the run with this in its title."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not (found := case.program.family.named(title)):
        assert time.monotonic() < deadline, f"no process {title}: {case.program.stderr()}"
        time.sleep(_POLL_S)
    return found[0]


def kill_program(case: Case) -> None:
    """As the kernel does when memory is short."""
    os.killpg(case.program.pid, signal.SIGKILL)


def preempt(case: Case) -> None:
    """As whoever takes a machine away does."""
    os.kill(case.program.pid, signal.SIGTERM)


def damage(case: Case) -> None:
    """Kill the program and flip a byte in the newest checkpoint."""
    kill_program(case)
    case.program.wait(_TIMEOUT_S)
    newest = sorted((case.program.run_dir / "checkpoints").glob("step-*"))[-1]
    path = sorted(newest.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fill_disk(case: Case) -> None:
    """Leave no byte on the disk of the run."""
    with _ballast(case).open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(2**16))


def free_disk(case: Case) -> None:
    """Make room again."""
    _ballast(case).unlink()


def _ballast(case: Case) -> Path:
    return case.program.run_dir.parent / "ballast"


@dataclass(frozen=True)
class Fault:
    """What is done, in which stages, and what is mended before the program is started again.

    Where `act` is None, the fault is in the run from its start.
    """

    act: Callable[[Case], None] | None
    stages: tuple[str, ...] = ("training", "offline stage")
    mend: Callable[[Case], None] | None = None
    disk_mib: int | None = None


FAULTS = {
    "generator killed": Fault(kill_one(ENGINE)),
    "generator hangs": Fault(kill_one(ENGINE, signal.SIGSTOP)),
    "generator slow": Fault(slow_down),
    "poisoned question": Fault(None),
    "learner killed": Fault(kill_one(LEARNER), ("training",)),
    "encoder killed": Fault(kill_one(ENCODER), ("online stage",)),
    "object store full": Fault(fill_object_store),
    "node lost": Fault(kill_one("raylet/raylet")),
    "head lost": Fault(kill_one("gcs_server")),
    "program killed": Fault(kill_program),
    "preempted": Fault(preempt),
    "checkpoint damaged": Fault(damage, ("training",)),
    "disk full": Fault(fill_disk, mend=free_disk, disk_mib=1024),
}


@contextmanager
def own_disk(folder: Path, size_mib: int | None) -> Iterator[None]:
    """A disk of this size at the folder, in memory; the folder as it is where there is no size."""
    if size_mib is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = ("-o", f"size={size_mib}m")
    subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(folder)], check=True, timeout=60)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=60)


def undisturbed(folder: Path, stage: str, indexes: Path | None) -> tuple[list[bytes], int]:
    """Weights of the last checkpoint, and how many requests were computed."""
    copy_indexes(indexes, folder / "cache")
    case = Case(folder, stage, {})
    try:
        code = case.program.wait(_TIMEOUT_S)
        assert code == 0, case.program.stderr()
        return case.weights(), case.num_computed()
    finally:
        case.program.end()


def disturb(
    folder: Path, stage: str, fault: str, first: Path, reference: tuple[list[bytes], int]
) -> Outcome:
    """Run, disturb, and start again where the program ended; `first` is an undisturbed run."""
    act, mend = FAULTS[fault].act, FAULTS[fault].mend
    variables = {} if act else poison(folder, asked_question(first / "run"))
    case = Case(folder, stage, variables)
    code = None
    try:
        before = case.wait_for_work() if act else -1
        started = time.monotonic()
        if act:
            act(case)
        recovery_s = _went_on(case, before, started)
        # Ray ends a program whose node is gone, but not at once.
        ended = case.program.wait(_TIMEOUT_S)
        if recovery_s is None or ended:
            code = ended
            case.program.family.end()
            if mend:
                mend(case)
            before, started = case.done(), time.monotonic()
            case.program = case.start()
            recovery_s = _went_on(case, before, started) or 0.0
        final = case.program.wait(_TIMEOUT_S)
        assert final == 0, f"{fault} in {stage} ended with {final}: {case.program.stderr()}"
        weights, num_computed = reference
        failures = {
            text
            for record in read_metrics(case.program.run_dir)
            for text in record.get("failures", ())
        }
        return Outcome(
            code,
            recovery_s,
            case.weights() == weights,
            max(0, case.num_computed() - num_computed),
            "; ".join(dict.fromkeys(re.findall(r"question '[^']+'", " ".join(sorted(failures))))),
        )
    finally:
        case.program.end()


def _went_on(case: Case, before: int, started: float) -> float | None:
    """Seconds to the next finished step or question; None when the program ended instead."""
    deadline = time.monotonic() + _TIMEOUT_S
    while case.done() <= before:
        assert time.monotonic() < deadline, f"no recovery: {case.program.stderr()}"
        if case.program.ended():
            return None if case.program.wait(1.0) else time.monotonic() - started
        time.sleep(_POLL_S)
    return time.monotonic() - started


def report(rows: Sequence[tuple[str, str, Outcome]]) -> str:
    """The outcomes as Markdown."""
    lines = [
        "# Faults: what they cost a run",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; made "
        "by `python -m benchmarks.faults.injected`, whose module says what is done. `program` "
        "says whether "
        "it went on, or ended with a code and was started again. Recovery is the time from "
        "the fault, or from that start, to the next finished step or stored judgement; loading "
        "models and starting Ray are part of it. Where a question is left out, the weights are "
        "others than without the fault.",
        "",
        "| stage | fault | program | recovery, s | last checkpoint | computed twice | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    stages, faults = list(STAGES), list(FAULTS)
    for stage, fault, outcome in sorted(
        rows, key=lambda row: (stages.index(row[0]), faults.index(row[1]))
    ):
        program = "went on" if outcome.ended_with is None else f"ended with {outcome.ended_with}"
        equal = "equal to the last bit" if outcome.is_equal else "differs"
        lines.append(
            f"| {stage} | {fault} | {program} | {outcome.recovery_s:.0f} | {equal} | "
            f"{outcome.num_twice} | {outcome.left_out or '-'} |"
        )
    return "\n".join(lines) + "\n"


def _finished(path: Path | None) -> list[tuple[str, str, Outcome]]:
    """The outcomes that an earlier call has kept."""
    if path is None or not path.exists():
        return []
    lines = map(json.loads, path.read_text().splitlines())
    return [(stage, fault, Outcome(**outcome)) for stage, fault, outcome in lines]


def main() -> None:
    """Inject the faults and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--faults", nargs="+", choices=tuple(FAULTS), default=list(FAULTS))
    parser.add_argument(
        "--cache-dir", type=Path, help="existing cache of models and indexes to use"
    )
    parser.add_argument(
        "--finished",
        type=Path,
        help="JSON lines file of earlier outcomes; these faults are skipped",
    )
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    arguments = parser.parse_args()
    rows = _finished(arguments.finished)
    with tempfile.TemporaryDirectory() as directory:
        for stage in arguments.stages:
            first = Path(directory) / stage / "undisturbed"
            reference = undisturbed(first, stage, arguments.cache_dir)
            for fault in arguments.faults:
                done = any((stage, fault) == row[:2] for row in rows)
                if stage not in FAULTS[fault].stages or done:
                    continue
                folder = Path(directory) / stage / fault
                with own_disk(folder, FAULTS[fault].disk_mib):
                    copy_indexes(first / "cache", folder / "cache")
                    outcome = disturb(folder, stage, fault, first, reference)
                rows.append((stage, fault, outcome))
                if arguments.finished:
                    with arguments.finished.open("a") as stream:
                        stream.write(json.dumps([stage, fault, asdict(outcome)]) + "\n")
                print(stage, fault, outcome, flush=True)
    text = report(rows)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
