"""A policy and held-back questions in; how good its greedy selections are out."""

from __future__ import annotations

import numpy as np
import torch

from rlrag.evaluation.systems import greedy_picks
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import exact_match, token_f1
from rlrag.rewards.answering import AnsweringReward
from rlrag.selection.protocol import SelectionPolicy
from rlrag.training.workers import Workers


def validate(
    policy: SelectionPolicy,
    candidates: CandidateTable,
    answering: AnsweringReward,
    workers: Workers,
) -> dict[str, float]:
    """EM and F1 of greedy selections and the share of first picks that the policy changed.

    Each worker answers a part of the questions; all return the mean over all of them. Repeated
    validations cost little, as unchanged selections are answered from the cache.
    """
    picks = greedy_picks(policy, candidates)
    mine = range(workers.rank, len(candidates), workers.size)
    questions = [candidates.questions[row] for row in mine]
    selections = [[candidates.passages(row)[n] for n in picks[row]] for row in mine]
    answers = [answer.text for answer in answering.answer(questions, selections)]
    scores = [
        (exact_match(a, q.golden_answers), token_f1(a, q.golden_answers))
        for q, a in zip(questions, answers, strict=True)
    ]
    totals = workers.sum(torch.tensor(np.array(scores).reshape(-1, 2).sum(axis=0))).tolist()
    return {
        "validation/em": totals[0] / len(candidates),
        "validation/f1": totals[1] / len(candidates),
        "validation/changed_share": float((picks[:, 0] != 0).mean()),
    }
