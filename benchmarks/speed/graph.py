"""Cost of the passage graph by corpus size: building, room, asking and following changes.

Run `python -m benchmarks.speed.graph`. Passages are made up: a document has two of them on average,
a text mentions two documents and holds three rare names and a year among words of a power law. The
change is of 100 passages: half of them replaced, a quarter each added and deleted, some of them new
documents. The changed graph is compared with one built from scratch.

Times are processor time of one thread, so that a busy machine changes them little. The peak of
memory is that of the process, passages included, which a corpus on disk does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rlrag.records import Passage
from rlrag.retrieval.graph import PassageGraph

RESULTS_FILE = Path(__file__).parents[1] / "results" / "graph.md"
MAX_BYTES = 1000
_NUM_WORDS = 60
_VOCABULARY = 20_000
_NUM_CHANGES = 100
_NUM_ASKED = 2000
_TIMEOUT_S = 3600
_MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What the graph of one corpus took."""

    num_passages: int
    build_s: float
    bytes_each: float
    load_s: float
    neighbours_us: float
    mean_neighbours: float
    named_us: float
    change_s: float
    rebuild_s: float
    peak_mib: float


def synthetic_passage(row: int, num_passages: int, edition: int = 0) -> Passage:
    """A passage made from its row; another edition has another text, at times of a new document."""
    random = np.random.default_rng([row, edition])
    num_documents = num_passages // 2
    words = [f"word{word}" for word in random.zipf(1.3, _NUM_WORDS) % _VOCABULARY]
    documents = random.integers(num_documents, size=3)
    names = random.integers(num_passages, size=3)
    inserted = [_title(int(documents[0])), _title(int(documents[1]))]
    inserted += [f"Name{name} Family{name % 97}" for name in names]
    inserted.append(str(1000 + random.integers(1000)))
    for place, text in zip(random.integers(_NUM_WORDS, size=len(inserted)), inserted, strict=True):
        words[place] = text
    is_new = edition and row % 10 == 0
    title = f"Edition {edition} of row{row}" if is_new else _title(int(documents[2]))
    return Passage(f"p{row}", title, " ".join(words))


def _title(document: int) -> str:
    return f"Title{document % 1009} of Place{document}"


def measure(num_passages: int) -> Cost:
    """Everything for one size, in this process."""
    passages = [synthetic_passage(row, num_passages) for row in range(num_passages)]
    started = time.process_time()
    graph = PassageGraph.build(passages)
    build_s = time.process_time() - started
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "graph"
        graph.save(path, "synthetic")
        bytes_each = sum(file.stat().st_size for file in path.iterdir()) / num_passages
        started = time.process_time()
        graph = PassageGraph.load(path, "synthetic")
        load_s = time.process_time() - started
        random = np.random.default_rng(0)
        asked = random.integers(num_passages, size=_NUM_ASKED).tolist()
        started = time.process_time()
        found = [graph.neighbours(row) for row in asked]
        neighbours_us = (time.process_time() - started) / _NUM_ASKED * 1e6
        questions = [f"Who of {_title(row % 1000)} knew whom in what year?" for row in asked]
        started = time.process_time()
        for question in questions:
            graph.named_in(question)
        named_us = (time.process_time() - started) / _NUM_ASKED * 1e6
        change_s = _change(graph, passages)
    started = time.process_time()
    rebuilt = PassageGraph.build(passages)
    rebuild_s = time.process_time() - started
    for row in (row % len(passages) for row in asked):
        ours, theirs = graph.neighbours(row), rebuilt.neighbours(row)
        if not (
            np.array_equal(ours.rows, theirs.rows) and np.array_equal(ours.weights, theirs.weights)
        ):
            raise SystemExit(f"row {row} of {num_passages} has other edges after a rebuild")
    return Cost(
        num_passages=num_passages,
        build_s=build_s,
        bytes_each=bytes_each,
        load_s=load_s,
        neighbours_us=neighbours_us,
        mean_neighbours=float(np.mean([len(each.rows) for each in found])),
        named_us=named_us,
        change_s=change_s,
        rebuild_s=rebuild_s,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        / (_MIB if sys.platform == "darwin" else 2**10),
    )


def _change(graph: PassageGraph, passages: list[Passage]) -> float:
    """Change 100 passages in graph and list; the seconds that the graph took."""
    num_passages = len(passages)
    rows = np.random.default_rng(1).permutation(num_passages)[: 3 * _NUM_CHANGES // 4].tolist()
    replaced, deleted = rows[: _NUM_CHANGES // 2], rows[_NUM_CHANGES // 2 :]
    new = [synthetic_passage(row, num_passages, edition=1) for row in replaced]
    added = [
        synthetic_passage(num_passages + number, num_passages, edition=1)
        for number in range(_NUM_CHANGES // 4)
    ]
    started = time.process_time()
    graph.replace(replaced, new)
    graph.add(added)
    graph.delete(deleted)
    seconds = time.process_time() - started
    for row, passage in zip(replaced, new, strict=True):
        passages[row] = passage
    passages += added
    gone = set(deleted)
    passages[:] = [passage for row, passage in enumerate(passages) if row not in gone]
    return seconds


def report(costs: list[Cost]) -> str:
    """The measured numbers as Markdown."""
    lines = [
        "# The passage graph",
        "",
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; made by "
        "`python -m benchmarks.speed.graph`. Processor time of one thread; made-up passages of "
        "about 70 words. After the change "
        f"of {_NUM_CHANGES} passages the edges of {_NUM_ASKED:,} passages were those of the "
        "rebuilt graph.",
        "",
        "| passages | build, s | a passage, µs | bytes a passage on disk | load, s "
        "| edges of a passage, µs | neighbours | names in a question, µs "
        f"| change of {_NUM_CHANGES}, s | rebuild, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.num_passages:,} | {each.build_s:.1f} "
        f"| {each.build_s / each.num_passages * 1e6:.0f} | **{each.bytes_each:.0f}** "
        f"| {each.load_s:.2f} | {each.neighbours_us:.0f} | {each.mean_neighbours:.1f} "
        f"| {each.named_us:.0f} | {each.change_s:.2f} | {each.rebuild_s:.1f} "
        f"| {each.peak_mib:.0f} |"
        for each in costs
    ]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**4, 10**5], help="passages of the rows"
    )
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="where the table goes")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(num_passages: int) -> Cost:
    """Measure in a process of its own, whose peak is that of this size."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.graph", "--one", str(num_passages)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_S,
    )
    return Cost(**json.loads(found.stdout))


def main() -> int:
    """Measure, print and save; exit code 1 when a passage takes too much room."""
    options = _arguments()
    if options.one is not None:
        print(json.dumps(asdict(measure(options.one))))
        return 0
    costs = [_in_a_process(size) for size in options.sizes]
    text = report(costs)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    return 0 if max(each.bytes_each for each in costs) < MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
