"""Environment steps a second where the pool grows: `rlrag/DocumentHops-v1` on one core.

Run `python -m benchmarks.speed.hops`. Random agents pick, hop and search in a made-up corpus with
a random graph. The retriever answers from memory and the reward is a constant, so that what is
timed is the environment: masks, hops, pools, observations, texts, and its restarts. Choosing the
actions is left out. Times are those of the thread on its core (`time.thread_time`), so that other
work on the machine does not count.

A step is an action of one episode; those that only restart an episode are not counted, but timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlrag.config import HopSettings
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_hops import DocumentHopsVectorEnv
from rlrag.environment.rollout import Unrewarded
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Hits
from rlrag.selection.slot_features import EDGE_KINDS

RESULTS_FILE = Path(__file__).parents[1] / "results" / "hops.md"
TARGET_STEPS_PER_S = 20_000
TARGET_EPISODES = 1_024

_NUM_PASSAGES, _NUM_QUESTIONS, _NUM_WORDS = 5_000, 32, 60
_NUM_SLOTS, _NUM_FIRST, _NUM_SELECTED = 32, 10, 4
_MOST_TURNS = 500  # of a part; one episode needs no more for a steady figure
_SETTINGS = HopSettings(
    num_slots=_NUM_SLOTS, num_first=_NUM_FIRST, num_revealed=5, num_hits=5, max_queries=2
)


@dataclass(frozen=True)
class _Near:
    rows: np.ndarray
    kinds: np.ndarray
    weights: np.ndarray


class RandomGraph:
    """So many random edges for each passage, and no named titles."""

    def __init__(self, num_edges: int) -> None:
        rng = np.random.default_rng(0)
        shape = (_NUM_PASSAGES, num_edges)
        self._rows = rng.integers(_NUM_PASSAGES, size=shape)
        self._kinds = rng.integers(len(EDGE_KINDS), size=shape).astype(np.int8)
        self._weights = rng.random(shape, dtype=np.float32)

    def neighbours(self, row: int) -> _Near:
        """The edges of a passage."""
        return _Near(self._rows[row], self._kinds[row], self._weights[row])

    def named_in(self, text: str) -> np.ndarray:
        """No passage."""
        return np.zeros(0, dtype=np.int64)


class FreeRetriever:
    """Answers each query with a line of a table, and counts how often it is asked."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self._rows = rng.integers(_NUM_PASSAGES, size=(4 * TARGET_EPISODES, _SETTINGS.num_hits))
        self._scores = np.ones(self._rows.shape, dtype=np.float32)
        self.num_calls = 0

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """Some rows for each query."""
        self.num_calls += 1
        lines = [zlib.crc32(query.encode()) % len(self._rows) for query in questions]
        return Hits(self._rows[lines, :k], self._scores[lines, :k])


class TitleWriter:
    """Asks the question with the title of a pick."""

    needs_pick = True

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """A query for each episode of the call."""
        asked = zip(questions, chosen, strict=True)
        return [None if pick is None else f"{q.question} {pick.title}" for q, pick in asked]


class CountWriter:
    """Asks the question with the number of picks."""

    needs_pick = False

    def write(
        self,
        questions: Sequence[Question],
        picks: Sequence[Sequence[Passage]],
        chosen: Sequence[Passage | None],
    ) -> list[str | None]:
        """A query for each episode of the call."""
        return [f"{q.question} {len(p)}" for q, p in zip(questions, picks, strict=True)]


def made_up_table(vector_size: int) -> CandidateTable:
    """Questions and passages of random words, with random first hits."""
    rng = np.random.default_rng(2)
    words = np.array([f"word{i}" for i in range(2_000)])
    passages = [
        Passage(f"p{i}", f"title {i}", " ".join(words[rng.integers(len(words), size=_NUM_WORDS)]))
        for i in range(_NUM_PASSAGES)
    ]
    questions = [
        Question(f"q{i}", " ".join(words[rng.integers(len(words), size=12)]), ("word1",))
        for i in range(_NUM_QUESTIONS)
    ]
    rows = np.stack(
        [rng.choice(_NUM_PASSAGES, _NUM_FIRST, replace=False) for _ in range(_NUM_QUESTIONS)]
    )
    scores = -np.sort(-rng.random((_NUM_QUESTIONS, _NUM_FIRST, 1), dtype=np.float32), axis=1)
    return CandidateTable(
        questions=tuple(questions),
        corpus=MemoryCorpus(passages),
        rows_QN=rows,
        scores_QNC=scores,
        score_names=("bm25",),
        question_vectors_QD=rng.standard_normal((_NUM_QUESTIONS, vector_size), dtype=np.float32),
        passage_vectors_PD=rng.standard_normal((_NUM_PASSAGES, vector_size), dtype=np.float32),
    )


class Agents:
    """Random allowed actions; they stop one time in twenty, and search one time in four."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(3)

    def actions(self, mask_BA: np.ndarray) -> np.ndarray:
        """An allowed action for each episode."""
        weight_BA = mask_BA * self._rng.random(mask_BA.shape, dtype=np.float32)
        searches_B = self._rng.random(len(mask_BA)) < 0.25
        weight_BA[:, _NUM_SLOTS:-1] *= np.where(searches_B, 10.0, 1e-3)[:, None]
        weight_BA[:, -1] *= np.where(self._rng.random(len(mask_BA)) < 0.05, 100.0, 1e-6)
        return weight_BA.argmax(axis=1)


@dataclass(frozen=True)
class Row:
    """One measured number of episodes."""

    num_episodes: int
    vector_size: int
    steps_per_s: float
    num_searches: int
    num_turns_with_search: int
    num_calls: int


def measure(num_episodes: int, vector_size: int, num_edges: int, turns: int, warm_up: int) -> Row:
    """Play `turns` turns of `num_episodes` episodes; times are medians of five parts.

    The `warm_up` turns before fill the caches of texts and neighbours and are not timed.
    """
    retriever = FreeRetriever()
    env = DocumentHopsVectorEnv(
        num_episodes,
        candidates=made_up_table(vector_size),
        reward=Unrewarded(),
        num_selected=_NUM_SELECTED,
        edges=RandomGraph(num_edges),
        retriever=retriever,
        writers=(TitleWriter(), CountWriter()),
        settings=_SETTINGS,
    )
    agents = Agents()
    observations, _ = env.reset(seed=0)
    over_B = np.zeros(num_episodes, dtype=np.bool_)
    speeds, num_searches, with_search = [], 0, 0
    for part in range(6):
        num_steps, seconds = 0, 0.0
        for _ in range(turns if part else warm_up):
            actions_B = agents.actions(observations["action_mask"])
            acts_B = ~over_B
            searches = acts_B & (actions_B >= _NUM_SLOTS)
            searches &= actions_B < observations["action_mask"].shape[1] - 1
            num_searches += int(searches.sum())
            with_search += bool(searches.any())
            started = time.thread_time()
            observations, _, over_B, _, _ = env.step(actions_B)
            seconds += time.thread_time() - started
            num_steps += int(acts_B.sum())
        if part:
            speeds.append(num_steps / seconds)
    return Row(
        num_episodes,
        vector_size,
        statistics.median(speeds),
        num_searches,
        with_search,
        retriever.num_calls,
    )


def report(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The table as Markdown."""
    lines = [
        "# Environment steps a second with hops and searches",
        "",
        f"{platform.machine()}, processor time of one thread, Python {platform.python_version()}, "
        f"NumPy {np.__version__}; made by `python -m benchmarks.speed.hops`.",
        "",
        f"`rlrag/DocumentHops-v1`, {_NUM_SLOTS} slots, {_NUM_FIRST} first hits, at most "
        f"{_NUM_SELECTED} picks that reveal up to {_SETTINGS.num_revealed} of "
        f"{options.edges} neighbours, and {_SETTINGS.max_queries} searches of "
        f"{_SETTINGS.num_hits} hits by two query writers; random agents, no language model, a "
        "retriever that answers from memory. Medians of 5 parts, restarts included (target: at "
        f"least {TARGET_STEPS_PER_S:,} steps a second at {TARGET_EPISODES:,} episodes, and one "
        "call of the retriever for each turn in which anybody searches).",
        "",
        "| episodes | vector length | steps/s | µs a step | searches | turns with a search | "
        "retriever calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.num_episodes:,} | {row.vector_size} | **{row.steps_per_s:,.0f}** | "
            f"{1e6 / row.steps_per_s:.1f} | {row.num_searches:,} | "
            f"{row.num_turns_with_search:,} | {row.num_calls:,} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Time DocumentHops-v1 on one core.")
    parser.add_argument("--episodes", type=int, nargs="+", default=[1, 64, TARGET_EPISODES])
    parser.add_argument("--vector-sizes", type=int, nargs="+", default=[0, 384])
    parser.add_argument("--edges", type=int, default=30, help="of a passage")
    parser.add_argument("--steps", type=int, default=10_240, help="of all episodes, in a part")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="where the table goes")
    options = parser.parse_args(arguments)
    rows = []
    for vector_size in options.vector_sizes:
        for num_episodes in options.episodes:
            turns = min(_MOST_TURNS, max(10, options.steps // num_episodes))
            warm_up = max(60, 3 * turns)
            rows.append(measure(num_episodes, vector_size, options.edges, turns, warm_up))
    text = report(rows, options)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    fast = all(
        row.steps_per_s >= TARGET_STEPS_PER_S for row in rows if row.num_episodes >= TARGET_EPISODES
    )
    one_call = all(row.num_calls == row.num_turns_with_search for row in rows)
    return 0 if fast and one_call else 1


if __name__ == "__main__":
    sys.exit(main())
