"""Flags of a quick `python -m jobs.train` on a tiny model, and what its records have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiny_models import save_tiny_llama

from rlrag.data.sample import sample_corpus, sample_questions

NUM_STEPS = 30


def tiny_flags(directory: Path) -> list[str]:
    """Write the built-in sample and a tiny model there; flags for `NUM_STEPS` quick steps."""
    records = {
        "corpus": [{"id": p.id, "contents": p.contents} for p in sample_corpus()],
        "questions": [
            {
                "id": q.id,
                "question": q.question,
                "golden_answers": q.golden_answers,
                "metadata": dict(q.metadata),
            }
            for q in sample_questions()
        ],
    }
    for name, lines in records.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    values = {
        "data.corpus": directory / "corpus.jsonl",
        "data.train-questions": directory / "questions.jsonl",
        "data.eval-questions": directory / "questions.jsonl",
        "data.num-validation-questions": 5,
        "data.max-train-questions": None,
        "data.max-eval-questions": 8,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "retrieval.num-candidates": 6,
        "environment.num-selected": 2,
        "generator.backend": "transformers",
        "generator.dtype": "float32",
        "generator.model": save_tiny_llama(directory / "model"),
        "generator.max-new-tokens": 4,
        "generator.num-actors": 1,
        "training.batch-size": 4,
        "training.num-epochs": 6,
        "training.learning-rate": 2e-3,
        "training.validate-every": 6,
        "training.checkpoint-every": 3,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["--training.loggers", *flags]


HOP_FLAGS = (
    *("--environment.id", "rlrag/DocumentHops-v1", "--environment.hops.num-first", "2"),
    *("--environment.hops.num-revealed", "2", "--environment.hops.num-hits", "2"),
    *("--environment.hops.writers", "title", "--environment.hops.pick-cost", "0.1"),
    *("--selector.kind", "slots", "--selector.may-stop", "True"),
    *("--algorithm.baseline", "prefix", "--algorithm.entropy-weight", "0.02"),
)
"""For the same program with episodes that hop and search."""


def without_clocks(metrics: Sequence[Mapping[str, float]], *others: str) -> list[dict[str, float]]:
    """The records without what differs from run to run."""
    return [
        {k: v for k, v in line.items() if not k.endswith("_s") and k not in others}
        for line in metrics
    ]
