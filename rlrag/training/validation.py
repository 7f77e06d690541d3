"""Validation: answers to held-back questions from the policy's most probable episodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from rlrag.config import EnvironmentConfig
from rlrag.environment.rollout import play_greedy
from rlrag.errors import GenerationError, RlragError
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.systems import answered_with, choices_of
from rlrag.records import Generation
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import exact_match, token_f1
from rlrag.rewards.answering import AnsweringReward
from rlrag.selection.protocol import Policy
from rlrag.training.distributed.workers import Workers


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
    evidence = play_greedy(environment, policy, candidates).evidence
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
        raise unanswered(answered.answers)
    em, f1, words, reward = (total / num_answered for total in sums)
    choices = choices_of(evidence, candidates, environment.num_selected)
    return {
        **({"validation/em": em, "validation/f1": f1} if candidates.has_golden_answers else {}),
        **({"validation/reward": reward} if by_reward else {}),
        "validation/answer_words": words,
        **(describe_choices(choices) if choices else {}),
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


def unanswered(answers: Iterable[Generation | RlragError]) -> RlragError:
    """Why no question was answered on any worker; this one may have had none."""
    elsewhere = GenerationError(
        "no held-back question could be answered; see the logs of the other workers"
    )
    return next((a for a in answers if isinstance(a, RlragError)), elsewhere)
