"""A generator of your own, chosen by a flag.

    python -m jobs.train factbook --run-dir runs/sentences \
        --generator.backend examples.own_generator:SentenceGenerator \
        --generator.options max_words=15 --reward.functions token_f1

It writes nothing: its answer is the sentence shown that has most words of the question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


class SentenceGenerator:
    """Answers with a sentence of the passages, cut to at most `max_words` words."""

    def __init__(self, max_words: int = 20) -> None:
        self._max_words = max_words

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
        """The answer to each prompt."""
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        # The passages stand in the lines above the question, below the examples' blank line.
        above = prompt.text.rpartition(prompt.question)[0].rpartition("\n")[0]
        shown = above.rpartition("\n\n")[2]
        sentences = re.split(r"(?<=[.!?])\s+|\n", shown)
        asked = set(words(prompt.question))
        best = max(sentences, key=lambda sentence: len(asked & set(words(sentence))))
        return " ".join(best.split()[: self._max_words])
