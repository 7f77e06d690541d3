"""Settings of earlier configurations that are constants now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIXED: Mapping[str, bool | float] = {
    "retrieval.encode_batch_size": 64,
    "retrieval.vocabulary_top_k": 768,
    "retrieval.hnsw_links": 32,
    "retrieval.hnsw_search_depth": 128,
    "retrieval.ivf_lists": 256,
    "retrieval.ivf_probes": 32,
    "retrieval.pq_bytes": 48,
    "retrieval.shard_cpus": 1,
    "retrieval.shard_restarts": 3,
    "retrieval.shard_timeout_s": 600,
    "retrieval.rrf_k": 60,
    "selector.hidden_size": 64,
    "selector.projection_size": 32,
    "selector.imitation_learning_rate": 1e-3,
    "generator.max_restarts": 10,
    "generator.prompt.score_end_of_answer": False,
    "off_policy.min_ess": 10.0,
    "off_policy.confidence": 0.95,
    "openrag.min_auc": 0.6,
    "generator_training.lora_alpha": 32,
    "generator_training.weight_decay": 0.01,
    "generator_training.max_grad_norm": 1.0,
    "training.collective_timeout_s": 1800,
    "training.weight_decay": 0.01,
    "training.max_grad_norm": 1.0,
    "training.stall_report_s": 300,
    "mirror.timeout_s": 60,
    "mirror.max_attempts": 3,
    "evaluation.num_bootstrap": 10_000,
}
"""By dotted name, the value that each has now."""

WITHOUT_EFFECT = frozenset({"generator_training.max_staleness"})
"""Names of which every value that a run could have does the same now."""

REMOVED = FIXED.keys() | WITHOUT_EFFECT


def refusal(name: str, given: str) -> str:
    """Why one of them cannot be set.

    Args:
        name: Its dotted name.
        given: How it was named, as the name or as a flag.
    """
    if name in WITHOUT_EFFECT:
        return f"{given} is no setting any more; leave it out"
    value = FIXED[name]
    shown = str(value) if isinstance(value, bool) else f"{value:g}"
    return f"{given} is no setting any more and fixed at {shown}; leave it out"


def without_fixed(values: Any, section: str = "") -> Any:
    """A stored configuration without the settings that have their fixed value in it.

    Raises:
        ValueError: naming one that has another value.

    Args:
        values: The configuration, or a section of it.
        section: The section's dotted name and a dot; empty for the whole configuration.

    Example:
        >>> without_fixed({"retrieval": {"rrf_k": 60, "kind": "bm25"}})
        {'retrieval': {'kind': 'bm25'}}
    """
    if not isinstance(values, dict):
        return values
    kept = {}
    for name, value in values.items():
        path = f"{section}{name}"
        if path in WITHOUT_EFFECT:
            continue
        if path not in FIXED:
            kept[name] = without_fixed(value, f"{path}.")
        elif value != FIXED[path] or isinstance(value, bool) != isinstance(FIXED[path], bool):
            raise ValueError(refusal(path, path))
    return kept
