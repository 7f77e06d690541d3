"""A corpus: passages by row, with a hash of their content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from rlrag.records import Passage


class Corpus(Protocol):
    """Passages numbered from 0, in the order of their source."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, titles and texts in order, as 64 hex digits."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Passage: ...

    def __iter__(self) -> Iterator[Passage]: ...

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, or None where the corpus lacks it."""
        ...


class MemoryCorpus:
    """A corpus held in a tuple: for built-in texts and tests."""

    def __init__(self, passages: Iterable[Passage]) -> None: ...
