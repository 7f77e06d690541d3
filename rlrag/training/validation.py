"""Validates a policy or a retriever on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rlrag.config import EnvironmentConfig
from rlrag.data.corpus import Corpus
from rlrag.environment.rollout import play_greedy
from rlrag.errors import DataError, GenerationError, RlragError
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.ranking import recall_at_k
from rlrag.evaluation.systems import answered_with, choices_of
from rlrag.records import Generation, Trajectories
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1
from rlrag.rewards.answering import AnsweringReward
from rlrag.selection.protocol import Policy
from rlrag.training.distributed.workers import Workers

_NAMES = ("accuracy", "em", "f1", "answer_words")

Search = Callable[[Sequence[str], int], np.ndarray]
"""Corpus rows of shape (B, K) for questions."""


def validate(
    environment: EnvironmentConfig,
    policy: Policy,
    candidates: CandidateTable,
    answering: AnsweringReward,
    workers: Workers,
    by_reward: bool = False,
) -> dict[str, Any]:
    """EM, F1 and words an answer of greedy episodes, and how these differ from the retriever's.

    Where a policy treats nearly all questions alike and not as the retriever does,
    `constant_policy` says how.

    EM and F1 are left out where no question has golden answers. With `by_reward` the mean reward is
    there too. A question that could not be answered, by the generator or for lack of room in the
    prompt, or rewarded where that is asked for, does not count.

    Each worker answers a part of the questions; all return the mean over all of them. Repeated
    validations cost little, as unchanged selections are answered from the cache.
    """
    played = play_greedy(environment, policy, candidates)
    evidence = played.evidence
    mine = range(workers.rank, len(candidates), workers.size)
    questions = [candidates.questions[row] for row in mine]
    answered = answered_with(answering, questions, [evidence[row] for row in mine], by_reward)
    rewards = answered.rewards_Q if answered.rewards_Q is not None else np.zeros(len(questions))
    scores = [
        (
            exact_match(answer.text, question.golden_answers),
            token_f1(answer.text, question.golden_answers),
            len(answer.text.split()),
            reward,
            1,
        )
        for question, answer, reward in zip(questions, answered.answers, rewards, strict=True)
        if not isinstance(answer, RlragError)
    ]
    *sums, num_answered = workers.sum(
        torch.tensor(np.array(scores, dtype=np.float64).reshape(-1, 5).sum(axis=0))
    ).tolist()
    if not num_answered:
        raise _unanswered(answered.answers)
    em, f1, words, reward = (total / num_answered for total in sums)
    choices = choices_of(evidence, candidates, environment.num_selected)
    return {
        **({"validation/em": em, "validation/f1": f1} if candidates.has_golden_answers else {}),
        **({"validation/reward": reward} if by_reward else {}),
        "validation/answer_words": words,
        **(_describe_paths(played, candidates) if environment.looks_further else {}),
        **(describe_choices(choices) if choices else {}),
    }


def _describe_paths(played: Trajectories, candidates: CandidateTable) -> dict[str, float]:
    """Mean picks and searches, and the share of questions with all gold passages, where known."""
    picked = [{passage.id for passage in found} for found in played.evidence]
    searches = [
        sum(turn.action == "search" for turn in path.turns()) for path in played.paths if path
    ]
    gold = [
        set(question.gold_ids) <= found
        for question, found in zip(candidates.questions, picked, strict=True)
        if question.gold_ids
    ]
    return {
        "validation/picks": float(np.mean([len(found) for found in played.evidence])),
        "validation/searches": float(np.mean(searches)) if searches else 0.0,
        **({"validation/all_gold": float(np.mean(gold))} if gold else {}),
    }


def describe_choices(choices: Choices) -> dict[str, Any]:
    """Shares of selections that differ from the retriever's, and what is constant about them."""
    changed = choices.num_other_set + choices.num_other_order
    found: dict[str, Any] = {
        "validation/changed_share": changed / choices.num_questions,
        "validation/other_set_share": choices.num_other_set / choices.num_questions,
    }
    if choices.constant is not None and not choices.keeps_order:
        found["constant_policy"] = choices.constant
    return found


def best_retriever_by(validation: CandidateTable | None) -> str:
    """The validation metric that chooses a retriever: contained answers, or else recall."""
    known = validation is None or validation.has_golden_answers
    return "validation/accuracy" if known else "validation/recall"


def validate_retriever(
    table: CandidateTable,
    search: Search,
    corpus: Corpus,
    answering: AnsweringReward,
    num_shown: int,
    workers: Workers,
) -> dict[str, float]:
    """Accuracy, EM, F1 and words of answers from the first `num_shown` passages, and their recall.

    The first three are left out where no question has golden answers. A question that could not be
    answered does not count. Each worker answers a part of the questions; all return the mean over
    all of them.

    Raises:
        DataError: when the questions have neither golden answers nor gold passages.
        RlragError: why, when no question could be answered.
    """
    if not table.has_golden_answers and not any(q.gold_ids for q in table.questions):
        raise DataError(
            f"none of the {len(table)} validation questions has golden_answers or "
            "metadata.gold_ids, so the best checkpoint cannot be chosen; add one of them, or "
            "set data.num_validation_questions to 0"
        )
    mine = range(workers.rank, len(table), workers.size)
    questions = [table.questions[row] for row in mine]
    rows_BK = search([question.question for question in questions], num_shown)
    selections = [[corpus[int(row)] for row in found] for found in rows_BK]
    answers = answering.answer(questions, selections)
    sums = np.zeros(len(_NAMES) + 3)
    for question, selection, answer in zip(questions, selections, answers, strict=True):
        if isinstance(answer, RlragError):
            continue
        text, golden, gold_ids = answer.text, question.golden_answers, question.gold_ids
        ids = [passage.id for passage in selection]
        sums += (
            answer_contained(text, golden),
            exact_match(text, golden),
            token_f1(text, golden),
            len(text.split()),
            1,
            recall_at_k(ids, gold_ids, num_shown) if gold_ids else 0.0,
            bool(gold_ids),
        )
    totals = workers.sum(torch.from_numpy(sums)).tolist()
    *totals, num_answered, recall, num_with_gold = totals
    if not num_answered:
        raise _unanswered(answers)
    metrics = {
        f"validation/{name}": total / num_answered
        for name, total in zip(_NAMES, totals, strict=True)
        if name == "answer_words" or table.has_golden_answers
    }
    if num_with_gold:
        metrics["validation/recall"] = recall / num_with_gold
    return metrics


def _unanswered(answers: Iterable[Generation | RlragError]) -> RlragError:
    """Why no question was answered on any worker; this one may have had none."""
    elsewhere = GenerationError(
        "no held-back question could be answered; check the logs of the other workers"
    )
    return next((a for a in answers if isinstance(a, RlragError)), elsewhere)
