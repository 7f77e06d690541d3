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

    Raises:
        ValueError: naming one that has another value.

    Example:
        >>> without_fixed({"retrieval": {"rrf_k": 60, "kind": "bm25"}})
        {'retrieval': {'kind': 'bm25'}}
    """
    if not isinstance(values, dict):
        return values
    kept = {}
    for section, fields in values.items():
        if isinstance(fields, dict):
            named = {field: f"{section}.{field}" for field in fields}
            for field, name in named.items():
                if name in FIXED and fields[field] != FIXED[name]:
                    raise ValueError(refusal(name, name))
            kept[section] = {f: value for f, value in fields.items() if named[f] not in FIXED}
        else:
            kept[section] = fields
    return kept
