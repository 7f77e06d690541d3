"""Small honest stand-ins behind the package's protocols, and a task that can be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage, Prompt, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.testing.reader import ReadingGenerator as ReadingGenerator
from rlrag.testing.reader import WordPrompts

NUM_CANDIDATES = 5


class CutPrompts(WordPrompts):
    """Counts as many tokens of passages cut as a prompt has."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        prompt = super().build(question, passages)
        return replace(prompt, num_cut_tokens=len(prompt.token_ids))


def make_table(num_questions: int, seed: int = 0) -> CandidateTable:
    """Questions whose answer stands in one candidate, which a learnable direction points to."""
    rng = np.random.default_rng(seed)
    passages, questions, rows = [], [], []
    vectors = rng.normal(size=(num_questions * NUM_CANDIDATES, 8)).astype(np.float32)
    vectors[:, 0] = 0.0
    for q in range(num_questions):
        gold = int(rng.integers(NUM_CANDIDATES))
        first = len(passages)
        for n in range(NUM_CANDIDATES):
            answer = f"answer{q}" if n == gold else f"other{q}{n}"
            passages.append(Passage(f"p{q}-{n}", f"Title {q}", f"the value is {answer}"))
        vectors[first + gold, 0] = 3.0
        rows.append(list(range(first, first + NUM_CANDIDATES)))
        questions.append(
            Question(
                f"q{q}", f"what is value {q}?", (f"answer{q}",), {"gold_ids": [f"p{q}-{gold}"]}
            )
        )
    scores = -np.sort(-rng.normal(size=(num_questions, NUM_CANDIDATES, 2)), axis=1)
    return CandidateTable(
        questions=tuple(questions),
        corpus=MemoryCorpus(passages),
        rows_QN=np.array(rows),
        scores_QNC=scores.astype(np.float32),
        score_names=("dense", "bm25"),
        question_vectors_QD=np.ones((num_questions, 8), dtype=np.float32),
        passage_vectors_PD=vectors,
    )


def fill_disk(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """From now on the disk is full for this file, and for what shall replace it."""
    open_path = Path.open

    def opened(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        is_meant = path.parent == place.parent and place.name in path.name
        if is_meant and "r" not in mode:
            path.touch()
            path = Path("/dev/full")
        return open_path(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", opened)
