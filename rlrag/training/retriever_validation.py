"""Validation of a retriever in training on held-back questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError, RlragError
from rlrag.evaluation.ranking import recall_at_k
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1
from rlrag.rewards.answering import AnsweringReward
from rlrag.training.distributed.workers import Workers
from rlrag.training.validation import unanswered

_NAMES = ("accuracy", "em", "f1", "answer_words")

Search = Callable[[Sequence[str], int], np.ndarray]
"""Corpus rows of shape (B, K) for questions."""


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
            "metadata.gold_ids, so that nothing can choose a checkpoint; give one of them, or set "
            "data.num_validation_questions to 0"
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
        raise unanswered(answers)
    metrics = {
        f"validation/{name}": total / num_answered
        for name, total in zip(_NAMES, totals, strict=True)
        if name == "answer_words" or table.has_golden_answers
    }
    if num_with_gold:
        metrics["validation/recall"] = recall / num_with_gold
    return metrics
