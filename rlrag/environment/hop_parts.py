"""The parts that episodes which hop and search need: a passage graph and a search.

Query writers are `rlrag.selection.queries.protocol.QueryWriter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlrag.retrieval.protocol import Hits


class Neighbours(Protocol):
    """The edges of one passage, each array of shape (M,)."""

    @property
    def rows(self) -> np.ndarray:
        """Rows of the corpus that they lead to; a row may stand more than once."""
        ...

    @property
    def kinds(self) -> np.ndarray:
        """Their kinds, places in `rlrag.selection.slot_features.EDGE_KINDS`."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """Their weights, larger for stronger ones and not negative."""
        ...


class PassageEdges(Protocol):
    """A graph over the passages of a corpus."""

    def neighbours(self, row: int) -> Neighbours:
        """The edges of a passage; there may be none."""
        ...

    def named_in(self, text: str) -> np.ndarray:
        """Rows of the passages whose titles stand in a text."""
        ...


class Search(Protocol):
    """What is used of a `rlrag.retrieval.protocol.Retriever`."""

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question."""
        ...
