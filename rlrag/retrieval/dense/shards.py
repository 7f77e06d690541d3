"""Searches shards of the passage vectors and merges the results.

A part proposes its own best k rows with exact scores, so the best k of all proposals are those of
one search over everything, ties included: among equal scores the lower row comes first in either.
With an approximate index each part has one of its own, and what it overlooks stays overlooked.

Shape letters: B questions, P passages, D vector length, K hits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.errors import ConfigError
from rlrag.retrieval.dense.index import VectorIndex, open_index
from rlrag.retrieval.manifest import Manifest, damaged
from rlrag.retrieval.protocol import Hits, in_order


class Shards(Protocol):
    """Searches all parts of the vectors at once."""

    def search(self, vectors_BD: np.ndarray, k: int) -> Sequence[Hits]:
        """Each part's best `k` rows, or all its rows where it has fewer, as rows of the corpus."""
        ...


@dataclass(frozen=True)
class ShardSource:
    """Where a part's vectors and index are; all that a process elsewhere needs to open it.

    Attributes:
        vectors_file: The vectors of the whole corpus, shape (P, D).
        first: First row of the part.
        end: The row after its last one.
        config: `index`.
        index_dir: Directory of an approximate index; one of each part, built where it is missing.
        manifest: What that index is made from; None for `flat`.
    """

    vectors_file: Path
    first: int
    end: int
    config: RetrievalConfig
    index_dir: Path
    manifest: Manifest | None


class VectorShard:
    """One part, opened.

    Raises:
        IndexMismatchError: when its vectors or its index are damaged or belong to something else.
        ConfigError: when it has too few vectors for an IVF-PQ index.
    """

    def __init__(self, source: ShardSource) -> None:
        try:
            vectors_PD = np.load(source.vectors_file, mmap_mode="r")[source.first : source.end]
        except (OSError, ValueError) as error:
            raise damaged(source.vectors_file, error) from error
        index = None
        if source.manifest is not None:
            index = open_index(vectors_PD, source.config, source.index_dir, source.manifest)
        self._first = source.first
        self._num_rows = len(vectors_PD)
        self._vectors = VectorIndex(vectors_PD, source.config, index)

    def search(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """The best `k` rows, or all where there are fewer, as rows of the corpus."""
        hits = self._vectors.search_vectors(vectors_BD, min(k, self._num_rows))
        return replace(hits, rows_BK=hits.rows_BK + self._first)


def shard_sources(
    vectors_file: Path,
    num_passages: int,
    config: RetrievalConfig,
    indexes_dir: Path,
    manifest: Manifest | None,
) -> list[ShardSource]:
    """Cut a corpus into parts of consecutive rows whose sizes differ by one at most.

    Args:
        vectors_file: The vectors of all passages.
        num_passages: Passages of the corpus (P).
        config: `num_shards`, and how each is searched.
        indexes_dir: Where approximate indexes lie.
        manifest: What an approximate index of all vectors would be made from; None for `flat`.

    Raises:
        ConfigError: when there are more parts than passages.
    """
    num_shards = config.num_shards
    if num_shards > num_passages:
        raise ConfigError(
            f"retrieval.num_shards is {num_shards}, more than the {num_passages} passages of the "
            "corpus; lower it"
        )
    edges = [num_passages * shard // num_shards for shard in range(num_shards + 1)]
    sources = []
    for first, end in pairwise(edges):
        own = manifest and replace(
            manifest, parameters={**manifest.parameters, "first_row": first, "end_row": end}
        )
        directory = indexes_dir / own.directory_name if own else indexes_dir
        sources.append(ShardSource(vectors_file, first, end, config, directory, own))
    return sources


def merge(parts: Sequence[Hits], k: int) -> Hits:
    """The best `k` rows of all parts, best first and the lower row first among equals.

    Example:
        >>> low = Hits(np.array([[1, 0]]), np.array([[0.9, 0.2]], np.float32))
        >>> high = Hits(np.array([[7, 5]]), np.array([[0.9, 0.5]], np.float32))
        >>> merge([high, low], 3).rows_BK.tolist()
        [[1, 7, 5]]
    """
    rows_BN = np.concatenate([hits.rows_BK for hits in parts], axis=1)
    scores_BN = np.concatenate([hits.scores_BK for hits in parts], axis=1)
    return in_order(rows_BN, scores_BN, k)
