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
from rlrag.rewards.answering import distinct_answers
from rlrag.training.generator_learner import WeightedExample


def weighted_examples(
    candidates: CandidateTable,
    prompts: PromptBuilder,
    question_rows: np.ndarray,
    positions_BMK: np.ndarray,
    weights_BM: torch.Tensor,
    golden_logps_BM: np.ndarray | None = None,
) -> list[WeightedExample]:
    """One example for each selection of weight above 0, or for each of its golden answers.

    The target is a question's first golden answer and what ends it, behind the same prompt that the
    selection was rewarded with. With the log-likelihoods of the distinct golden answers behind each
    selection, every one of them is a target and shares the selection's weight in proportion to its
    likelihood. A question without a golden answer gives no example, nor does a selection whose
    prompt cannot be built: its reward failed and was counted.
    """
    examples = []
    for place, row in enumerate(question_rows.tolist()):
        question = candidates.questions[row]
        targets = [prompts.encode_target(text) for text in distinct_answers(prompts, question)]
        if not targets:
            continue
        passages = candidates.passages(row)
        for sample, weight in enumerate(weights_BM[place].tolist()):
            if weight == 0:
                continue
            try:
                prompt = prompts.build(
                    question, [passages[n] for n in positions_BMK[place, sample]]
                )
            except PromptTooLongError:
                continue
            if golden_logps_BM is None:
                examples.append(WeightedExample(prompt.token_ids, targets[0], weight))
                continue
            logps = torch.tensor(golden_logps_BM[place, sample], dtype=torch.float64)
            shares = (weight * logps.softmax(dim=0)).tolist()
            examples += [
                WeightedExample(prompt.token_ids, target, share)
                for target, share in zip(targets, shares, strict=True)
            ]
    return examples


def thinned(
    weights_BM: torch.Tensor, num: int | None, seeds: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Weights of at most `num` samples a question with the same mean; all when unset."""
    if num is None:
        return weights_BM
    counts_BM = resample(weights_BM, num, seeds)
    return weights_BM.sum(dim=1, keepdim=True) * counts_BM / num
