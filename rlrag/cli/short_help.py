"""The short help of a recipe, with the most used flags."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, Field, create_model

from rlrag.cli.algorithm_flags import with_config
from rlrag.config import RunConfig

HELP_ALL = "--help-all"

FIRST = (
    "seed",
    *("data.corpus", "data.train_questions", "data.eval_questions", "data.max_train_questions"),
    *("retrieval.kind", "retrieval.num_candidates"),
    "environment.num_selected",
    "selector.kind",
    *("generator.model", "generator.backend"),
    *("generator.prompt.style", "generator.prompt.passage_order"),
    "reward.functions",
    *("algorithm.name", "algorithm.parts", "algorithm.rounds"),
    *("training.launcher", "training.num_workers", "training.batch_size"),
)
"""Fields that the short help of every recipe shows."""

FIRST_WHERE_TRAINED = {
    "selector": ("algorithm.num_samples", "training.num_epochs", "training.learning_rate"),
    "generator": ("training.num_epochs", "generator_training.learning_rate"),
    "dro": ("algorithm.num_samples",),
    "openrag": ("algorithm.offline_epochs", "algorithm.online_epochs", "algorithm.learning_rate"),
    "jsa": ("training.num_epochs", "algorithm.learning_rate"),
}
"""Fields that it also shows for a part that the recipe trains, or for its algorithm."""


def first_fields(config: RunConfig) -> set[str]:
    """Dotted names of the fields that the short help of a recipe shows."""
    trained = {*config.algorithm.parts, config.algorithm.name}
    chosen = (names for what, names in FIRST_WHERE_TRAINED.items() if what in trained)
    names = {*FIRST, *(name for names in chosen for name in names)}
    known = {f"algorithm.{name}" for name in type(config.algorithm).model_fields}
    return {name for name in names if name in known or not name.startswith("algorithm.")}


def shortened(kind: type[Any], default: Any) -> tuple[type[Any], Any]:
    """Arguments with those fields of their configuration alone, to print the help of.

    Args:
        kind: A dataclass of arguments with a `RunConfig` in its field `config`.
        default: One with the recipe's values.

    Returns:
        A class of arguments, and one of it with the same values.
    """
    section: Any = _section(default.config, first_fields(default.config))
    return with_config(kind, default, section, section())


def _section(values: BaseModel, names: Collection[str], before: str = "") -> type[BaseModel]:
    """A section with the named fields, whose defaults are these values."""
    fields: dict[str, Any] = {}
    for name, field in type(values).model_fields.items():
        value, dotted = getattr(values, name), f"{before}{name}"
        if isinstance(value, BaseModel):
            inner = _section(value, names, f"{dotted}.")
            if inner.model_fields:
                fields[name] = (inner, inner())
        elif dotted in names:
            fields[name] = (field.annotation, Field(value, description=field.description))
    return create_model(type(values).__name__, __doc__=type(values).__doc__, **fields)
