"""Examples that the generator's M-step trains on: episodes with their importance weights.

Shape letters: B questions, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rlrag.algorithms.resampling import resample
from rlrag.errors import PromptTooLongError
from rlrag.generation.prompt_counts import PromptCounts
from rlrag.generation.prompts import PromptBuilder
from rlrag.records import Question
from rlrag.rewards.answering import distinct_answers
from rlrag.training.experience import Experience
from rlrag.training.learners.generator import WeightedExample


@dataclass
class BuiltExamples:
    """The examples of a batch, what their prompts left out, and why others could not be built."""

    examples: list[WeightedExample] = field(default_factory=list)
    prompt_counts: PromptCounts = field(default_factory=PromptCounts)
    errors: list[PromptTooLongError] = field(default_factory=list)


def weighted_examples(
    questions: Sequence[Question],
    prompts: PromptBuilder,
    experience: Experience,
    weights_BM: torch.Tensor,
) -> BuiltExamples:
    """One example for each episode of weight above 0, or for each of its golden answers.

    The target is a question's first golden answer and what ends it, behind the same prompt that the
    episode was rewarded with. With the log-likelihoods of the distinct golden answers behind each
    episode, every one of them is a target and shares the episode's weight in proportion to its
    likelihood. A question without a golden answer gives no example, nor does an episode whose
    prompt cannot be built.
    """
    built = BuiltExamples()
    trajectories, num_samples = experience.trajectories, experience.num_samples
    for place, row in enumerate(experience.question_rows.tolist()):
        question = questions[row]
        targets = [prompts.encode_target(text) for text in distinct_answers(prompts, question)]
        if not targets:
            continue
        for sample, weight in enumerate(weights_BM[place].tolist()):
            if weight == 0:
                continue
            episode = place * num_samples + sample
            try:
                prompt = prompts.build(question, trajectories.evidence[episode])
            except PromptTooLongError as error:
                built.errors.append(error)
                continue
            built.prompt_counts.add(prompt, len(trajectories.evidence[episode]))
            golden_logps = trajectories.golden_logps[episode]
            if golden_logps is None:
                built.examples.append(WeightedExample(prompt.token_ids, targets[0], weight))
                continue
            logps = torch.tensor(golden_logps, dtype=torch.float64)
            shares = (weight * logps.softmax(dim=0)).tolist()
            built.examples += [
                WeightedExample(prompt.token_ids, target, share)
                for target, share in zip(targets, shares, strict=True)
            ]
    return built


def thinned(
    weights_BM: torch.Tensor, num: int | None, seeds: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Weights of at most `num` samples a question with the same mean; all when unset."""
    if num is None:
        return weights_BM
    counts_BM = resample(weights_BM, num, seeds)
    return weights_BM.sum(dim=1, keepdim=True) * counts_BM / num
