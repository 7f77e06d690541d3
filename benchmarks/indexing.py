"""Corpus sizes to a table: peak memory of indexing, and the speed of flat search.

Run `python -m benchmarks.indexing`. Every index is built in a process of its own from passages that
are made up on the way, with an encoder that draws a vector from the text's hash, so that what is
measured is the indexing and neither the corpus nor a model. The vectors are written to their file
and never held, so nothing is subtracted from the peak. Flat search is timed in turns with a bare
`faiss.IndexFlatIP` over the same vectors.

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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from rlrag.records import Passage
    from rlrag.retrieval.trainable import Role

RESULTS_FILE = Path(__file__).parent / "results" / "indexing.md"
TARGET_RATIO = 1.2
VECTOR_SIZE = 384
_NUM_WORDS = 60
_VOCABULARY = 20_000
_TIMEOUT_S = 600
_NUM_TURNS = 21


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
        from rlrag.retrieval.encoder import EncoderIdentity

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
        return self.num_passages * VECTOR_SIZE * 4 / 2**20 if self.kind == "dense" else 0.0


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
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def flat_search_speed(num_passages: int, num_questions: int, k: int) -> dict[str, float]:
    """Questions a second of the dense retriever and of bare FAISS, as medians over turns."""
    import faiss
    import numpy as np

    from rlrag.config import RetrievalConfig
    from rlrag.retrieval.dense import DenseRetriever

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


def _seconds(work: Callable[[], object]) -> float:
    import time

    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _in_child(arguments: Sequence[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.indexing", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=_TIMEOUT_S,
    )
    return json.loads(done.stdout.splitlines()[-1])


def report(memories: Sequence[Memory], speeds: Sequence[tuple[int, dict[str, float]]]) -> str:
    """The measured numbers as Markdown."""
    lines = [
        "# Indexing: memory and flat search",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.indexing`.",
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
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=5_000, help="passages of the small corpus")
    parser.add_argument("--large", type=int, default=50_000, help="passages of the large corpus")
    parser.add_argument("--candidates", type=int, default=10, help="hits a question")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="where the table goes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure, print and save; exit code 1 when the memory target is missed."""
    arguments = _arguments()
    if arguments.child:
        task, *values = arguments.child
        if task == "search":
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
    text = report(memories, speeds)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    return 0 if memories[1].peak_mib <= TARGET_RATIO * memories[0].peak_mib else 1


if __name__ == "__main__":
    sys.exit(main())
