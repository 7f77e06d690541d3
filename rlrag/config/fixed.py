"""Settings of earlier configurations that are constants now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIXED: Mapping[str, float] = {
    "retrieval.hnsw_links": 32,
    "retrieval.hnsw_search_depth": 128,
    "retrieval.shard_restarts": 3,
    "retrieval.rrf_k": 60,
    "off_policy.min_ess": 10.0,
    "off_policy.confidence": 0.95,
    "openrag.min_auc": 0.6,
    "mirror.timeout_s": 60,
    "mirror.max_attempts": 3,
}
"""By dotted name, the value that each has now."""


def refusal(name: str, given: str) -> str:
    """Why one of them cannot be set.

    Args:
        name: Its dotted name.
        given: How it was named, as the name or as a flag.
    """
    return f"{given} is no setting any more and fixed at {FIXED[name]:g}; leave it out"


def without_fixed(values: Any) -> Any:
    """A stored configuration without the settings that have their fixed value in it.

    A setting with another value stays, and is then refused as an unknown field.

    Example:
        >>> without_fixed({"retrieval": {"rrf_k": 60, "kind": "bm25"}, "mirror": {"timeout_s": 5}})
        {'retrieval': {'kind': 'bm25'}, 'mirror': {'timeout_s': 5}}
    """
    if not isinstance(values, dict):
        return values
    return {
        name: {k: v for k, v in section.items() if not _is_fixed(f"{name}.{k}", v)}
        if isinstance(section, dict)
        else section
        for name, section in values.items()
    }


def _is_fixed(name: str, value: Any) -> bool:
    return name in FIXED and not isinstance(value, bool) and value == FIXED[name]
