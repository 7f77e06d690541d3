"""An encoder's view of a corpus: what share of its tokens lies beyond the longest text read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rlrag.data.checks import MAX_CUT_SHARE
from rlrag.data.corpus import Corpus

logger = logging.getLogger(__name__)

_NUM_SAMPLED = 1_000


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
    num_sampled = min(len(corpus), _NUM_SAMPLED)
    rows = [place * len(corpus) // num_sampled for place in range(num_sampled)]
    lengths = count_tokens([corpus[row].contents for row in rows])
    num_cut = sum(max(0, length - max_tokens) for length in lengths)
    share = num_cut / max(sum(lengths), 1)
    if share > MAX_CUT_SHARE:
        logger.warning(
            "the encoder reads %d tokens of a passage: %.1f %% of the tokens of %d sampled "
            "passages, in %d of them, are not encoded; raise retrieval.encoder_max_tokens or split "
            "long passages",
            max_tokens,
            100 * share,
            num_sampled,
            sum(length > max_tokens for length in lengths),
        )
    return share
