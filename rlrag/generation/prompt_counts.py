"""Counts prompt tokens and passages that did not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np

from rlrag.data.checks import MAX_CUT_SHARE
from rlrag.records import Prompt


@dataclass
class PromptCounts:
    """What was built so far, and what `prompt.max_prompt_tokens` left out of it.

    Example:
        >>> counts = PromptCounts()
        >>> counts.add(Prompt((7,) * 90, "", num_passages=1, num_cut_tokens=10), num_given=2)
        >>> counts.shares()
        {'prompt_cut_share': 0.1, 'dropped_passage_share': 0.5}
    """

    num_tokens: int = 0
    num_cut_tokens: int = 0
    num_given: int = 0
    num_dropped: int = 0

    def add(self, prompt: Prompt, num_given: int) -> None:
        """Count a prompt that was built from so many passages.

        A passage that has no text and is not shown for that counts as dropped.
        """
        self.num_tokens += len(prompt.token_ids)
        self.num_cut_tokens += prompt.num_cut_tokens
        self.num_given += num_given
        self.num_dropped += num_given - prompt.num_passages

    def values(self) -> np.ndarray:
        """The four counts, in order, to be subtracted and summed."""
        return np.array(astuple(self), np.float64)

    def shares(self) -> dict[str, float]:
        """Tokens cut of all that the passages and their prompts had, and passages not shown."""
        wanted = self.num_tokens + self.num_cut_tokens
        return {
            "prompt_cut_share": self.num_cut_tokens / max(wanted, 1),
            "dropped_passage_share": self.num_dropped / max(self.num_given, 1),
        }


def shares_of(values: np.ndarray) -> dict[str, float]:
    """`PromptCounts.shares` of summed or subtracted `values`."""
    return PromptCounts(*map(int, values)).shares()


def cut_warning(shares: Mapping[str, float]) -> str | None:
    """What to tell where more than `MAX_CUT_SHARE` of the tokens or passages was left out."""
    tokens = shares.get("prompt_cut_share", 0.0)
    passages = shares.get("dropped_passage_share", 0.0)
    if not max(tokens, passages) > MAX_CUT_SHARE:
        return None
    return (
        f"prompts had no room for {100 * tokens:.1f} % of their tokens and showed nothing of "
        f"{100 * passages:.1f} % of the passages picked: the generator answers without them. Raise "
        "generator.prompt.max_prompt_tokens, or lower data.passage_words or "
        "environment.num_selected"
    )
