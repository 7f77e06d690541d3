"""Requests in, an error that names the bad one out, before an engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

from rlrag.errors import GenerationError
from rlrag.records import Prompt


def check_lengths(prompts: Sequence[Prompt], num_new: Sequence[int], max_len: int | None) -> None:
    """Refuse prompts that are empty or that leave no room for `num_new` tokens.

    Raises:
        GenerationError: with both numbers and the end of the prompt.
    """
    for prompt, new in zip(prompts, num_new, strict=True):
        if not prompt.token_ids:
            raise GenerationError("a prompt has no tokens; the model needs at least one")
        total = len(prompt.token_ids) + new
        if max_len is not None and total > max_len:
            raise GenerationError(
                f"prompt and answer take {total} tokens but the model reads at most {max_len}; "
                "lower prompt.max_prompt_tokens or raise generator.max_model_len "
                f"(the prompt ends with {prompt.text[-60:]!r})"
            )


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
