"""Names of what an episode that hops and searches shows of its slots and of itself."""

from __future__ import annotations

from rlrag.retrieval.graph import EdgeKind

EDGE_KINDS = tuple(kind.name.lower() for kind in EdgeKind)
"""Names of the kinds of edges of a passage graph, in the order of their numbers."""

SLOT_FEATURES = (
    "similarity",
    "reciprocal_rank",
    "newest_score",
    "best_score",
    "named",
    "uncovered",
    "in_first_list",
    "turn",
    *EDGE_KINDS,
    *(f"newest_{kind}" for kind in EDGE_KINDS),
)
"""Names of the features of a slot, in their order."""

GLOBAL_FEATURES = ("turns", "picks", "queries", "covered", "named_left", "comparison", "filled")
"""Names of the features of an episode, in their order."""
