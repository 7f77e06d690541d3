"""Validates requests before they are sent to an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from rlrag.errors import GenerationError
from rlrag.records import Generation, Prompt, Score

Result = TypeVar("Result", Generation, Score)


def refused_lengths(
    prompts: Sequence[Prompt], num_new: Sequence[int], max_len: int | None
) -> dict[int, GenerationError]:
    """Why prompts are refused that are empty or leave no room for `num_new` tokens, by place.

    The error has both numbers and the end of the prompt.

    Example:
        >>> fits, long = (Prompt((1,) * n, "", 0) for n in (3, 5))
        >>> list(refused_lengths([fits, long], [1, 1], max_len=4))
        [1]
    """
    refused = {}
    for place, (prompt, new) in enumerate(zip(prompts, num_new, strict=True)):
        total = len(prompt.token_ids) + new
        if not prompt.token_ids:
            refused[place] = GenerationError("a prompt has no tokens; the model needs at least one")
        elif max_len is not None and total > max_len:
            refused[place] = GenerationError(
                f"prompt and answer take {total} tokens but the model reads at most {max_len}; "
                "lower prompt.max_prompt_tokens or raise generator.max_model_len "
                f"(the prompt ends with {prompt.text[-60:]!r})"
            )
    return refused


def answer_others(
    num_prompts: int,
    refused: Mapping[int, GenerationError],
    answer: Callable[[list[int]], Sequence[Result | GenerationError]],
) -> list[Result | GenerationError]:
    """The errors of refused prompts, and in the other places what `answer` gives for those.

    Example:
        >>> error = GenerationError("too long")
        >>> found = answer_others(2, {0: error}, lambda places: [Score(-1.0, 1, 3) for _ in places])
        >>> found[0], found[1].logp
        (GenerationError('too long'), -1.0)
    """
    others = [place for place in range(num_prompts) if place not in refused]
    answered = dict(zip(others, answer(others), strict=True))
    return [refused[i] if i in refused else answered[i] for i in range(num_prompts)]


def check_answers(prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> None:
    """Refuse answers without tokens, and another number of answers than of prompts.

    Raises:
        GenerationError: naming the position of the empty answer, or both numbers.
    """
    if len(prompts) != len(answers):
        raise GenerationError(f"{len(prompts)} prompts but {len(answers)} answers to score")
    for position, answer in enumerate(answers):
        if not answer:
            raise GenerationError(
                f"answer {position} has no tokens, so there is nothing to score (its prompt ends "
                f"with {prompts[position].text[-60:]!r})"
            )
