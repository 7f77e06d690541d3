"""The passages that a system shows the generator, with their probability and latency.

Shape letters: Q questions, T actions of the longest episode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlrag.config import EnvironmentConfig
from rlrag.environment.rollout import play_greedy
from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.protocol import Policy

NUM_TIMED = 32

Part = Callable[[Sequence[int]], object]
"""Part of a pipeline: works on the questions in these rows, and takes nothing from a cache."""


@dataclass(frozen=True)
class Picked:
    """What one system shows the generator, question by question, best first.

    `action_logp_QT` are the log-probabilities of its actions in nats, 0 beyond the end of an
    episode, None where it has no distribution. `parts` are what the system consists of, by name,
    to be timed.
    """

    selections: Sequence[Sequence[Passage]]
    action_logp_QT: np.ndarray | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)


def first_picks(candidates: CandidateTable, num_selected: int) -> Picked:
    """The retriever's first K, in its order."""
    return Picked([candidates.passages(row)[:num_selected] for row in range(len(candidates))])


def policy_picks(
    environment: EnvironmentConfig, policy: Policy, candidates: CandidateTable
) -> Picked:
    """What the policy's most probable episodes end with, and the probability of each action."""
    found = play_greedy(environment, policy, candidates)
    return Picked(found.evidence, found.logp_ET)


def seconds_per_question(part: Part, num_questions: int) -> float:
    """Mean seconds of one question when the first `NUM_TIMED` are worked on at once.

    The first question is worked on once before, untimed: it pays for what loads when first asked.
    """
    part([0])
    rows = list(range(min(num_questions, NUM_TIMED)))
    start = time.perf_counter()
    part(rows)
    return (time.perf_counter() - start) / len(rows)
