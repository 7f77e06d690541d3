"""Small honest stand-ins behind the package's protocols, and a task that can be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrag.data.corpus import MemoryCorpus
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weights import GeneratorWeights
from rlrag.records import Generation, Passage, Prompt, Question, Score
from rlrag.retrieval.candidates import CandidateTable

NUM_CANDIDATES = 5


class WordPrompts:
    """Builds a prompt whose text is question and passages; its token ids are hashes of words."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        text = " | ".join([*(p.contents for p in passages), question.question])
        return Prompt(tuple(text.encode()), text, len(passages))

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        return tuple(answer.strip().encode())

    encode_scored = encode_answer

    def encode_target(self, answer: str) -> tuple[int, ...]:
        return (*self.encode_answer(answer), *b"\n")


class CutPrompts(WordPrompts):
    """Counts as many tokens of passages cut as a prompt has."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        prompt = super().build(question, passages)
        return replace(prompt, num_cut_tokens=len(prompt.token_ids))


class ReadingGenerator:
    """Answers with the last word of the first passage that names the question's subject.

    It scores an answer by whether the prompt holds it, so that good selections are rewarded.
    """

    def __init__(self) -> None:
        self.identity, self.version = "reading-generator", 0
        self.tokens = TokenCount()
        self.num_calls = 0

    def load_weights(self, weights: GeneratorWeights) -> None:
        self.identity, self.version = f"reading-{weights.digest}", weights.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        self._count(prompts)
        return [
            Generation(p.text.split(" | ")[0].split()[-1], -1.0, 1, len(p.token_ids), self.version)
            for p in prompts
        ]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        self._count(prompts)
        return [
            Score(
                -0.5 if bytes(a).decode() in p.text else -6.0,
                len(a),
                len(p.token_ids),
                self.version,
            )
            for p, a in zip(prompts, answers, strict=True)
        ]

    def close(self) -> None:
        """Nothing to free."""

    def _count(self, prompts: Sequence[Prompt]) -> None:
        self.num_calls += 1
        self.tokens.spent += sum(len(p.token_ids) for p in prompts)


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
