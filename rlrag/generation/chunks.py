"""Cuts batches of prompts into chunks for the actors of a pool."""

from __future__ import annotations

from collections.abc import Sequence

# Even at 150 tokens a second, a slow core, a chunk takes under two minutes.
_LARGEST_TOKENS = 16_384


def plan_chunks(
    prompts: Sequence[Sequence[int]], num_workers: int, batch_size: int
) -> list[list[int]]:
    """Split prompts into chunks for workers that pull the next one when they are free.

    Prompts are sorted by their token ids, so that those with equal beginnings stay together and an
    engine computes the common part once. Chunks hold about as many tokens as half of each worker's
    fair share of what is left: large ones first, so that an engine has many sequences to
    interleave, small ones at the end, so that all workers finish together. One worker alone has
    nothing to balance and gets the largest chunks. A chunk has at least `batch_size` prompts while
    there are that many; beyond that it ends at 16,384 tokens, which bounds what is lost with a dead
    worker.

    Returns:
        Indices into `prompts`; each index occurs once. The plan depends on the arguments alone.

    Example:
        >>> plan_chunks([(7, 7), (1, 2), (7, 8), (1, 3)], num_workers=2, batch_size=1)
        [[1], [3], [0], [2]]
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    remaining = sum(len(prompt) for prompt in prompts)
    smallest = max(1, min(batch_size, -(-len(prompts) // num_workers)))
    parts = 1 if num_workers == 1 else 2 * num_workers
    chunks: list[list[int]] = []
    start = 0
    while start < len(order):
        target = min(remaining / parts, _LARGEST_TOKENS)
        size, tokens = 0, 0
        while start + size < len(order) and (size < smallest or tokens < target):
            tokens += len(prompts[order[start + size]])
            size += 1
        chunks.append(order[start : start + size])
        start += size
        remaining -= tokens
    return chunks


def parts_within(places: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Split places into runs whose lengths sum to the capacity at most; a longer one stands alone.

    Example:
        >>> parts_within([0, 2, 3, 4], [3, 9, 2, 4, 6], capacity=6)
        [[0, 2], [3], [4]]
    """
    parts: list[list[int]] = []
    total = 0
    for place in places:
        total += lengths[place]
        if not parts or total > capacity:
            parts.append([])
            total = lengths[place]
        parts[-1].append(place)
    return parts
