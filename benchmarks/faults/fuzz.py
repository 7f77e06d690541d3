"""Fuzzes all file readers: each mutated file must give a value or a documented error.

Run `python -m benchmarks.faults.fuzz`. Atheris changes valid files, led by which lines of this
project the changed ones reach: bytes, pieces, and words that readers trip over (NaN, huge numbers,
deep nesting, paths that lead outside). Of JSON files it also gets some in which one value is put in
another's place. Hashes are made to fit where there are any, so that the reader behind them is
reached. An input is a finding when its reader

    raises anything but an `RlragError`,
    takes longer than a bound, or
    opens, renames or deletes a file outside the folder that it was given.

Inputs of findings are kept in `--keep`. Each reader is fuzzed in a process of its own. Equal seeds
begin alike; what is covered may depend on the machine.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.faults.fuzz_targets import Target, targets
from rlrag.errors import RlragError

RESULTS_FILE = Path(__file__).parents[1] / "results" / "fuzz.md"
_TIMEOUT_S = 10.0
_MAX_BYTES = 2**15
_SHARE_OF_VALUES = 0.5
_WORDS = (
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0.5", b"9" * 400, b'""', b"{}"),
    *(b"[]", b'"', b"\\", b"\\ud800", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n"),
    *(b"[" * 3000, b'{"a":' * 3000, b"../../outside", b"/etc/passwd", b"\xf0\x9f\x92\xa1", b"\t"),
    *(b'"id": 7', b"__class__", b"%s%n", b" " * 300, b"\x1f\x8b", b"99999999999999999999"),
)


class TimedOut(BaseException):
    """Not an `Exception`: no reader can take it for something that it expects."""


@dataclass
class Found:
    """What came of the inputs of one target; findings are pairs of problem and content."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, str, bytes]] = field(default_factory=list)
    seconds: float = 0.0


def other_value(content: bytes, rng: random.Random) -> bytes | None:
    """A JSON file with a strange value, or one from elsewhere in it, in place of another.

    None where it is no JSON file, or holds nothing that could be replaced.
    """
    try:
        root = json.loads(content)
    except (RecursionError, ValueError):
        return None
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            waiting += [value[key] for key in keys]
    if not places:
        return None
    holder, key = rng.choice(places)
    other_holder, other_key = rng.choice(places)
    strange = (
        *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "../../outside", []),
        *({}, [[]], "\ud800", "a" * 5000, {"": ""}, other_holder[other_key]),
    )
    if isinstance(holder, dict) and rng.random() < 0.2:
        holder[rng.choice(("", "extra", "../x", "__proto__"))] = rng.choice(strange)
    elif isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(strange)
    try:
        return json.dumps(root).encode()
    except (RecursionError, ValueError):  # a value was put inside itself
        return None


class OpenedElsewhere:
    """Notes what this process opens, renames or deletes outside of some folders."""

    _EVENTS = ("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link")

    def __init__(self, allowed: Sequence[Path]) -> None:
        roots = [sys.prefix, sys.base_prefix, "/usr", "/proc", "/dev", "/etc/localtime", "/sys"]
        roots += [os.getcwd(), *map(str, allowed)]
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._watching = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)  # cannot be taken away again

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what happens in the block."""
        self.seen.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching or event not in self._EVENTS:
            return
        for name in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
            if isinstance(name, str | bytes | os.PathLike):
                path = os.path.realpath(os.fsdecode(name))
                if not path.startswith(self._roots):
                    self.seen.append(f"{event} {path}")


class Reading:
    """Reads one changed file after another and remembers what came of it.

    An input is a byte that says which file of the target is changed, and the file's new content.
    """

    def __init__(self, target: Target, folder: Path, elsewhere: OpenedElsewhere) -> None:
        self.found = Found()
        self._target, self._folder, self._elsewhere = target, folder, elsewhere
        self._names = list(target.seeds)
        for name, content in target.seeds.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        target.seal(folder)
        target.read(folder)  # the seeds themselves must be accepted

    @property
    def seeds(self) -> list[bytes]:
        """The inputs that change nothing."""
        contents = self._target.seeds.values()
        return [bytes([number]) + content for number, content in enumerate(contents)]

    def name_of(self, data: bytes) -> str:
        """The file that an input changes."""
        return self._names[(data[0] if data else 0) % len(self._names)]

    def read(self, data: bytes) -> None:
        """Read the target with one file changed, and put that file back."""
        name, content = self.name_of(data), data[1:]
        path = self._folder / name
        path.write_bytes(content)
        self._target.seal(self._folder)
        problem = _problem(self._target, self._folder, self.found, self._elsewhere)
        if problem is not None:
            self.found.findings.append((problem, name, content))
        path.write_bytes(self._target.seeds[name])

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Another input: a JSON value replaced, or as atheris changes bytes."""
        import atheris

        rng = random.Random(seed)
        if data and self.name_of(data).endswith(".json") and rng.random() < _SHARE_OF_VALUES:
            changed = other_value(data[1:], rng)
            if changed is not None:
                return (data[:1] + changed)[:max_size]
        mutated: bytes = atheris.Mutate(data, max_size)
        return mutated


def fuzz(
    target: Target, num_inputs: int, seed: int, scratch: Path, elsewhere: OpenedElsewhere
) -> Found:
    """Read `num_inputs` changed versions of a target's files, in a process of its own.

    Raises:
        RuntimeError: when that process ends before.
    """
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _fuzz_here(target, num_inputs, seed, scratch, elsewhere)
    _, status = os.waitpid(pid, 0)
    if not result.is_file():
        raise RuntimeError(f"{target.name}: the process ended with status {status}")
    found = json.loads(result.read_text())
    return Found(
        found["accepted"],
        Counter(found["refused"]),
        [(problem, name, bytes.fromhex(content)) for problem, name, content in found["findings"]],
        found["seconds"],
    )


def _fuzz_here(
    target: Target, num_inputs: int, seed: int, scratch: Path, elsewhere: OpenedElsewhere
) -> NoReturn:
    """Never returns: the last input ends the process, which libFuzzer does not leave otherwise."""
    import atheris

    reading = Reading(target, Path(tempfile.mkdtemp(dir=scratch)), elsewhere)
    corpus = Path(tempfile.mkdtemp(dir=scratch))
    for number, content in enumerate(reading.seeds):
        (corpus / f"seed-{number}").write_bytes(content)
    words = scratch / "words"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in _WORDS)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    started, seen = time.monotonic(), itertools.count(1)

    def read(data: bytes) -> None:
        reading.read(data)
        if next(seen) == num_inputs:
            found = reading.found
            result = {
                "accepted": found.accepted,
                "refused": found.refused,
                "findings": [(p, n, content.hex()) for p, n, content in found.findings],
                "seconds": time.monotonic() - started,
            }
            (scratch / "result.json").write_text(json.dumps(result))
            os._exit(0)

    flags = [f"-seed={seed + 1}", f"-max_len={_MAX_BYTES}", f"-dict={words}", "-verbosity=0"]
    # Bounds are this module's own; libFuzzer would end at its first finding.
    flags += ["-rss_limit_mb=0", "-timeout=0", f"-artifact_prefix={scratch}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], read, custom_mutator=reading.mutate)
    atheris.Fuzz()
    os._exit(1)


def _problem(target: Target, folder: Path, found: Found, elsewhere: OpenedElsewhere) -> str | None:
    try:
        with _within(_TIMEOUT_S), elsewhere.watching():
            target.read(folder)
    except RlragError as error:
        found.refused[type(error).__name__] += 1
    except TimedOut:
        return f"took longer than {_TIMEOUT_S:g} s"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {str(error)[:200]}"
    else:
        found.accepted += 1
    return elsewhere.seen[0] if elsewhere.seen else None


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise TimedOut

    old = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def _instrumented() -> Iterator[None]:
    """Have atheris see which lines of modules that are imported in the block are reached."""
    import atheris

    noise = io.StringIO()
    with redirect_stderr(noise), atheris.instrument_imports(include=["rlrag"]):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz every target and write the table; the exit code is 1 when something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="number of mutated files for each target"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", help="targets to fuzz; default: all")
    parser.add_argument("--keep", type=Path, help="save inputs that cause a failure in this folder")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    lines, num_findings = [], 0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "made").mkdir()
        os.environ["HOME"] = str(scratch / "made")  # the default cache is in it
        elsewhere = OpenedElsewhere([scratch])
        with _instrumented():
            made = targets(scratch / "made")
        unknown = set(options.targets or ()) - {target.name for target in made}
        if unknown:
            names = ", ".join(target.name for target in made)
            parser.error(f"--targets has {min(unknown)!r}, which is unknown; choose from: {names}")
        for target in made:
            if options.targets and target.name not in options.targets:
                continue
            found = fuzz(target, options.inputs, options.seed, scratch, elsewhere)
            num_findings += len(found.findings)
            for number, (problem, file, content) in enumerate(found.findings):
                print(f"{target.name}, {file}: {problem}", file=sys.stderr)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    place = f"{target.name.replace(' ', '-')}-{number}-{Path(file).name}"
                    (options.keep / place).write_bytes(content)
            lines.append(
                f"| {target.name} | {options.inputs:,} | {found.accepted:,} | "
                f"{found.refused.total():,} | {len(found.findings)} | "
                f"{options.inputs / found.seconds:,.0f} |"
            )
            print(lines[-1], flush=True)
    if not options.targets:
        table = "\n".join(
            [
                "# Mutated files",
                "",
                f"`python -m benchmarks.faults.fuzz --inputs {options.inputs} --seed "
                f"{options.seed}` with "
                "atheris; what counts as a finding is in the module.",
                "",
                "| read | inputs | accepted | refused | findings | inputs/s |",
                "|---|---|---|---|---|---|",
                *lines,
                "",
            ]
        )
        options.output.write_text(table, encoding="utf-8")
    return 1 if num_findings else 0


if __name__ == "__main__":
    sys.exit(main())
