"""A policy and candidates in; what a system shows the generator, how surely, how fast, out.

Shape letters: Q questions, K selected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlrag.evaluation.systems import greedy_picks, policy_batches
from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.protocol import SelectionPolicy

NUM_TIMED = 32

Part = Callable[[Sequence[int]], object]
"""Part of a pipeline: works on the questions in these rows, and takes nothing from a cache."""


@dataclass(frozen=True)
class Picked:
    """What one system shows the generator, question by question, best first.

    `pick_logp_QK` are the log-probabilities of its picks in nats, None where it has no
    distribution. `parts` are what the system consists of, by name, to be timed.
    """

    selections: Sequence[Sequence[Passage]]
    pick_logp_QK: np.ndarray | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)


def first_picks(candidates: CandidateTable, num_selected: int) -> Picked:
    """The retriever's first K, in its order."""
    return Picked([candidates.passages(row)[:num_selected] for row in range(len(candidates))])


def policy_picks(policy: SelectionPolicy, candidates: CandidateTable) -> Picked:
    """The policy's most probable selections, with the probability of each pick."""
    picks_QK = greedy_picks(policy, candidates)
    selections = [
        [candidates.passages(row)[position] for position in picks]
        for row, picks in enumerate(picks_QK.tolist())
    ]
    logp_QK = np.concatenate(
        [
            policy.pick_log_prob(candidates.batch(rows), picks_QK[rows])
            for rows in policy_batches(candidates)
        ]
    )
    return Picked(selections, logp_QK)


def seconds_per_question(part: Part, num_questions: int, num_timed: int = NUM_TIMED) -> float:
    """Mean seconds of one question when the first `num_timed` are worked on at once.

    The first question is worked on once before, untimed: it pays for what loads when first asked.
    """
    part([0])
    rows = list(range(min(num_questions, num_timed)))
    start = time.perf_counter()
    part(rows)
    return (time.perf_counter() - start) / len(rows)
