"""Contracts of the parts that people bring, as checks for a test-suite.

Each raises `AssertionError` with what of the contract is broken. The built-in parts pass them.

Shape letters: B questions, M episodes of one question, K hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlrag.config import EnvironmentConfig
from rlrag.data.corpus import Corpus
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.environment.sample_task import sample_candidates
from rlrag.records import Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.protocol import Retriever
from rlrag.selection.protocol import Draws

_NUM_EPISODES = 4
_TOLERANCE = 1e-4  # nats


def check_policy(
    policy: Any, num_selected: int = 2, candidates: CandidateTable | None = None
) -> None:
    """Whether a policy can be trained, drawn from again and served.

    Its log-probabilities of drawn actions are those that `log_prob` gives, and have a gradient; the
    seeds of a question alone decide what is drawn for it; its most probable actions stay the same.

    Args:
        policy: A `torch.nn.Module` with the methods of `rlrag.selection.protocol.Policy`.
        num_selected: Passages that it was made to pick (K).
        candidates: What it picks from; `sample_candidates()` when unset.

    Raises:
        AssertionError: what is broken.
        EpisodeError: when it chooses what the environment does not allow.
    """
    table = sample_candidates() if candidates is None else candidates
    assert list(policy.parameters()), "the policy has no parameter that could be trained"
    rows_B = np.arange(min(3, len(table)))
    drawn = _drawn(policy, table, num_selected, rows_B)
    logp_ET = policy.log_prob(drawn)
    assert tuple(logp_ET.shape) == drawn.actions_ET.shape, (
        f"log_prob has the shape {tuple(logp_ET.shape)} for actions of {drawn.actions_ET.shape}"
    )
    assert not logp_ET[~torch.from_numpy(drawn.acts_ET)].any(), (
        "log_prob is not 0 beyond the end of an episode"
    )
    difference = np.abs(logp_ET.detach().cpu().double().numpy() - drawn.logp_ET).max()
    assert difference < _TOLERANCE, (
        f"act and log_prob differ by {difference:.2g} nats about the same actions"
    )
    policy.zero_grad()
    logp_ET.sum().backward()
    gradients = [p.grad for p in policy.parameters() if p.requires_grad and p.grad is not None]
    assert gradients, "log_prob has no gradient in any parameter"
    assert all(g.isfinite().all() for g in gradients), "the gradient of log_prob is not finite"
    policy.zero_grad()
    again = _drawn(policy, table, num_selected, rows_B)
    assert np.array_equal(again.actions_ET, drawn.actions_ET), "equal seeds draw other actions"
    alone = _drawn(policy, table, num_selected, rows_B[-1:])
    assert [_picks(alone, e) for e in range(_NUM_EPISODES)] == [
        _picks(drawn, e) for e in range(len(drawn) - _NUM_EPISODES, len(drawn))
    ], "what is drawn for a question depends on the other questions of the batch"
    best = [_drawn(policy, table, num_selected, rows_B, greedy=True) for _ in range(2)]
    assert np.array_equal(best[0].actions_ET, best[1].actions_ET), (
        "the most probable actions change from call to call"
    )


def check_retriever(retriever: Retriever, corpus: Corpus, questions: Sequence[str]) -> None:
    """Whether a retriever ranks a corpus: distinct rows, falling scores, the same each time.

    A retriever of your own that names ids is checked as `rlrag.retrieval.plugin.PluginRetriever`.

    Args:
        retriever: The retriever of this corpus.
        corpus: At least two passages.
        questions: At least two.

    Raises:
        AssertionError: what is broken.
    """
    assert retriever.name, "the retriever has no name"
    num_hits = min(5, len(corpus))
    hits = retriever.search(questions, num_hits)
    shape = (len(questions), num_hits)
    assert hits.rows_BK.shape == hits.scores_BK.shape == shape, (
        f"search gave shapes {hits.rows_BK.shape} and {hits.scores_BK.shape}, not {shape}"
    )
    assert hits.rows_BK.dtype == np.int64, f"rows are {hits.rows_BK.dtype}, not int64"
    assert hits.scores_BK.dtype == np.float32, f"scores are {hits.scores_BK.dtype}, not float32"
    assert hits.rows_BK.min() >= 0, "a row is negative"
    assert hits.rows_BK.max() < len(corpus), "a row is beyond the corpus"
    assert all(len(set(rows.tolist())) == num_hits for rows in hits.rows_BK), "a row comes twice"
    assert np.isfinite(hits.scores_BK).all(), "a score is not finite"
    assert (np.diff(hits.scores_BK, axis=1) <= 0).all(), "scores rise within a ranking"
    first = retriever.search(questions[:1], num_hits)
    assert np.array_equal(first.rows_BK[0], hits.rows_BK[0]), (
        "a question is ranked otherwise when it is asked alone"
    )
    fewer = retriever.search(questions, 1)
    assert np.array_equal(fewer.rows_BK[:, 0], hits.rows_BK[:, 0]), (
        "the best passage changes with the number that is asked for"
    )


def _picks(played: Trajectories, episode: int) -> tuple[int, ...]:
    """The actions of one episode."""
    return tuple(played.actions_ET[episode][played.acts_ET[episode]].tolist())


def _drawn(
    policy: Any, table: CandidateTable, num_selected: int, rows_B: np.ndarray, greedy: bool = False
) -> Trajectories:
    seeds = [[7, int(row)] for row in rows_B]
    num_episodes = len(rows_B) * (1 if greedy else _NUM_EPISODES)
    config = EnvironmentConfig(num_selected=num_selected)
    episodes = open_episodes(config, num_episodes, table, Unrewarded())
    try:
        return play(episodes, policy, rows_B, None if greedy else Draws(seeds, _NUM_EPISODES))
    finally:
        episodes.close()
