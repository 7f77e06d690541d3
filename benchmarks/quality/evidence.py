"""Compares all trainers and other libraries on several data sets, one table per data set.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.evidence`. Each set gives the same numbers of
training, validation and test questions, drawn with a seed from those that have an answer; MuSiQue,
which has one file, is divided. Every system starts from the same dense encoder and generator, shows
as many passages, and may spend the same number of generator tokens in training. A finished run or
peer in the folder is taken as it is, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.__main__ import PEERS, PeerName, PeersArguments, compared_rows
from benchmarks.peers.environments import interpreter
from benchmarks.peers.plan import write_json
from benchmarks.peers.running import Peer
from benchmarks.peers.table import table_lines
from benchmarks.runs import finished_run
from rlrag.cli.command_line import parse_config
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES

RESULTS_FILE = Path(__file__).parents[1] / "results" / "evidence.md"
_PROGRAM = "python -m benchmarks.quality.evidence"
SETS = ("nq", "hotpotqa", "squad2", "musique")
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 160, 40, 200
NUM_PASSAGES = 2
TOKEN_BUDGET = 800_000
_SHARES = (0.25, 0.5, 0.75)
_PEER_MINUTES = 90.0
_MINUTES_FILE = "minutes.txt"
_COMMON = (
    *("--environment.num-selected", str(NUM_PASSAGES), "--retrieval.num-candidates", "5"),
    *("--generator.prompt.max-prompt-tokens", "1024", "--training.batch-size", "16"),
    *("--training.max-generator-tokens", str(TOKEN_BUDGET)),
)
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "retriever by OpenRAG": (
        "nq-openrag-dense",
        ("--evaluation.systems", "original_retriever", "tuned_retriever"),
    ),
    "selector and generator by DRO": (
        "nq-dro",
        ("--training.num-epochs", "4", "--evaluation.systems", "retriever_order", "trained"),
    ),
    "all three in turns": (
        "nq-full",
        (
            *("--retrieval.kind", "dense"),
            *("--algorithm.retriever.temperature", "0.05"),
            *("--algorithm.retriever.learning-rate", "2e-5"),
            *("--evaluation.systems", "retriever_order", "trained"),
        ),
    ),
    "retriever by JSA": (
        "nq-jsa",
        (
            *("--algorithm.num-prior", "5", "--algorithm.num-posterior", "5"),
            *("--evaluation.systems", "original_retriever", "tuned_retriever"),
        ),
    ),
}
"""Recipe and flags by the name of a row."""


def draw_questions(name: str, source: Path, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the training and the test questions of a set; their files.

    Questions lose the question mark at their end, since the recipes' prompt has one.

    Args:
        name: The set.
        source: Folder of `NAME.train.jsonl` and, for most sets, `NAME.dev.jsonl`.
        folder: Where the files go.
        seed: Of the draw.

    Raises:
        ConfigError: when there are too few questions with an answer.
    """
    train, test = (_answerable(source / f"{name}.{split}.jsonl") for split in ("train", "dev"))
    generator = random.Random(seed)
    generator.shuffle(train)
    generator.shuffle(test)
    num_train = NUM_TRAIN + NUM_VALIDATION
    if not test:
        train, test = train[:num_train], train[num_train:]
    if len(train) < num_train or not test:
        raise ConfigError(
            f"{source} has {len(train)} questions of {name} for training and {len(test)} for "
            f"testing; {num_train} and at least one are needed"
        )
    files = []
    for split, records in (("train", train[:num_train]), ("test", test[:NUM_TEST])):
        file = folder / f"{name}.{split}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        file.write_text("\n".join(lines) + "\n")
        files.append(file)
    return files[0], files[1]


def _answerable(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        record | {"question": record["question"].rstrip("? ")}
        for record in records
        if record["golden_answers"]
    ]


def run_flags(corpus: Path, train: Path, test: Path) -> list[str]:
    """What all runs on a set have in common."""
    data = {
        "corpus": corpus,
        "train-questions": train,
        "eval-questions": test,
        "max-train-questions": None,
        "num-validation-questions": NUM_VALIDATION,
    }
    words = [word for name, value in data.items() for word in (f"--data.{name}", str(value))]
    return [*words, *_COMMON]


def compared(
    name: str, folder: Path, cache_dir: Path, sources: Path, peers: Sequence[PeerName]
) -> dict[str, Any]:
    """Train and measure everything on one set, or take what is finished; its part of the page.

    Args:
        name: The set.
        folder: Of this set.
        cache_dir: Of models, indexes and answers.
        sources: The folder that RLRAG_DATA_DIR names.
        peers: Which of them; what was finished with more is taken whole.
    """
    summary = folder / "summary.json"
    if summary.is_file():
        found: dict[str, Any] = json.loads(summary.read_text())
        if set(peers) <= set(found["peers"]):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    train, test = draw_questions(name, sources / "questions", folder)
    corpus = sources / "corpus" / f"{name}.jsonl.gz"
    run_dirs = {family: folder / recipe for family, (recipe, _) in FAMILIES.items()}
    for family, (recipe, own) in FAMILIES.items():
        with _minutes_in(folder):
            words = [*run_flags(corpus, train, test), *own]
            finished_run(recipe, run_dirs[family], 0, str(cache_dir), words)
    recipe_of_peers, words = RECIPES["nq"](), run_flags(corpus, train, test)
    config = parse_config(recipe_of_peers, [*words, "--cache-dir", str(cache_dir)], _PROGRAM)
    arguments = PeersArguments(
        config,
        folder / "peers",
        summary,
        runs=tuple(f"{family}={run_dir}" for family, run_dir in run_dirs.items()),
        token_budget=TOKEN_BUDGET,
        minutes=_PEER_MINUTES,
    )
    open_python = partial(interpreter, folder=folder.parent / "environments")
    with _minutes_in(folder):
        chosen: dict[str, Peer] = {peer: PEERS[peer] for peer in peers}
        rows, prepared = compared_rows(arguments, chosen, open_python)
    minutes = [float(line) for line in (folder / _MINUTES_FILE).read_text().split()]
    found = {
        "name": name,
        "peers": list(peers),
        "num_test": len(prepared.dev),
        "num_passages": len(prepared.library.corpus),
        "minutes": sum(minutes),
        "lines": [*table_lines(rows), "", *curve_lines(run_dirs)],
    }
    write_json(summary, found)
    return found


def curve_lines(run_dirs: Mapping[str, Path]) -> list[str]:
    """Quality against tokens: the best F1 on the validation questions within each share.

    Args:
        run_dirs: Of runs that have begun, by the name of a row.
    """
    lines = [
        "The best F1 on the validation questions within a share of the budget, and in all:",
        "",
        f"| trained | {' | '.join(f'{share:.0%}' for share in _SHARES)} | all |",
        "|---" * (2 + len(_SHARES)) + "|",
    ]
    for family, run_dir in run_dirs.items():
        text = (run_dir / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        cells = []
        for limit in (*(share * TOKEN_BUDGET for share in _SHARES), float("inf")):
            within = [
                record["validation/f1"]
                for record in records
                if "validation/f1" in record and record["generator_tokens_total"] <= limit
            ]
            cells.append(f"{max(within):.3f}" if within else "-")
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return lines


@contextmanager
def _minutes_in(folder: Path) -> Iterator[None]:
    """Note how long the block took, also if it was stopped."""
    started = time.monotonic()
    try:
        yield
    finally:
        with (folder / _MINUTES_FILE).open("a") as stream:
            stream.write(f"{(time.monotonic() - started) / 60}\n")


def page(parts: Sequence[dict[str, Any]]) -> str:
    """All sets as Markdown."""
    hours = sum(part["minutes"] for part in parts) / 60
    absent = [peer for peer in PEERS if any(peer not in part["peers"] for part in parts)]
    without = f" Left out of some sets: {', '.join(absent)}." if absent else ""
    lines = [
        "# Every family of training, and peers",
        "",
        f"`python -m benchmarks.quality.evidence`; {platform.machine()}, {os.cpu_count()} cores; "
        "all of it "
        f"took {hours:.1f} hours. For each data set {NUM_TRAIN} questions to train on, "
        f"{NUM_VALIDATION} to choose a checkpoint by and at most {NUM_TEST} to measure, drawn once "
        f"from those with an answer; seed 0; {NUM_PASSAGES} passages in the prompt, the first "
        "picked one next to the question, where this generator reads it best. Every system "
        f"starts from the same dense encoder and generator and may spend {TOKEN_BUDGET:,} "
        "generator tokens, prompts and answers together, in training. A run of this project ends "
        "with the step that reaches them. Minutes are those of training: of a peer from the start "
        "of its script to its end, of a run its judging, collecting, learning and validating. To "
        "encode the corpus for a new retriever is in neither. Runs share a cache of answers: what "
        "one asked counts as tokens of those below it too, and takes them no time, so that their "
        f"minutes are fewer than alone.{without}",
    ]
    for part in parts:
        lines += [
            "",
            f"## {part['name']}: {part['num_test']} test questions, {part['num_passages']:,} "
            "passages",
            "",
            *part["lines"],
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the page of what is finished then."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--folder", type=Path, default=Path("runs") / "evidence")
    parser.add_argument("--cache-dir", type=Path, default=Path("runs") / "evidence" / "cache")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    arguments = parser.parse_args()
    sources = os.environ.get("RLRAG_DATA_DIR")
    if not sources:
        parser.error("set RLRAG_DATA_DIR to the folder that contains corpus/ and questions/")
    folder, cache_dir = arguments.folder.absolute(), arguments.cache_dir.absolute()
    parts = []
    for name in arguments.sets:
        parts.append(compared(name, folder / name, cache_dir, Path(sources), arguments.peers))
        text = page(parts)
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
