"""Settings of earlier configurations that have another name now."""

from __future__ import annotations

import json
import logging
from typing import Any

logger = logging.getLogger(__name__)

_SECTIONS = ("dro", "off_policy", "openrag", "jsa")
_OF_TRAINING = {
    "objective": "algorithm.name",
    "parts": "algorithm.parts",
    "experience": "algorithm.log, with algorithm.name feedback",
    "rounds": "algorithm.rounds, with algorithm.name alternating",
    "options": "algorithm.options",
    "overlap": "algorithm.overlap",
}


def new_name(name: str) -> str | None:
    """The new name of a renamed setting; None where the name is unchanged.

    Example:
        >>> new_name("dro.num_samples"), new_name("training.objective"), new_name("seed")
        ('algorithm.num_samples', 'algorithm.name', None)
    """
    section, _, field = name.partition(".")
    if name == "experience":
        return _OF_TRAINING[name]
    if section in _SECTIONS:
        return f"algorithm.{field}"
    return _OF_TRAINING.get(field) if section == "training" else None


def with_algorithm(values: Any, source: str) -> Any:
    """A stored configuration with its `algorithm`, whose settings had sections of their own.

    Args:
        values: The configuration as it was read.
        source: Where it comes from, for the message that says the new form.

    Example:
        >>> old = {"seed": 1, "training": {"objective": "sft", "parts": ["generator"]}}
        >>> with_algorithm(old, "config.json")
        {'seed': 1, 'training': {}, 'algorithm': {'name': 'sft'}}
    """
    if not isinstance(values, dict) or "algorithm" in values:
        return values
    training = values.get("training", {})
    if not isinstance(training, dict):
        return values
    moved = {name: training[name] for name in _OF_TRAINING if name in training}
    sections = {name: values[name] for name in _SECTIONS if isinstance(values.get(name), dict)}
    if not (moved or sections) or not _is_readable(moved, sections):
        return values  # and what checks the values says what is wrong with them
    kept = {name: value for name, value in values.items() if name not in _SECTIONS}
    if "training" in values:
        kept["training"] = {name: v for name, v in training.items() if name not in _OF_TRAINING}
    kept["algorithm"] = _algorithm(moved, sections)
    logger.warning(
        "%s has the form of an earlier version and is read as if it said 'algorithm': %s; write it "
        "like this in place of %s",
        source,
        json.dumps(kept["algorithm"]),
        ", ".join([*(f"training.{name}" for name in moved), *sections]),
    )
    return kept


def _is_readable(training: dict[str, Any], sections: dict[str, Any]) -> bool:
    """Whether the values that decide the algorithm have their types."""
    lists = [training.get("parts", []), sections.get("openrag", {}).get("stages", [])]
    return isinstance(training.get("objective", ""), str) and all(
        isinstance(names, list | tuple) for names in lists
    )


def _algorithm(training: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    name, parts = training.get("objective", "dro"), list(training.get("parts", ["selector"]))
    dro, openrag = dict(sections.get("dro", {})), dict(sections.get("openrag", {}))
    if "overlap" in training:
        dro["overlap"] = training["overlap"]
    stages = openrag.pop("stages", ("offline", "online"))
    openrag |= {f"{stage}_epochs": 0 for stage in ("offline", "online") if stage not in stages}
    others = [part for part in parts if part != "retriever"]
    if training.get("experience") is not None:
        return {"name": "feedback", "log": training["experience"], **sections.get("off_policy", {})}
    if ":" in name:
        return {"name": name, "parts": parts, "options": training.get("options", ())}
    if name == "sft":
        return {"name": "sft"}
    if name == "jsa":
        return {"name": "jsa", "train_generator": "generator" in parts, **sections.get("jsa", {})}
    if not others:
        return {"name": "openrag", **openrag}
    if others != parts:
        return {
            "name": "alternating",
            "rounds": training.get("rounds", 1),
            "retriever": openrag,
            "selection": dro | {"parts": others},
        }
    return {"name": name, "parts": parts, **dro}
