"""Peak memory of indexing, speed of flat search, and cost by corpus size.

Run `python -m benchmarks.speed.indexing`. Every index is built in a process of its own from
passages that are made up on the way, with an encoder that draws a vector from the text's hash, so
that what is measured is the indexing and neither the corpus nor a model. The vectors are written to
their file and never held, so nothing is subtracted from the peak. Flat search is timed in turns
with a bare `faiss.IndexFlatIP` over the same vectors. `--sizes` names the corpora of the table of
costs, from whose largest the needs of 10^8 passages are worked out; without any there is no such
table.

This process imports nothing large: a child's peak begins at its parent's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rlrag.records import Passage
    from rlrag.retrieval.trainable.protocol import Role

RESULTS_FILE = Path(__file__).parents[1] / "results" / "indexing.md"
TARGET_RATIO = 1.2
VECTOR_SIZE = 384
_NUM_WORDS = 60
_VOCABULARY = 20_000
_TIMEOUT_S = 3600
_NUM_TURNS = 21
_NUM_HITS, _BATCH, _QUESTION_WORDS = 10, 64, 8
_PAPER_PASSAGES = 10**8
_PAPER_SHARDS = (16, 64)
_MIB, _GIB = 2**20, 2**30


class SyntheticCorpus:
    """Passages made from their row number when they are asked for; nothing is stored."""

    def __init__(self, num_passages: int) -> None:
        self._num_passages = num_passages
        self.content_hash = f"synthetic-{num_passages}"

    def __len__(self) -> int:
        return self._num_passages

    def __getitem__(self, row: int) -> Passage:
        import numpy as np

        from rlrag.records import Passage

        # A power law, as words of a language have; the tail is folded back into the vocabulary.
        words = np.random.default_rng(row).zipf(1.3, _NUM_WORDS) % _VOCABULARY
        return Passage(f"p{row}", f"title{row % 997}", " ".join(f"word{word}" for word in words))

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(self._num_passages))

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, or None where the corpus lacks it."""
        row = int(passage_id[1:])
        return row if 0 <= row < self._num_passages else None


class HashEncoder:
    """A vector drawn from the CRC-32 of the text: cheap, and the same every time."""

    size = VECTOR_SIZE

    def __init__(self) -> None:
        from rlrag.retrieval.dense.encoder import EncoderIdentity

        self.identity = EncoderIdentity("hash", "float32", 0)

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        """One float32 vector of Euclidean length 1 for each text."""
        import zlib

        import numpy as np

        vectors_BD = np.empty((len(texts), self.size), dtype=np.float32)
        for row, text in enumerate(texts):
            generator = np.random.default_rng(zlib.crc32(text.encode()))
            generator.standard_normal(dtype=np.float32, out=vectors_BD[row])
        return vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)


@dataclass(frozen=True)
class Memory:
    """Peak resident memory of one child process, before and after it indexed, in MiB."""

    kind: str
    num_passages: int
    imports_mib: float
    peak_mib: float

    @property
    def vectors_mib(self) -> float:
        """Size of the vectors on disk."""
        return self.num_passages * VECTOR_SIZE * 4 / _MIB if self.kind == "dense" else 0.0


def index_memory(kind: str, num_passages: int) -> dict[str, float]:
    """Index once in this process; its peak after the imports and at the end."""
    import faiss  # noqa: F401  (a part of the imports, so of the peak before)

    from rlrag.config import RetrievalConfig
    from rlrag.retrieval.build import open_retrievers

    config = RetrievalConfig.model_validate(
        {"kind": kind, **({"encoder": None} if kind == "bm25" else {})}
    )
    encoder = HashEncoder() if kind == "dense" else None
    imports_mib = _peak_mib()
    with tempfile.TemporaryDirectory() as directory:
        open_retrievers(SyntheticCorpus(num_passages), config, Path(directory), encoder=encoder)
        return {"imports_mib": imports_mib, "peak_mib": _peak_mib()}


def _peak_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 2**10)


def flat_search_speed(num_passages: int, num_questions: int, k: int) -> dict[str, float]:
    """Questions a second of the dense retriever and of bare FAISS, as medians over turns."""
    import faiss
    import numpy as np

    from rlrag.config import RetrievalConfig
    from rlrag.retrieval.dense.search import DenseRetriever

    encoder = HashEncoder()
    vectors_PD = encoder.encode([f"passage {row}" for row in range(num_passages)])
    vectors_BD = encoder.encode([f"question {row}" for row in range(num_questions)])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vectors.npy"
        np.save(path, vectors_PD)
        bare = faiss.IndexFlatIP(VECTOR_SIZE)
        bare.add(vectors_PD)
        retriever = DenseRetriever(
            encoder, np.load(path, mmap_mode="r"), RetrievalConfig(kind="dense")
        )
        agree = bool(
            np.array_equal(
                bare.search(vectors_BD, k)[1], retriever.search_vectors(vectors_BD, k).rows_BK
            )
        )
        ours, theirs, ratios = [], [], []
        for _ in range(_NUM_TURNS):
            theirs.append(_seconds(lambda: bare.search(vectors_BD, k)))
            ours.append(_seconds(lambda: retriever.search_vectors(vectors_BD, k)))
            ratios.append(theirs[-1] / ours[-1])
    return {
        "ours_per_s": num_questions / statistics.median(ours),
        "bare_per_s": num_questions / statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "same_rows": agree,
        "num_threads": faiss.omp_get_max_threads(),
    }


@dataclass(frozen=True)
class Cost:
    """What one index of one corpus took to build and to search; memory is what was added."""

    kind: str
    num_passages: int
    made_up_s: float
    build_s: float
    build_bytes: int
    disk_bytes: int
    one_s: float
    batch_s: float
    search_bytes: int

    @property
    def own_s(self) -> float:
        """Building without the making up of passages."""
        return max(0.0, self.build_s - self.made_up_s)

    def __str__(self) -> str:
        return (
            f"| {self.kind} | {self.num_passages:,} | {self.build_s:.1f} | {self.made_up_s:.1f} "
            f"| {1e6 * self.own_s / self.num_passages:.1f} "
            f"| {self.disk_bytes / self.num_passages:,.0f} | {self.build_bytes / _MIB:,.0f} "
            f"| {1 / self.one_s:,.1f} | {_BATCH / self.batch_s:,.1f} "
            f"| {self.search_bytes / _MIB:,.0f} |"
        )


class AnonymousPeak:
    """Watches the memory of this process that is no file's: the kernel cannot take it back."""

    def __enter__(self) -> AnonymousPeak:
        import threading

        self._before = self._peak = self._read()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watcher.join()

    @property
    def added(self) -> int:
        """Bytes at the peak over those at the start."""
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._peak = max(self._peak, self._read())

    def _read(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def index_costs(kind: str, num_passages: int, directory: Path) -> list[dict[str, Any]]:
    """Build and search the vectors, flat and then with IVF-PQ, or the words, in this process."""
    import bm25s  # noqa: F401  (so that no import counts, here and below)
    import faiss  # noqa: F401

    corpus = SyntheticCorpus(num_passages)
    times = [_seconds(lambda: [corpus[row] for row in range(100)]) for _ in range(51)]
    made_up_s = statistics.median(times) * num_passages / 100
    if kind == "bm25":
        return [_cost(corpus, {"kind": "bm25", "encoder": None}, kind, made_up_s, directory)]
    flat = _cost(corpus, {"kind": "dense"}, "flat", made_up_s, directory)
    return [flat, _cost(corpus, {"kind": "dense", "index": "ivfpq"}, "ivfpq", 0.0, directory)]


def _cost(
    corpus: SyntheticCorpus, settings: dict[str, Any], kind: str, made_up_s: float, directory: Path
) -> dict[str, Any]:
    from rlrag.config import RetrievalConfig
    from rlrag.retrieval.build import open_retrievers

    config = RetrievalConfig.model_validate(settings)
    encoder = None if kind == "bm25" else HashEncoder()
    before = set(directory.rglob("*.*"))
    opened = []
    with AnonymousPeak() as building:
        build_s = _seconds(
            lambda: opened.append(open_retrievers(corpus, config, directory, encoder=encoder))
        )
    search = opened[0].primary.search
    words = [list(dict.fromkeys(corpus[row].text.split())) for row in range(_BATCH)]
    questions = [" ".join(different[:_QUESTION_WORDS]) for different in words]
    search(questions[:1], _NUM_HITS)  # brings the files into memory
    with AnonymousPeak() as searching:
        ones = [_seconds(lambda q=q: search([q], _NUM_HITS)) for q in questions[:9]]
        batches = [_seconds(lambda: search(questions, _NUM_HITS)) for _ in range(3)]
    return {
        "kind": kind,
        "num_passages": len(corpus),
        "made_up_s": made_up_s,
        "build_s": build_s,
        "build_bytes": building.added,
        "disk_bytes": sum(path.stat().st_size for path in {*directory.rglob("*.*")} - before),
        "one_s": statistics.median(ones),
        "batch_s": statistics.median(batches),
        "search_bytes": searching.added,
    }


def _seconds(work: Callable[[], object]) -> float:
    import time

    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _in_child(arguments: Sequence[str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.indexing", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(
    memories: Sequence[Memory],
    speeds: Sequence[tuple[int, dict[str, float]]],
    costs: Sequence[Cost],
) -> str:
    """The measured numbers as Markdown."""
    lines = [
        "# Indexing: memory and flat search",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.speed.indexing`.",
        "",
        "Peak resident memory (`ru_maxrss`) of a process that indexes and ends. The vectors are "
        "not in it: they go to their file.",
        "",
        "| index | passages | vectors on disk, MiB | after imports, MiB | peak, MiB "
        "| added by indexing, MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.kind} | {each.num_passages:,} | {each.vectors_mib:.1f} | {each.imports_mib:.1f} "
        f"| {each.peak_mib:.1f} | {each.peak_mib - each.imports_mib:.1f} |"
        for each in memories
    ]
    lines.append("")
    for small, large in zip(memories[::2], memories[1::2], strict=True):
        added = [each.peak_mib - each.imports_mib for each in (small, large)]
        lines.append(
            f"- {small.kind}: peak of {large.num_passages:,} over {small.num_passages:,} passages "
            f"= **{large.peak_mib / small.peak_mib:.2f}**; added by indexing alone "
            f"{added[1] / added[0]:.2f}"
            f" (target for the peak: at most {TARGET_RATIO})."
            + ("" if small.kind == "dense" else " Its postings, eight bytes each, are in the peak.")
        )
    lines += [
        "",
        "Flat search over the memory map against a bare `faiss.IndexFlatIP`, in turns, medians "
        f"of {_NUM_TURNS} turns (the ratio is that of each turn, then the median):",
        "",
        "| passages | threads | questions in a batch | ours, questions/s | bare, questions/s "
        "| ratio | same rows |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {int(speed['num_passages']):,} | {int(speed['num_threads'])} | {batch} "
        f"| {speed['ours_per_s']:.0f} | {speed['bare_per_s']:.0f} | **{speed['ratio']:.2f}** "
        f"| {'yes' if speed['same_rows'] else 'no'} |"
        for batch, speed in speeds
    ]
    return "\n".join(lines + (_describe_costs(costs) if costs else [])) + "\n"


def _describe_costs(costs: Sequence[Cost]) -> list[str]:
    lines = [
        "",
        f"Cost by size: vectors of {VECTOR_SIZE} numbers drawn at random, passages of {_NUM_WORDS} "
        "words. `flat` is the encoding and writing of the vectors, without a model's work; `ivfpq` "
        "an index over the same vectors, with 256 lists of which 32 are searched. Memory is what "
        "is added at the peak and is no file's; mapped files come on top, as far as there is room "
        f"for them. The best {_NUM_HITS} passages are asked for.",
        "",
        "| index | passages | build, s | of that making passages up, s | rest, us a passage "
        "| on disk, bytes a passage | build, MiB | questions/s, one at a time "
        f"| questions/s, {_BATCH} at a time | search, MiB |",
        "|---" * 10 + "|",
        *map(str, costs),
        "",
        f"On paper, {_PAPER_PASSAGES:.0e} passages, in proportion to the largest of these:",
        "",
    ]
    largest = {cost.kind: cost for cost in costs}  # sizes ascend
    for kind in ("flat", "ivfpq"):
        lines += [_on_paper(largest[kind], shards) for shards in _PAPER_SHARDS]
    words = largest["bm25"]
    times = _PAPER_PASSAGES / words.num_passages
    return [
        *lines,
        "- bm25, which `retrieval.num_shards` does not split: "
        f"{words.disk_bytes * times / _GIB:,.0f} GiB on disk, "
        f"{words.build_bytes * times / _GIB:,.0f} GiB of memory and "
        f"{words.own_s * times / 3600:.1f} hours to build in one process, "
        f"{words.one_s * times:.1f} s a question.",
    ]


def _on_paper(cost: Cost, num_shards: int) -> str:
    times = _PAPER_PASSAGES / cost.num_passages
    builders = 1 if cost.kind == "flat" else num_shards  # one process encodes, actors index
    return (
        f"- {cost.kind}, `retrieval.num_shards` {num_shards}, each with as many cores as here: "
        f"{_PAPER_PASSAGES * VECTOR_SIZE * 4 / _GIB:,.0f} GiB of vectors on disk, "
        f"{cost.disk_bytes * times / num_shards / _GIB:.1f} GiB of memory an actor, "
        f"{cost.own_s * times / 3600 / builders:.1f} hours to build, "
        f"{cost.one_s * times / num_shards:.2f} s for a question alone and "
        f"{1e3 * cost.batch_s / _BATCH * times / num_shards:.0f} ms in a batch."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=5_000, help="passages of the small corpus")
    parser.add_argument("--large", type=int, default=50_000, help="passages of the large corpus")
    parser.add_argument("--sizes", nargs="*", type=int, default=[10**4, 10**5, 10**6])
    parser.add_argument(
        "--folder", default=None, help="temporary folder for the indexes of --sizes"
    )
    parser.add_argument("--candidates", type=int, default=10, help="results per question")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="file for the table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print and save; exit code 1 when the memory target is missed."""
    arguments = _arguments()
    if arguments.child:
        task, *values = arguments.child
        if task == "costs":
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                print(json.dumps(index_costs(values[0], int(values[1]), Path(folder))))
        elif task == "search":
            print(json.dumps(flat_search_speed(*map(int, values))))
        else:
            print(json.dumps(index_memory(task, int(values[0]))))
        return 0
    memories = [
        Memory(kind, size, **_in_child(["--child", kind, str(size)]))
        for kind in ("dense", "bm25")
        for size in (arguments.small, arguments.large)
    ]
    speeds = []
    for batch in (1, 256):
        sizes = [str(arguments.large), str(batch), str(arguments.candidates)]
        speed = _in_child(["--child", "search", *sizes])
        speeds.append((batch, {**speed, "num_passages": arguments.large}))
    place = ["--folder", arguments.folder] if arguments.folder else []
    costs = [
        Cost(**values)
        for size in sorted(arguments.sizes)
        for kind in ("dense", "bm25")
        for values in _in_child([*place, "--child", "costs", kind, str(size)])
    ]
    text = report(memories, speeds, costs)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    return 0 if memories[1].peak_mib <= TARGET_RATIO * memories[0].peak_mib else 1


if __name__ == "__main__":
    sys.exit(main())
