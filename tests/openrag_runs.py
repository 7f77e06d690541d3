"""A small task that a retriever can learn in; OpenRAG's training loop in this process out.

Every subject has a ledger, a rumour and a legend. All three speak of it alike, and the ledger alone
holds the answer. A retriever that has learnt this finds the ledgers of subjects that it never saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loop_runs import StopAfter, changed
from stand_ins import ReadingGenerator, WordPrompts

from rlrag.config import (
    DataConfig,
    OpenRAGConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.data.checks import DataReport
from rlrag.data.corpus import MemoryCorpus
from rlrag.data.questions import QuestionSet
from rlrag.generation.protocol import Generator
from rlrag.pipeline import Library, TrainingData, candidates_of
from rlrag.records import Passage, Question
from rlrag.retrieval.build import open_retrievers
from rlrag.runs.directory import RunDirectory
from rlrag.training.distributed.workers import SingleWorker, Workers
from rlrag.training.loop import TrainingLoop
from rlrag.training.openrag.offline_stage import run_offline_stage
from rlrag.training.openrag.trainer import OpenRAGTrainer
from rlrag.training.trainer import TrainerContext

SUBJECTS = (
    *(
        "lamp",
        "river",
        "stone",
        "cloud",
        "garden",
        "bridge",
        "hammer",
        "candle",
        "mirror",
        "forest",
    ),
    *("basket", "tower", "window", "carpet", "bottle", "market", "island", "ladder", "saddle"),
    "whistle",
)
KINDS = ("ledger", "rumour", "legend")
NUM_VALIDATION = 12


@dataclass(frozen=True)
class Task:
    """A corpus with its retrievers, and the candidates of the questions."""

    library: Library
    data: TrainingData


def make_corpus() -> MemoryCorpus:
    """Three passages a subject; the ledger's place among them changes."""
    passages = []
    for number, subject in enumerate(SUBJECTS):
        for place in range(len(KINDS)):
            kind = KINDS[(place + number) % len(KINDS)]
            word = f"answer{number:02d}" if kind == "ledger" else f"{kind}{number:02d}"
            text = f"the {kind} says that the {subject} holds {word}"
            passages.append(Passage(f"{subject}-{kind}", subject, text))
    return MemoryCorpus(passages)


def make_questions() -> list[Question]:
    """Two a subject; the last ones, whose subjects are theirs alone, are for validation."""
    return [
        Question(
            f"{subject}-{form}",
            text.format(subject),
            (f"answer{number:02d}",),
            {"gold_ids": [f"{subject}-ledger"], "type": subject[0]},
        )
        for number, subject in enumerate(SUBJECTS)
        for form, text in enumerate(("what does the {} hold?", "which thing has the {} got?"))
    ]


def openrag_config(cache_dir: Path, encoder_dir: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """A run that trains the dense encoder in `encoder_dir`; `sections` change single fields."""
    config = RunConfig(
        recipe="openrag",
        cache_dir=str(cache_dir),
        data=DataConfig(num_validation_questions=NUM_VALIDATION),
        retrieval=RetrievalConfig(
            kind="dense",
            encoder=str(encoder_dir),
            encoder_dtype="float32",
            encoder_max_tokens=32,
            bm25_scores=True,
            num_candidates=5,
        ),
        algorithm=OpenRAGConfig(
            num_offline=16,
            num_online=6,
            first_stage="bm25",
            offline_epochs=2,
            online_epochs=2,
            learning_rate=2e-3,
            temperature=0.1,
            micro_batch_texts=16,
        ),
        training=TrainingConfig(
            launcher="local",
            batch_size=8,
            validate_every=4,
            checkpoint_every=3,
            loggers=(),
        ),
    )
    return changed(config, **sections)


def make_task(config: RunConfig) -> Task:
    """The task, retrieved by what `config` names."""
    corpus = make_corpus()
    library = Library(corpus, open_retrievers(corpus, config.retrieval, config.cache_path))
    openrag = changed(
        config,
        retrieval={
            "num_candidates": config.openrag.num_offline if config.trains_by_openrag else 16
        },
    )
    questions = make_questions()
    train, validation = (
        candidates_of(
            library, QuestionSet.of(part, DataReport(name, len(part), len(part))), openrag
        )
        for name, part in (
            ("train", questions[:-NUM_VALIDATION]),
            ("validation", questions[-NUM_VALIDATION:]),
        )
    )
    return Task(library, TrainingData(train, validation, {}))


def prepare(config: RunConfig, task: Task, directory: Path, generator: Generator) -> None:
    """What comes before the loop: claim the directory and fill the pools."""
    run_dir = RunDirectory(directory)
    run_dir.claim(config)
    run_offline_stage(
        config, task.data.train, generator, WordPrompts(), run_dir.pools, lambda text: None
    )


def start(
    config: RunConfig,
    task: Task,
    directory: Path,
    stop_at: int | None = None,
    generator: Generator | None = None,
    workers: Workers | None = None,
) -> TrainingLoop[OpenRAGTrainer]:
    """A loop that begins a run in `directory` or continues it.

    Where several workers run, whoever launches them has prepared the directory.
    """
    workers, generator = workers or SingleWorker(), generator or ReadingGenerator()
    if workers.size == 1:
        prepare(config, task, directory, generator)

    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    run_dir = RunDirectory(directory)
    context = TrainerContext(
        config, workers, run_dir, task.library, task.data, generator, WordPrompts()
    )
    return TrainingLoop(config, OpenRAGTrainer(context), run_dir, workers, on_step)


def weights(loop: TrainingLoop[Any]) -> dict[str, torch.Tensor]:
    """Everything that is trained, the optimiser included, by file and name."""
    return {
        f"{file}/{name}": tensor.clone()
        for file, tensors in loop.trainer.tensors().items()
        for name, tensor in tensors.items()
    }


def write_files(folder: Path) -> None:
    """The corpus, and questions to train on and to evaluate with, as files."""
    passages = [{"id": p.id, "contents": p.contents} for p in make_corpus()]
    questions = [
        {
            "id": q.id,
            "question": q.question,
            "golden_answers": list(q.golden_answers),
            "metadata": {"gold_ids": list(q.gold_ids)},
        }
        for q in make_questions()
    ]
    files = {"corpus": passages, "train": questions[:30], "eval": questions[30:]}
    for name, records in files.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def small_flags(folder: Path, directory: Path) -> list[str]:
    """Flags of `jobs.train factbook` for a run of tiny models on these files."""
    flags = {
        "run-dir": directory / "run",
        "cache-dir": directory / "cache",
        "data.corpus": folder / "corpus.jsonl",
        "data.train-questions": folder / "train.jsonl",
        "data.eval-questions": folder / "eval.jsonl",
        "data.num-validation-questions": 0,
        "data.max-train-questions": None,
        "retrieval.kind": "dense",
        "retrieval.encoder": folder / "encoder",
        "retrieval.encoder-max-tokens": 32,
        "retrieval.bm25-scores": True,
        "environment.num-selected": 1,
        "generator.model": folder / "generator",
        "generator.max-new-tokens": 3,
        "training.launcher": "local",
        "training.batch-size": 8,
        "training.loggers": "",
    }
    return as_words(flags)


def gold_flags(folder: Path, directory: Path) -> list[str]:
    """The same for a retriever that is trained by relevance.

    To a generator of random weights no passage is of use.
    """
    flags = {
        "algorithm.name": "openrag",
        "algorithm.labels": "gold",
        "algorithm.num-offline": 16,
        "algorithm.num-online": 6,
        "algorithm.first-stage": "bm25",
        "algorithm.offline-epochs": 2,
        "algorithm.online-epochs": 2,
        "algorithm.temperature": 0.1,
        "algorithm.learning-rate": 2e-3,
    }
    return [*small_flags(folder, directory), *as_words(flags)]


def as_words(flags: Mapping[str, object]) -> list[str]:
    """Flags as the words of a command line; an empty value is no word."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value)) if word]
