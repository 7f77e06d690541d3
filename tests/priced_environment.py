"""A third party's environment: each passage costs, and a passage that is read is gone.

An episode is as long as the agent likes. What it reads is replaced by an empty slot, so that the
candidates change; reading what the question needs gives 1, any reading costs `PRICE`. The best
agent reads exactly the passages that share a word with the question, then stops.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable

PRICE = 0.4
ID = "priced_environment:tests/Priced-v0"


class PricedEnv(gymnasium.Env[dict[str, Any], np.int64]):
    """Read passages, one at a time, or stop."""

    def __init__(self, candidates: CandidateTable) -> None:
        self._table = candidates
        self._size = candidates.num_candidates
        shape = (self._size, candidates.scores_QNC.shape[2])
        self.action_space = spaces.Discrete(self._size + 1)
        self.observation_space = spaces.Dict(
            {
                "retriever_scores": spaces.Box(-1e9, 1e9, shape, dtype=np.float32),
                "action_mask": spaces.Box(0, 1, (self._size + 1,), dtype=np.int8),
                "num_read": spaces.Box(0, self._size, (1,), dtype=np.int64),
            }
        )
        self._row = 0
        self._read: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self._row, self._read = int((options or {})["question_row"]), []
        return self._observe(), self._info()

    def step(self, action):
        passages = self._table.passages(self._row)
        if action == self._size:
            evidence = tuple(passages[n] for n in self._read)
            return self._observe(), 0.0, True, False, self._info() | {"evidence": evidence}
        self._read.append(int(action))
        reward = float(needed(self._table, self._row)[action]) - PRICE
        return self._observe(), reward, False, False, self._info()

    def _observe(self) -> dict[str, np.ndarray]:
        mask = np.ones(self._size + 1, dtype=np.int8)
        mask[self._read] = 0
        return {
            "retriever_scores": self._table.scores_QNC[self._row].astype(np.float32),
            "action_mask": mask,
            "num_read": np.array([len(self._read)]),
        }

    def _info(self) -> dict[str, Any]:
        question = self._table.questions[self._row]
        contents = [passage.contents for passage in self._table.passages(self._row)]
        shown = tuple("" if n in self._read else text for n, text in enumerate(contents))
        return {
            "question_id": question.id,
            "question": question.question,
            "passages": shown,
            "golden_answers": question.golden_answers,
        }


def needed(table: CandidateTable, row: int) -> list[bool]:
    """Which candidates share a word with their question."""
    words = set(table.questions[row].question.split())
    return [bool(words & set(p.text.split())) for p in table.passages(row)]


def passage(id_: str, words: str) -> Passage:
    return Passage(id_, "", words)


gymnasium.register("tests/Priced-v0", entry_point=PricedEnv)
