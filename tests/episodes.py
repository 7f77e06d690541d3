"""Batches of candidates played as episodes: what a policy draws, prefers and finds probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from rlrag.config import EnvironmentConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play, play_greedy, replay
from rlrag.errors import RlragError
from rlrag.records import Passage, Question, Trajectories
from rlrag.retrieval.candidates import CandidateBatch, CandidateTable
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.selection.protocol import Draws, Policy, Seed
from rlrag.training.dro.batch import RewardedBatch


class Drawn(NamedTuple):
    """M episodes of each of B questions."""

    positions_BMK: np.ndarray
    logp_BM: np.ndarray
    log_weights_BM: np.ndarray


def table_of(batch: CandidateBatch) -> CandidateTable:
    """A table with these candidates, each question with passages of its own."""
    num_questions, num_candidates = batch.scores_BNC.shape[:2]
    passages = []
    for b, texts in enumerate(batch.passage_texts):
        for n, contents in enumerate(texts):
            title, newline, text = contents.partition("\n")
            title, text = (title, text) if newline else ("", contents)
            passages.append(Passage(f"p{b}-{n}", title, text))
    return CandidateTable(
        questions=tuple(Question(f"q{b}", q, ()) for b, q in enumerate(batch.question_texts)),
        corpus=MemoryCorpus(passages),
        rows_QN=np.arange(num_questions * num_candidates).reshape(num_questions, -1),
        scores_QNC=batch.scores_BNC,
        score_names=tuple(f"score {c}" for c in range(batch.scores_BNC.shape[2])),
        question_vectors_QD=batch.question_vectors_BD,
        passage_vectors_PD=batch.passage_vectors_BND.reshape(num_questions * num_candidates, -1),
    )


def sample(
    policy: Policy,
    batch: CandidateBatch,
    num_samples: int,
    seeds: Sequence[Seed],
    temperature: float = 1.0,
    replacement: bool = True,
) -> Drawn:
    """What a policy draws in episodes of its own number of picks."""
    draws = Draws(seeds, num_samples, temperature, replacement)
    config = EnvironmentConfig(num_selected=policy.num_selected)
    episodes = open_episodes(config, len(batch) * num_samples, table_of(batch), Unrewarded())
    found = play(episodes, policy, np.arange(len(batch)), draws)
    return Drawn(
        found.actions_ET.reshape(len(batch), num_samples, -1),
        found.logp_E.reshape(len(batch), -1),
        found.log_weights_E.reshape(len(batch), -1),
    )


def picks(policy: Policy, table: CandidateTable, num_selected: int | None = None) -> np.ndarray:
    """The policy's most probable picks for each question of a table, shape (Q, K)."""
    config = EnvironmentConfig(num_selected=num_selected or policy.num_selected)
    return play_greedy(config, policy, table).actions_ET


def replayed(batch: CandidateBatch, positions_BMK: np.ndarray) -> Trajectories:
    """Episodes with these picks."""
    _, num_samples, num_picks = positions_BMK.shape
    return replay(
        EnvironmentConfig(num_selected=num_picks),
        table_of(batch),
        np.repeat(np.arange(len(batch)), num_samples),
        positions_BMK.reshape(-1, num_picks),
    )


def pick_log_prob(policy: Policy, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
    """Log-probability of each pick given those before it, shape (B, M, K)."""
    return policy.log_prob(replayed(batch, positions_BMK)).view(positions_BMK.shape)


def log_prob(policy: Policy, batch: CandidateBatch, positions_BMK: np.ndarray) -> torch.Tensor:
    """Log-probability of whole selections, shape (B, M)."""
    return pick_log_prob(policy, batch, positions_BMK).sum(dim=-1)


def greedy(policy: Policy, batch: CandidateBatch) -> np.ndarray:
    """The most probable pick at every step, shape (B, K)."""
    config = EnvironmentConfig(num_selected=policy.num_selected)
    return play_greedy(config, policy, table_of(batch)).actions_ET


class GivenLogits(torch.nn.Module):
    """The same logits whatever the candidates are: a row a question."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return self.logits


def log_prob_of(logits: torch.Tensor, positions_BMK: torch.Tensor) -> torch.Tensor:
    """Log-probability of selections by logits of shape (B, N) or (B, K, N), shape (B, M)."""
    policy = PlackettLucePolicy(GivenLogits(logits), positions_BMK.shape[2])
    return log_prob(policy, blank_batch(len(logits), logits.shape[-1]), positions_BMK.numpy())


def blank_batch(num_questions: int, num_candidates: int) -> CandidateBatch:
    """Questions that differ in their text alone."""
    return CandidateBatch(
        tuple(f"{b}?" for b in range(num_questions)),
        (("",) * num_candidates,) * num_questions,
        np.zeros((num_questions, num_candidates, 1), dtype=np.float32),
        np.zeros((num_questions, 0), dtype=np.float32),
        np.zeros((num_questions, num_candidates, 0), dtype=np.float32),
    )


def experience(
    table: CandidateTable,
    question_rows: Sequence[int] | np.ndarray,
    positions: np.ndarray | Sequence,
    rewards: np.ndarray | Sequence,
    behaviour_logp: np.ndarray | None = None,
    log_weights: np.ndarray | None = None,
    errors: Sequence[RlragError] = (),
    version: int = 0,
) -> RewardedBatch:
    """Episodes with these picks (B, M, K) and rewards (B, M).

    Unless they are given, they were drawn evenly from nowhere and all weigh 1/M. The errors say, in
    their order, why rewards are NaN.
    """
    positions_BMK = np.array(positions)
    rewards_BM = torch.as_tensor(rewards, dtype=torch.float64).numpy()
    num_samples, num_picks = positions_BMK.shape[1:]
    found = replay(
        EnvironmentConfig(num_selected=num_picks),
        table,
        np.repeat(np.asarray(question_rows), num_samples),
        positions_BMK.reshape(-1, num_picks),
    )
    logp_ET = np.zeros((rewards_BM.size, num_picks), dtype=np.float32)
    if behaviour_logp is not None:
        logp_ET[:, 0] = np.asarray(behaviour_logp).ravel()
    even = np.full(rewards_BM.shape, -np.log(num_samples))
    waiting = iter(errors)
    trajectories = replace(
        found,
        logp_ET=logp_ET,
        log_weights_E=np.asarray(even if log_weights is None else log_weights).ravel(),
        rewards_E=rewards_BM.ravel(),
        terms={"answer_logp": rewards_BM.ravel()},
        errors=tuple(
            next(waiting, None) if np.isnan(reward) else None for reward in rewards_BM.ravel()
        ),
    )
    return RewardedBatch(trajectories, num_samples, version, version)
