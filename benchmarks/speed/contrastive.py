"""Throughput of contrastive training, compared with sentence-transformers.

Run `python -m benchmarks.speed.contrastive`. The package's learner and a step of
sentence-transformers train copies of one encoder on the same batches of the built-in corpus, in
turns:

    whole     every text is embedded once; `MultipleNegativesRankingLoss`
    cached    gradient caching in micro batches; `CachedMultipleNegativesRankingLoss`

Ours cuts a batch into pieces of texts of alike length, which the library pads to the longest.

Both losses are told to compare in both directions; the library halves the sum, so that ours is
twice theirs, which the table checks. Both sides use AdamW (fused, as the library's trainer does),
clipping and a linear schedule, read the same tokens and have dropout off.

The library's own trainer needs the package `datasets`, which this project does not install by
itself. Its step is written out instead: tokenise a column at a time as its collator does, loss,
backward, clip, step. That leaves out what the trainer does besides, so the library is at its best.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlrag.data.corpus import Corpus

RESULTS_FILE = Path(__file__).parents[1] / "results" / "contrastive.md"
TARGET_RATIO = 1.0
_TEMPERATURE = 0.05
_LEARNING_RATE = 2e-5
_MAX_GRAD_NORM = 1.0
_LOSS_TOLERANCE = 1e-3

Batch = tuple[list[str], list[str], list[str]]  # questions, positives, negatives


class Side(Protocol):
    """One of the two that are compared."""

    def step(self, batch: Batch, number: int) -> float:
        """Train on a batch; returns the loss before."""
        ...


class Learner:
    """The package's own learner."""

    def __init__(self, model_dir: Path, max_tokens: int, micro: int, num_steps: int) -> None:
        from rlrag.config import OpenRAGConfig, TrainingConfig
        from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder
        from rlrag.training.distributed.workers import SingleWorker
        from rlrag.training.learners.retriever import RetrieverLearner

        self._learner = RetrieverLearner(
            TrainableTextEncoder(model_dir, max_tokens),
            TrainingConfig(),
            OpenRAGConfig(
                learning_rate=_LEARNING_RATE,
                weight_decay=0.0,
                max_grad_norm=_MAX_GRAD_NORM,
                temperature=_TEMPERATURE,
                micro_batch_texts=micro,
            ),
            num_steps,
            SingleWorker(),
        )

    def step(self, batch: Batch, number: int) -> float:
        """Train on a batch; returns the loss before."""
        return self._learner.update(*batch, step=number)["retriever/loss"]


class Library:
    """A training step of sentence-transformers, as its trainer takes it."""

    def __init__(self, model_dir: Path, max_tokens: int, micro: int | None, num_steps: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses

        from rlrag.models.directories import resolve_device

        self._model = SentenceTransformer(
            str(model_dir),
            device=resolve_device("auto"),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        )
        self._model.max_seq_length = max_tokens
        for module in self._model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        arguments = {
            "scale": 1 / _TEMPERATURE,
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
        }
        self._loss = (
            losses.MultipleNegativesRankingLoss(self._model, **arguments)
            if micro is None
            else losses.CachedMultipleNegativesRankingLoss(
                self._model, mini_batch_size=micro, **arguments
            )
        )
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: max(0.0, 1 - step / num_steps)
        )

    def step(self, batch: Batch, number: int) -> float:
        """Train on a batch; returns the loss before, twice the library's own."""
        import torch

        self._model.train()
        features = [
            {
                key: value.to(self._model.device) if isinstance(value, torch.Tensor) else value
                for key, value in self._model.preprocess(column).items()
            }
            for column in batch
        ]
        loss = self._loss(features, torch.zeros(0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return 2 * loss.item()


@dataclass(frozen=True)
class Row:
    """One measured comparison; pairs are questions with their positive, a second."""

    case: str
    batch_size: int
    micro: int
    ours_per_s: float
    theirs_per_s: float
    ratio: float
    same_loss: bool


def batches(corpus: Corpus, questions: str, cache_dir: Path, size: int) -> Iterator[Batch]:
    """Endless batches in which no passage stands twice, so that both losses compare the same."""
    import numpy as np

    from rlrag.data.load import load_questions

    usable = [q for q in load_questions(questions, cache_dir).questions if q.gold_ids]
    rng = np.random.default_rng(0)
    while True:
        chosen: dict[int, str] = {}
        for number in rng.permutation(len(usable)):
            row = corpus.row_of(usable[number].gold_ids[0])
            if row is not None:
                chosen.setdefault(row, usable[number].question)
            if len(chosen) == size:
                break
        if len(chosen) < size:
            raise SystemExit(
                f"only {len(chosen)} questions have gold passages; lower the batch size"
            )
        others = [int(row) for row in rng.permutation(len(corpus)) if row not in chosen]
        yield (
            list(chosen.values()),
            [corpus[row].contents for row in chosen],
            [corpus[row].contents for row in others[:size]],
        )


def compare(
    case: str, ours: Side, theirs: Side, stream: Iterator[Batch], turns: int, steps: int, micro: int
) -> Row:
    """Train both sides in turns, the first of a turn alternating; medians over the turns."""
    warm_up = next(stream)
    losses = [side.step(warm_up, 0) for side in (ours, theirs)]
    seconds: list[list[float]] = [[], []]
    for turn in range(turns):
        taken = [next(stream) for _ in range(steps)]
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            started = time.perf_counter()
            for number, batch in enumerate(taken):
                (ours, theirs)[which].step(batch, 1 + turn * steps + number)
            seconds[which].append(time.perf_counter() - started)
    size = len(warm_up[0])
    speeds = [size * steps / statistics.median(each) for each in seconds]
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    same = abs(losses[0] - losses[1]) <= _LOSS_TOLERANCE * abs(losses[1])
    return Row(case, size, micro, *speeds, ratio, same)


def measure(options: argparse.Namespace) -> list[Row]:
    """Every case on one encoder."""
    import torch

    from rlrag.data.load import load_corpus
    from rlrag.models.directories import resolve_model

    torch.set_num_threads(options.threads)
    cache_dir = Path(options.cache_dir).expanduser()
    model_dir = resolve_model(options.model, cache_dir)
    corpus = load_corpus(options.corpus, cache_dir, options.passage_words)
    num_steps = 1 + options.turns * options.steps
    rows = []
    for case, size, micro in (
        ("whole", options.batch_size, None),
        ("cached", options.cached_batch_size, options.micro),
    ):
        own_micro = 3 * size if micro is None else micro
        ours = Learner(model_dir, options.max_tokens, own_micro, num_steps)
        theirs = Library(model_dir, options.max_tokens, micro, num_steps)
        stream = batches(corpus, options.questions, cache_dir, size)
        rows.append(compare(case, ours, theirs, stream, options.turns, options.steps, own_micro))
    return rows


def report(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The measured numbers as Markdown."""
    import sentence_transformers
    import torch

    lines = [
        "# Contrastive training: pairs a second",
        "",
        f"{platform.machine()}, {options.threads} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, sentence-transformers {sentence_transformers.__version__}; "
        "made by `python -m benchmarks.speed.contrastive`.",
        "",
        f"Encoder {options.model}, at most {options.max_tokens} tokens a text, questions "
        f"{options.questions} with one positive and one negative passage each. Medians of "
        f"{options.turns} turns of {options.steps} steps; the ratio is that of each turn, then the "
        f"median (target: at least {TARGET_RATIO}). `cached` embeds a batch in micro batches and "
        "keeps the vectors' gradients.",
        "",
        "| case | questions a batch | texts a micro batch | ours, pairs/s "
        "| sentence-transformers, pairs/s | ratio | same loss |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case} | {row.batch_size} | {row.micro} | {row.ours_per_s:.2f} "
        f"| {row.theirs_per_s:.2f} | **{row.ratio:.2f}** | {'yes' if row.same_loss else 'no'} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; exit code 1 when a ratio misses the target or a loss differs."""
    from rlrag.config import BUILTIN_CORPUS, BUILTIN_ENCODER

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=BUILTIN_ENCODER, help="name or directory of the encoder")
    parser.add_argument(
        "--corpus", default=BUILTIN_CORPUS, help="corpus, in any form that data.corpus takes"
    )
    parser.add_argument(
        "--questions",
        default=f"{BUILTIN_CORPUS}:train",
        help="questions with gold passages",
    )
    parser.add_argument("--passage-words", type=int, default=100, help="words per passage")
    parser.add_argument(
        "--max-tokens", type=int, default=160, help="maximum number of tokens per text"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="questions per batch, without gradient caching"
    )
    parser.add_argument(
        "--cached-batch-size",
        type=int,
        default=64,
        help="questions per batch, with gradient caching",
    )
    parser.add_argument(
        "--micro", type=int, default=32, help="texts per forward pass with gradient caching"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per library and repetition")
    parser.add_argument("--turns", type=int, default=7, help="repetitions of each case")
    parser.add_argument("--threads", type=int, default=2, help="compute threads")
    parser.add_argument("--cache-dir", default="~/.cache/rlrag")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="file for the table")
    options = parser.parse_args(arguments)
    rows = measure(options)
    text = report(rows, options)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 0 if all(row.same_loss and row.ratio >= TARGET_RATIO for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
