"""Cuts decoded text at its stop strings and derives the random seed of each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    r"""Text before the first of the stop strings, and whether there was one.

    Example:
        >>> cut_at_stop(" Paris\nQuestion: what", ("Question:", "\n"))
        (' Paris', True)
        >>> cut_at_stop(" Paris", ("\n",))
        (' Paris', False)
    """
    ends = [end for end in (text.find(mark) for mark in stop if mark) if end >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def draw_seed(seed: int, token_ids: Sequence[int]) -> int:
    """A 63-bit seed that belongs to one prompt, whatever else is in its batch.

    Example:
        >>> draw_seed(0, (5, 6)) == draw_seed(1, (5, 6))
        False
    """
    digest = hashlib.sha256(repr((seed, tuple(token_ids))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
