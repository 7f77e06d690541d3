"""A small world of hops for tests: passages in a ring with a graph, searches and query writers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_hops import DocumentHopsEnv, DocumentHopsVectorEnv
from rlrag.errors import GenerationError
from rlrag.records import Passage, Question, RewardResult
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Hits

NUM_PASSAGES = 12
PASSAGES = tuple(
    Passage(f"p{i}", f"Title {i}", f"Text word{i} word{i + 1}.") for i in range(NUM_PASSAGES)
)


@dataclass(frozen=True)
class Near:
    rows: np.ndarray
    kinds: np.ndarray
    weights: np.ndarray


class Edges:
    """Edges by passage, each (row, kind, weight); and the rows that every question names."""

    def __init__(self, edges: dict[int, list[tuple[int, int, float]]], named: list[int] = ()):
        self.edges, self.named = edges, named
        self.asked: list[int] = []

    def neighbours(self, row):
        self.asked.append(row)
        table = np.array(self.edges.get(row, []), dtype=np.float64).reshape(-1, 3)
        return Near(
            table[:, 0].astype(np.int64), table[:, 1].astype(np.int8), table[:, 2].astype("f4")
        )

    def named_in(self, text):
        return np.array(self.named, dtype=np.int64)


class Answers:
    """Answers each query from a dictionary of rows; nothing for other ones."""

    def __init__(self, rows: dict[str, list[int]] | None = None, width: int = 3) -> None:
        self.rows, self.width = rows or {}, width
        self.calls: list[list[str]] = []

    def search(self, questions, k):
        self.calls.append(list(questions))
        rows = np.full((len(questions), min(k, self.width)), -1, dtype=np.int64)
        scores = np.zeros(rows.shape, dtype=np.float32)
        for line, query in enumerate(questions):
            found = self.rows.get(query, [])[: rows.shape[1]]
            rows[line, : len(found)] = found
            scores[line, : len(found)] = 1.0 / np.arange(1, len(found) + 1)
        return Hits(rows, scores)


class OnTitle:
    """Asks for the title of a pick."""

    needs_pick = True

    def __init__(self) -> None:
        self.calls: list[int] = []

    def write(self, questions, picks, chosen):
        self.calls.append(len(questions))
        return [pick.title for pick in chosen]


class Anew:
    """Asks the question with the number of picks behind it."""

    needs_pick = False

    def write(self, questions, picks, chosen):
        return [f"{q.question} {len(p)}" for q, p in zip(questions, picks, strict=True)]


class Fixed:
    """Asks always the same."""

    def __init__(self, query: str | None, needs_pick: bool = False) -> None:
        self.query, self.needs_pick = query, needs_pick

    def write(self, questions, picks, chosen):
        return [self.query] * len(questions)


class OrderReward:
    """A reward that depends on question and order, and fails for the questions it is told to."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.calls: list[list[tuple[str, tuple[str, ...]]]] = []

    def __call__(self, questions, selections):
        asked = [(q.id, tuple(p.id for p in s)) for q, s in zip(questions, selections, strict=True)]
        self.calls.append(asked)
        return [self.one(question_id, ids) for question_id, ids in asked]

    def one(self, question_id, ids):
        if question_id in self.failing:
            return GenerationError(f"no answer for {question_id}")
        place = sum(int(name[1:]) * 10.0**-i for i, name in enumerate(ids))
        return RewardResult(place + int(question_id[1:]), {"place": place}, answer=" ".join(ids))


def make_table(num_questions: int = 4, num_candidates: int = 4, vector_size: int = 2):
    """Question q has the candidates q, q + 1, .. of a ring of passages, and falling scores."""
    generator = np.random.default_rng(0)
    rows = (np.arange(num_questions)[:, None] + np.arange(num_candidates)) % NUM_PASSAGES
    scores = -np.sort(-generator.uniform(1, 2, size=(num_questions, num_candidates, 2)), axis=1)
    return CandidateTable(
        questions=tuple(
            Question(f"q{i}", f"what about word{i} and word{i + 4}?", (f"word{i}",), metadata={})
            for i in range(num_questions)
        ),
        corpus=MemoryCorpus(PASSAGES),
        rows_QN=rows,
        scores_QNC=scores.astype(np.float32),
        score_names=("bm25", "other"),
        question_vectors_QD=generator.normal(size=(num_questions, vector_size)).astype("f4"),
        passage_vectors_PD=generator.normal(size=(NUM_PASSAGES, vector_size)).astype("f4"),
    )


def ring(step: int = 4, weight: float = 10.0) -> Edges:
    """Passage i names i + step, and shares entities with its neighbours in the ring."""
    edges: dict[int, list[tuple[int, int, float]]] = {i: [] for i in range(NUM_PASSAGES)}
    for i in range(NUM_PASSAGES):
        edges[i].append(((i + step) % NUM_PASSAGES, 0, weight))
        edges[(i + step) % NUM_PASSAGES].append((i, 1, weight / 2))
        edges[i].append(((i + 1) % NUM_PASSAGES, 3, 1.0))
        edges[(i + 1) % NUM_PASSAGES].append((i, 3, 1.0))
    return Edges(edges)


PARTS = {
    "num_selected": 3,
    "settings": {"num_first": 2, "num_slots": 8, "num_revealed": 2, "num_hits": 3},
}


def arguments(**changed):
    """Arguments of an environment of this world; `settings` are changed one by one."""
    settings = {**PARTS["settings"], **changed.pop("settings", {})}
    found = {"candidates": make_table(), "reward": OrderReward(), **PARTS, "settings": settings}
    return found | changed


def make_env(**changed) -> DocumentHopsEnv:
    return DocumentHopsEnv(**arguments(**changed))


def make_batch(num_envs: int = 3, **changed) -> DocumentHopsVectorEnv:
    return DocumentHopsVectorEnv(num_envs, autoreset_mode="Disabled", **arguments(**changed))
