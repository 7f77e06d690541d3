"""Mutated files into everything that reads one: does each end in a value or in a documented error?

Run `python -m benchmarks.fuzz`. Valid files are changed at random: bits, bytes, cuts, repeated or
swapped pieces, and words that readers trip over (NaN, huge numbers, deep nesting, paths that lead
outside). Hashes are made to fit where there are any, so that the reader behind them is reached. An
input is a finding when its reader

    raises anything but an `RlragError`,
    takes longer than a bound, or
    opens, renames or deletes a file outside the folder that it was given.

Inputs of findings are kept in `--keep`. Equal seeds give equal inputs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rlrag.errors import RlragError

RESULTS_FILE = Path(__file__).parent / "results" / "fuzz.md"
_TIMEOUT_S = 10.0
_WORDS = (
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0.5", b"9" * 400, b'""', b"{}"),
    *(b"[]", b'"', b"\\", b"\\ud800", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n"),
    *(b"[" * 3000, b'{"a":' * 3000, b"../../outside", b"/etc/passwd", b"\xf0\x9f\x92\xa1", b"\t"),
    *(b'"id": 7', b"__class__", b"%s%n", b" " * 300, b"\x1f\x8b", b"99999999999999999999"),
)


class TimedOut(BaseException):
    """Not an `Exception`: no reader can take it for something that it expects."""


@dataclass(frozen=True)
class Target:
    """A reader and valid content for it.

    Attributes:
        name: For the table.
        seeds: Contents that it accepts, by file name.
        read: Called with the folder that holds the files.
        seal: Called before, to make hashes fit the changed file.
    """

    name: str
    seeds: dict[str, bytes]
    read: Callable[[Path], object]
    seal: Callable[[Path], None] = lambda folder: None


@dataclass
class Found:
    """What came of the inputs of one target; findings are pairs of problem and content."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[str, str, bytes]] = field(default_factory=list)
    seconds: float = 0.0


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change a file in one to four places."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64))
        kind = rng.randrange(7)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = rng.choice(_WORDS)
        elif kind == 3:
            changed[place : place + length] = rng.choice(_WORDS)
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            source = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[source : source + length]
        else:
            changed[place : place + length] = rng.randbytes(length)
    return bytes(changed)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Put another value, or a value from elsewhere in the file, in place of one of a JSON file."""
    try:
        root = json.loads(content)
    except ValueError:
        return mutate(content, rng)
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            waiting += [value[key] for key in keys]
    if not places:
        return mutate(content, rng)
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
        return mutate(content, rng)


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


def fuzz(
    target: Target, num_inputs: int, seed: int, folder: Path, elsewhere: OpenedElsewhere
) -> Found:
    """Read `num_inputs` changed versions of a target's files."""
    rng = random.Random(f"{target.name} {seed}")
    found = Found()
    for name, content in target.seeds.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    target.seal(folder)
    target.read(folder)  # the seeds themselves must be accepted
    names = list(target.seeds)
    started = time.monotonic()
    for _ in range(num_inputs):
        name = rng.choice(names)
        change = mutate_json if name.endswith(".json") and rng.random() < 0.6 else mutate
        content = change(target.seeds[name], rng)
        (folder / name).write_bytes(content)
        target.seal(folder)
        problem = _problem(target, folder, found, elsewhere)
        if problem is not None:
            found.findings.append((problem, name, content))
        (folder / name).write_bytes(target.seeds[name])
    found.seconds = time.monotonic() - started
    return found


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


def targets(scratch: Path) -> list[Target]:
    """Everything that reads a file that somebody else may have written.

    Args:
        scratch: An empty folder in which valid files are made.
    """
    return [
        *_data_targets(),
        *_manifest_targets(scratch),
        _config_target(),
        _bundle_target(scratch),
    ]


def _lines(*records: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _data_targets() -> list[Target]:
    from rlrag.data.checks import Tally
    from rlrag.data.ranking_run import read_ranking_run
    from rlrag.data.readers import read_passages, read_questions

    passages = _lines(
        {"id": "p1", "contents": '"Rome"\nA city of Italy.'},
        {"id": "p2", "title": "Oslo", "text": "A city of Norway."},
    )
    questions = _lines(
        {"id": "q1", "question": "where is Rome?", "golden_answers": ["Italy"], "metadata": {}},
        {
            "id": "q2",
            "question": "where is Oslo?",
            "golden_answers": [],
            "metadata": {"gold_ids": ["p2"], "choices": ["Norway", "Italy"]},
        },
    )
    run = b"q1 Q0 p1 1 12.5 ours\nq1 Q0 p2 2 11.25 ours\nq2 Q0 p2 1 3e-1 ours\n"
    wanted = {"q1": ("p1", "p2"), "q2": ("p2",)}
    return [
        Target(
            "questions",
            {"q.jsonl": questions},
            lambda folder: list(read_questions(folder / "q.jsonl", Tally())),
        ),
        Target(
            "passages",
            {"p.jsonl": passages},
            lambda folder: list(read_passages(folder / "p.jsonl", Tally())),
        ),
        Target(
            "passages, gzip",
            {"p.jsonl.gz": gzip.compress(passages, mtime=0)},
            lambda folder: list(read_passages(folder / "p.jsonl.gz", Tally())),
        ),
        Target(
            "ranking run", {"r.run": run}, lambda folder: read_ranking_run(folder / "r.run", wanted)
        ),
    ]


def _manifest_targets(scratch: Path) -> list[Target]:
    import torch

    from rlrag.retrieval.manifest import Manifest, check_manifest, write_manifest
    from rlrag.training.checkpoints import CheckpointStore

    index = scratch / "index"
    index.mkdir()
    (index / "vectors.npy").write_bytes(b"123456")
    manifest = Manifest("vectors", "c" * 16, 3, parameters={"links": 4})
    write_manifest(index, manifest)
    store = CheckpointStore(scratch / "checkpoints")
    store.save(3, {"policy": {"weight": torch.ones(2, 3)}}, {"step": 3, "best": [1, 2]})
    return [
        Target(
            "index manifest",
            {f"i/{path.name}": path.read_bytes() for path in index.iterdir()},
            lambda folder: check_manifest(folder / "i", manifest),
        ),
        Target(
            "checkpoint",
            {f"c/step-000003/{p.name}": p.read_bytes() for p in store.path(3).iterdir()},
            lambda folder: CheckpointStore(folder / "c").load(3),
        ),
        Target(
            "checkpoint with fitting hashes",
            {
                f"s/step-000003/{path.name}": path.read_bytes()
                for path in store.path(3).iterdir()
                if path.name != "manifest.json"
            },
            lambda folder: CheckpointStore(folder / "s").load(3),
            lambda folder: _seal(folder / "s" / "step-000003"),
        ),
    ]


def _config_target() -> Target:
    from rlrag.config import RunConfig

    def read(folder: Path) -> RunConfig:
        text = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
        return RunConfig.from_json(text, "config.json")

    return Target("configuration", {"config.json": RunConfig().to_json().encode()}, read)


def _bundle_target(scratch: Path) -> Target:
    from rlrag.bundle import load_bundle
    from rlrag.config import GeneratorConfig
    from rlrag.models import resolve_model

    bundle = make_bundle(scratch)
    # A configuration that names no generator means this one, which takes a while to unpack once.
    resolve_model(GeneratorConfig().model, scratch / "cache")
    return Target(
        "bundle with fitting hashes",
        {
            f"b/{path.relative_to(bundle)}": path.read_bytes()
            for path in bundle.rglob("*")
            if path.is_file() and path.name != "manifest.json"
        },
        lambda folder: load_bundle(folder / "b"),
        lambda folder: _seal(folder / "b"),
    )


def make_bundle(scratch: Path) -> Path:
    """A small bundle with golden questions and a comparison."""
    import torch
    from safetensors.torch import save_file

    from rlrag.bundle import add_evaluation, save_bundle
    from rlrag.bundle_files import Evaluated, GoldenQuestion
    from rlrag.config import RunConfig
    from rlrag.pipeline import open_evaluation_data, open_library, open_policy

    model = scratch / "model"
    model.mkdir()
    save_file({"weight": torch.ones(2, 2)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    (scratch / "p.jsonl").write_bytes(
        _lines(*({"id": f"p{n}", "contents": f"Title\nword{n} text"} for n in range(6)))
    )
    (scratch / "q.jsonl").write_bytes(
        _lines({"id": "q", "question": "which word1?", "golden_answers": ["text"]})
    )
    config = RunConfig.model_validate(
        {
            "cache_dir": str(scratch / "cache"),
            "data": {
                "corpus": str(scratch / "p.jsonl"),
                "train_questions": str(scratch / "q.jsonl"),
                "eval_questions": str(scratch / "q.jsonl"),
            },
            "retrieval": {"kind": "bm25", "encoder": None, "num_candidates": 3},
            "selector": {"hidden_size": 4, "projection_size": 2},
            "generator": {"model": str(model)},
        }
    )
    candidates, _ = open_evaluation_data(config, open_library(config))
    bundle = scratch / "bundle"
    save_bundle(bundle, config, open_policy(config, candidates), candidates, {"corpus": "c"}, 3)
    golden = (GoldenQuestion("q", "which word1?", "text", ("p1",), -0.5),)
    add_evaluation(bundle, Evaluated(golden, {"num_questions": 1, "systems": {}, "hashes": {}}))
    return bundle


def _seal(directory: Path) -> None:
    files = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / "manifest.json"
    }
    (directory / "manifest.json").write_text(json.dumps({"files": files}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz every target and write the table; the exit code is 1 when something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", help="names; all when left out")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of findings")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    lines, num_findings = [], 0
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as folder:
        elsewhere = OpenedElsewhere([Path(scratch), Path(folder)])
        for target in targets(Path(scratch)):
            if options.targets and target.name not in options.targets:
                continue
            found = fuzz(target, options.inputs, options.seed, Path(folder), elsewhere)
            num_findings += len(found.findings)
            for number, (problem, name, content) in enumerate(found.findings):
                print(f"{target.name}, {name}: {problem}", file=sys.stderr)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    place = f"{target.name.replace(' ', '-')}-{number}-{Path(name).name}"
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
                f"`python -m benchmarks.fuzz --inputs {options.inputs} --seed {options.seed}`; "
                "what counts as a finding is in the module.",
                "",
                "| read | inputs | accepted | refused | findings | inputs/s |",
                "|---|---|---|---|---|---|",
                *lines,
                "",
            ]
        )
        RESULTS_FILE.write_text(table, encoding="utf-8")
    return 1 if num_findings else 0


if __name__ == "__main__":
    sys.exit(main())
