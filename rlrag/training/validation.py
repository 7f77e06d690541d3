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
    """EM, F1 and words an answer of greedy selections, and the share of changed selections.

    Each worker answers a part of the questions; all return the mean over all of them. Repeated
    validations cost little, as unchanged selections are answered from the cache.
    """
    picks = greedy_picks(policy, candidates)
    mine = range(workers.rank, len(candidates), workers.size)
    questions = [candidates.questions[row] for row in mine]
    selections = [[candidates.passages(row)[n] for n in picks[row]] for row in mine]
    answers = [answer.text for answer in answering.answer(questions, selections)]
    scores = [
        (exact_match(a, q.golden_answers), token_f1(a, q.golden_answers), len(a.split()))
        for q, a in zip(questions, answers, strict=True)
    ]
    totals = workers.sum(torch.tensor(np.array(scores).reshape(-1, 3).sum(axis=0))).tolist()
    return {
        "validation/em": totals[0] / len(candidates),
        "validation/f1": totals[1] / len(candidates),
        "validation/answer_words": totals[2] / len(candidates),
        "validation/changed_share": float((picks != np.arange(picks.shape[1])).any(axis=1).mean()),
    }
