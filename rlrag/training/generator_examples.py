"""Selections with their importance weights in; what the generator's M-step trains on out.

Shape letters: B questions, M samples, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlrag.algorithms.resampling import resample
from rlrag.errors import PromptTooLongError
from rlrag.generation.prompts import PromptBuilder
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.generator_learner import WeightedExample


def weighted_examples(
    candidates: CandidateTable,
    prompts: PromptBuilder,
    question_rows: np.ndarray,
    positions_BMK: np.ndarray,
    weights_BM: torch.Tensor,
) -> list[WeightedExample]:
    """One example for each selection of weight above 0.

    The target is a question's first golden answer and what ends it, behind the same prompt that the
    selection was rewarded with. A question without one gives no example, nor does a selection whose
    prompt cannot be built: its reward failed and was counted.
    """
    examples = []
    for row, positions_MK, weights_M in zip(
        question_rows, positions_BMK, weights_BM.tolist(), strict=True
    ):
        question = candidates.questions[int(row)]
        answers = [text for text in question.golden_answers if text.strip()]
        if not answers:
            continue
        passages = candidates.passages(int(row))
        answer_ids = prompts.encode_target(answers[0])
        for positions_K, weight in zip(positions_MK, weights_M, strict=True):
            if weight == 0:
                continue
            try:
                prompt = prompts.build(question, [passages[n] for n in positions_K])
            except PromptTooLongError:
                continue
            examples.append(WeightedExample(prompt.token_ids, answer_ids, weight))
    return examples


def thinned(
    weights_BM: torch.Tensor, num: int | None, seeds: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Weights of at most `num` samples a question with the same mean; all when unset."""
    if num is None:
        return weights_BM
    counts_BM = resample(weights_BM, num, seeds)
    return weights_BM.sum(dim=1, keepdim=True) * counts_BM / num
