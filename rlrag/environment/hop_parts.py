"""The parts that episodes which hop and search need: a passage graph and a search.

Query writers are `rlrag.selection.queries.protocol.QueryWriter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from pydantic import Field

from rlrag.config.sections import Section
from rlrag.retrieval.protocol import Hits


class Neighbours(Protocol):
    """The edges of one passage, each array of shape (M,)."""

    @property
    def rows(self) -> np.ndarray:
        """Rows of the corpus that they lead to; a row may stand more than once."""
        ...

    @property
    def kinds(self) -> np.ndarray:
        """Their kinds, places in `rlrag.environment.hop_transitions.EDGE_KINDS`."""
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


class HopSettings(Section):
    """The pool and the limits of episodes that hop and search."""

    num_first: int | None = Field(default=None, ge=1)
    """Hits of the question in the pool at the start (n0); unset takes all candidates."""
    num_slots: int | None = Field(default=None, ge=1)
    """Passages that a pool has room for (N); unset makes room for all that can be found."""
    num_revealed: int = Field(default=5, ge=0)
    """Most neighbours that a pick reveals (b); 0 reveals none."""
    num_hits: int = Field(default=5, ge=1)
    """Hits of a search."""
    max_queries: int = Field(default=2, ge=0)
    """Most searches of an episode (Q), the question's own not counted."""
    max_turns: int | None = Field(default=None, ge=1)
    """Most picks and searches of an episode together (H); unset sets no limit but K + Q."""
    pick_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each pick."""
    query_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each search."""
    turn_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each turn."""
    auto_stop: bool = True
    """End an episode with its K-th pick; without, the agent has to stop it."""
    require_pick: bool = False
    """Do not allow the stop before the first pick."""
