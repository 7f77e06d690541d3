"""The built-in reward functions.

Each is an ordinary function of keyword arguments, written as a custom reward would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rlrag.errors import RewardError
from rlrag.records import Passage
from rlrag.rewards import answer_match


def exact_match(*, answer: str, golden_answers: tuple[str, ...]) -> float:
    """1.0 if the answer equals a golden one after normalisation; see `answer_match.exact_match`."""
    return answer_match.exact_match(answer, golden_answers)


def token_f1(*, answer: str, golden_answers: tuple[str, ...]) -> float:
    """F1 of the answer's words against the best golden answer; see `answer_match.token_f1`."""
    return answer_match.token_f1(answer, golden_answers)


def answer_contained(*, answer: str, golden_answers: tuple[str, ...]) -> float:
    """1.0 if the answer contains a golden one; see `answer_match.answer_contained`."""
    return answer_match.answer_contained(answer, golden_answers)


def rouge_l(*, answer: str, golden_answers: tuple[str, ...]) -> float:
    """ROUGE-L of the answer against the best golden answer; see `answer_match.rouge_l`."""
    return answer_match.rouge_l(answer, golden_answers)


def answer_logp(*, answer_logp: float) -> float:
    """Log-probability of the golden answer given the prompt, summed over its tokens, in nats.

    With several golden answers, the likeliest.
    """
    return answer_logp


def answer_logp_mean(*, answer_logp: float, num_answer_tokens: int) -> float:
    """`answer_logp` divided by the number of tokens of that golden answer, in nats a token.

    With several golden answers, that of the largest sum, which need not have the largest mean.

    Example:
        >>> answer_logp_mean(answer_logp=-3.0, num_answer_tokens=2)
        -1.5
    """
    return answer_logp / num_answer_tokens


def selection_contains_answer(
    *, passages: tuple[Passage, ...], golden_answers: tuple[str, ...]
) -> float:
    """1.0 if a picked passage contains a golden answer, after normalisation, as whole words.

    An unanswerable question gives 1.0 iff nothing was picked.
    """
    return answer_match.passages_contain_answer(passages, golden_answers)


def selection_recall(*, selection: tuple[str, ...], metadata: Mapping[str, Any]) -> float:
    """Share of the question's gold passages (`metadata["gold_ids"]`) that were picked.

    Raises:
        RewardError: the question names no gold passages, so that a share does not exist.

    Example:
        >>> selection_recall(selection=("p4", "p1"), metadata={"gold_ids": ["p1", "p2"]})
        0.5
    """
    gold_ids = set(metadata.get("gold_ids", ()))
    if not gold_ids:
        raise RewardError(
            "the question's metadata has no gold_ids; add them or remove selection_recall "
            "from reward.functions"
        )
    return len(gold_ids.intersection(selection)) / len(gold_ids)


def selection_cost(*, selection: tuple[str, ...]) -> float:
    """Minus the number of passages picked; its weight is the price of one.

    Example:
        >>> selection_cost(selection=("p4", "p1"))
        -2.0
    """
    return float(-len(selection))


BUILTIN_REWARDS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            exact_match,
            token_f1,
            answer_contained,
            rouge_l,
            answer_logp,
            answer_logp_mean,
            selection_contains_answer,
            selection_recall,
            selection_cost,
        )
    }
)
