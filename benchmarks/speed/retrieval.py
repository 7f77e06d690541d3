"""Cost and quality of retrieval while the encoder is trained.

Run `python -m benchmarks.speed.retrieval`. Two comparisons, both on one corpus and its questions:

- The bag-of-tokens index, searched with sparsified question vectors, against bm25s's own
  `retrieve`, in turns. Either side has its questions ready: vectors here, tokens there.
- Late-parametric retrieval against encoding all passages anew and searching them, as a training
  loop must choose after its weights changed. Quality is shown against that full search.

How flat FAISS search compares with bare FAISS is measured by `benchmarks.speed.indexing`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.config import BUILTIN_CORPUS, BUILTIN_VOCABULARY_ENCODER, RetrievalConfig
from rlrag.data.corpus import Corpus, MemoryCorpus
from rlrag.data.load import load_corpus, load_questions
from rlrag.records import Question
from rlrag.retrieval.build import open_vocabulary_encoder
from rlrag.retrieval.protocol import Hits
from rlrag.retrieval.trainable.late_parametric import FrozenIndex, LateParametricRetriever
from rlrag.retrieval.vocabulary.bag_of_tokens import open_bag_of_tokens
from rlrag.retrieval.vocabulary.encoder import TOP_K, VocabularyEncoder
from rlrag.retrieval.vocabulary.semi_parametric import (
    SemiParametricRetriever,
    open_vocabulary_vectors,
    vocabulary_manifest,
)
from rlrag.retrieval.words import split_words

RESULTS_FILE = Path(__file__).parents[1] / "results" / "retrieval.md"
TARGET_RATIO = 0.5
_NUM_TURNS = 11
_NUM_HITS = 20


@dataclass(frozen=True)
class Speed:
    """Questions a second of both searches, medians over turns, and of each turn's ratio."""

    batch: int
    ours_per_s: float
    theirs_per_s: float
    ratio: float


@dataclass(frozen=True)
class Retrieval:
    """One way to retrieve with new weights: what it took, and what it found."""

    name: str
    refresh_s: float
    search_s: float
    num_encoded: int
    hits: Hits


def search_speeds(
    corpus: Corpus, texts: Sequence[str], encoder: VocabularyEncoder, bags: Any
) -> list[Speed]:
    """Bag-of-tokens search against bm25s, one question a call and many."""
    import bm25s

    theirs = bm25s.BM25(method="lucene")
    theirs.index([split_words(passage.contents) for passage in corpus], show_progress=False)
    vectors, tokens = encoder.encode(texts, "question"), [split_words(text) for text in texts]

    def bare(start: int, end: int) -> None:
        theirs.retrieve(tokens[start:end], k=_NUM_HITS, show_progress=False)

    def ours(start: int, end: int) -> None:
        bags.search_vectors(vectors[start:end], _NUM_HITS)

    speeds = []
    for batch in (1, min(256, len(texts))):
        num_questions = min(len(texts), 64) if batch == 1 else batch
        taken: dict[Callable[[int, int], None], list[float]] = {ours: [], bare: []}
        for _ in range(_NUM_TURNS):
            for work, seconds in taken.items():
                started = time.perf_counter()
                for start in range(0, num_questions, batch):
                    work(start, start + batch)
                seconds.append(time.perf_counter() - started)
        ratios = [theirs / ours for ours, theirs in zip(taken[ours], taken[bare], strict=True)]
        per_s = [num_questions / statistics.median(taken[work]) for work in (ours, bare)]
        speeds.append(Speed(batch, per_s[0], per_s[1], statistics.median(ratios)))
    return speeds


class CountingEncoder:
    """Hands on to an encoder and counts the passages that it embeds."""

    def __init__(self, encoder: VocabularyEncoder) -> None:
        self._encoder = encoder
        self.num_passages = 0

    def embed(self, texts: Sequence[str], role: Any) -> Any:
        """Vectors of the texts."""
        self.num_passages += len(texts) if role == "passage" else 0
        return self._encoder.embed(texts, role)


def full_search(corpus: Corpus, texts: Sequence[str], encoder: VocabularyEncoder) -> Retrieval:
    """All passages encoded anew, then searched."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        manifest = vocabulary_manifest(corpus, encoder)
        passages = open_vocabulary_vectors(corpus, encoder, Path(directory) / "index", manifest)
        refreshed = time.perf_counter()
        hits = SemiParametricRetriever(encoder, passages).search(texts, _NUM_HITS)
        searched = time.perf_counter()
    return Retrieval(
        "full re-encoding", refreshed - started, searched - refreshed, len(corpus), hits
    )


def late_search(
    corpus: Corpus,
    texts: Sequence[str],
    encoder: VocabularyEncoder,
    bags: Any,
    num_first: int,
    batch: int,
) -> Retrieval:
    """A training loop's batches, each through the bags and the weights of the moment."""
    counting = CountingEncoder(encoder)
    late = LateParametricRetriever(counting, FrozenIndex(bags), corpus, num_first)
    started = time.perf_counter()
    parts = [
        late.search(texts[start : start + batch], _NUM_HITS)
        for start in range(0, len(texts), batch)
    ]
    seconds = time.perf_counter() - started
    hits = Hits(
        np.concatenate([part.rows_BK for part in parts]),
        np.concatenate([part.scores_BK for part in parts]),
    )
    return Retrieval(f"late-parametric, m = {num_first}", 0.0, seconds, counting.num_passages, hits)


def first_stage_search(texts: Sequence[str], encoder: VocabularyEncoder, bags: Any) -> Retrieval:
    """The bags alone, without embedding a passage."""
    started = time.perf_counter()
    hits = bags.search_vectors(encoder.encode(texts, "question"), _NUM_HITS)
    return Retrieval("bags alone", 0.0, time.perf_counter() - started, 0, hits)


def smaller(corpus: Corpus, questions: Sequence[Question], num_passages: int) -> Corpus:
    """The questions' gold passages and the first others, in the corpus's order."""
    gold = {corpus.row_of(each) for question in questions for each in question.gold_ids} - {None}
    others = (row for row in range(len(corpus)) if row not in gold)
    rows = [*sorted(gold)[:num_passages], *islice(others, max(0, num_passages - len(gold)))]
    return MemoryCorpus(corpus[row] for row in sorted(rows))


def recall(hits: Hits, questions: Sequence[Question], corpus: Corpus, k: int) -> float | None:
    """Share of the questions with a gold passage in the corpus that find one in the best k."""
    found = []
    for rows_K, question in zip(hits.rows_BK, questions, strict=True):
        gold = {corpus.row_of(each) for each in question.gold_ids} - {None}
        if gold:
            found.append(bool(gold & set(rows_K[:k].tolist())))
    return float(np.mean(found)) if found else None


def report(
    corpus: Corpus,
    questions: Sequence[Question],
    speeds: Sequence[Speed],
    retrievals: Sequence[Retrieval],
    options: argparse.Namespace,
) -> str:
    """The measured numbers as Markdown."""
    full = retrievals[0]
    lines = [
        "# Retrieval in vocabulary space",
        "",
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; made by "
        f"`python -m benchmarks.speed.retrieval`. Corpus `{options.corpus}`, {len(corpus):,} "
        "passages; "
        f"`{options.questions_from}`, {len(questions):,} questions; encoder `{options.encoder}`, "
        f"untrained, {TOP_K} entries kept.",
        "",
        f"Bag-of-tokens search for {_NUM_HITS} hits against bm25s's `retrieve`, in turns, medians "
        f"of {_NUM_TURNS} turns (target for the ratio: at least {TARGET_RATIO}). Both use one "
        "thread.",
        "",
        "| questions a call | bag of tokens, questions/s | bm25s, questions/s | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {each.batch} | {each.ours_per_s:.0f} | {each.theirs_per_s:.0f} | **{each.ratio:.2f}** |"
        for each in speeds
    ]
    lines += [
        "",
        f"Retrieval after the weights changed, for 1,000 questions in batches of {options.batch}. "
        "A full search is paid once a refresh and is stale at the next step; the others use the "
        "weights of each step.",
        "",
        "| retrieval | passages encoded | encoding them first, s | for 1,000 questions, s "
        f"| recall@1 | recall@5 | recall@{_NUM_HITS} | same first passage as full search |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in retrievals:
        shares = [recall(each.hits, questions, corpus, k) for k in (1, 5, _NUM_HITS)]
        same = np.mean(each.hits.rows_BK[:, 0] == full.hits.rows_BK[:, 0])
        cells = " | ".join("-" if share is None else f"{share:.3f}" for share in shares)
        lines.append(
            f"| {each.name} | {each.num_encoded:,} | {each.refresh_s:.1f} "
            f"| {each.search_s * 1000 / len(questions):.1f} | {cells} | {same:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--corpus", default=BUILTIN_CORPUS, help="corpus, in any form that data.corpus takes"
    )
    parser.add_argument("--questions-from", default=f"{BUILTIN_CORPUS}:test", help="question set")
    parser.add_argument("--questions", type=int, default=1_000, help="maximum number of questions")
    parser.add_argument("--passages", type=int, help="maximum number of passages; default: all")
    parser.add_argument(
        "--encoder",
        default=BUILTIN_VOCABULARY_ENCODER,
        help="masked language model to use as encoder",
    )
    parser.add_argument(
        "--first",
        type=int,
        nargs="+",
        default=[20, 100],
        help="numbers of first-stage passages to rerank (m)",
    )
    parser.add_argument("--batch", type=int, default=128, help="questions per training step")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/rlrag").expanduser())
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="file for the table")
    return parser.parse_args()


def main() -> int:
    """Measure, print and save; exit code 1 when the search of many questions is too slow."""
    options = _arguments()
    config = RetrievalConfig(kind="semi_parametric", vocabulary_encoder=options.encoder)
    stored = load_corpus(options.corpus, options.cache_dir, passage_words=100)
    questions = load_questions(options.questions_from, options.cache_dir).questions
    questions = questions[: options.questions]
    corpus = stored if options.passages is None else smaller(stored, questions, options.passages)
    texts = [question.question for question in questions]
    encoder = open_vocabulary_encoder(config, options.cache_dir)
    bags = open_bag_of_tokens(corpus, encoder, options.cache_dir / "indexes")
    speeds = search_speeds(corpus, texts, encoder, bags)
    retrievals = [
        full_search(corpus, texts, encoder),
        *(
            late_search(corpus, texts, encoder, bags, num_first, options.batch)
            for num_first in options.first
        ),
        first_stage_search(texts, encoder, bags),
    ]
    text = report(corpus, questions, speeds, retrievals, options)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    return 0 if speeds[-1].ratio >= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
