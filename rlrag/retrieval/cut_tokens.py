"""Measures how much of a corpus is truncated at a model's maximum text length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlrag.data.checks import MAX_CUT_SHARE
from rlrag.data.corpus import Corpus

logger = logging.getLogger(__name__)

_NUM_SAMPLED = 1_000


@dataclass(frozen=True)
class CutTokens:
    """What of some passages lies beyond the longest text that a model reads.

    `share` is that of all their tokens, from 0 to 1, and `num_passages` counts those that are
    longer than `max_tokens`.
    """

    max_tokens: int
    num_sampled: int
    num_passages: int
    share: float

    def warning(
        self, reader: str = "the encoder", setting: str = "retrieval.encoder_max_tokens"
    ) -> str | None:
        """What to tell where it is over 1 %: who does not read it, and what to raise."""
        if self.share <= MAX_CUT_SHARE:
            return None
        return (
            f"{reader} reads {self.max_tokens} tokens of a passage: {100 * self.share:.1f} % of "
            f"the tokens of {self.num_sampled} sampled passages, in {self.num_passages} of them, "
            f"are not read; raise {setting} or split long passages"
        )


def count_cut(lengths: Sequence[int], max_tokens: int) -> CutTokens:
    """What of passages of these lengths, in tokens, is not read.

    Example:
        >>> count_cut([4, 10, 6], max_tokens=5)
        CutTokens(max_tokens=5, num_sampled=3, num_passages=2, share=0.3)
    """
    num_cut = sum(max(0, length - max_tokens) for length in lengths)
    num_passages = sum(length > max_tokens for length in lengths)
    return CutTokens(max_tokens, len(lengths), num_passages, num_cut / max(sum(lengths), 1))


def sampled_texts(corpus: Corpus) -> list[str]:
    """Up to 1,000 passages with their titles, spread evenly over the corpus."""
    num_sampled = min(len(corpus), _NUM_SAMPLED)
    rows = [place * len(corpus) // num_sampled for place in range(num_sampled)]
    return [corpus[row].contents for row in rows]


def cut_share(
    corpus: Corpus, count_tokens: Callable[[Sequence[str]], list[int]], max_tokens: int
) -> float:
    """Share of the passages' tokens that an encoder does not read, from 0 to 1.

    It is that of up to 1,000 passages, spread evenly over the corpus. Over 1 % is a warning.

    Args:
        corpus: Its passages are read with their titles.
        count_tokens: Counts the tokens of texts.
        max_tokens: How many of a text are read.
    """
    cut = count_cut(count_tokens(sampled_texts(corpus)), max_tokens)
    if warning := cut.warning():
        logger.warning("%s", warning)
    return cut.share
