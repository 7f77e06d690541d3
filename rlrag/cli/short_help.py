"""The short help of a recipe: the flags that people change first."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, Field, create_model

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
    *("training.parts", "training.launcher", "training.num_workers", "training.batch_size"),
)
"""Fields that the short help of every recipe shows."""

FIRST_WHERE_TRAINED = {
    "selector": ("dro.num_samples", "training.num_epochs", "training.learning_rate"),
    "generator": ("training.num_epochs", "generator_training.learning_rate"),
    "dro": ("dro.num_samples",),
    "openrag": ("openrag.offline_epochs", "openrag.online_epochs", "openrag.learning_rate"),
    "jsa": ("training.num_epochs", "jsa.learning_rate"),
}
"""Fields that it also shows for a part that the recipe trains, or for its algorithm."""


def first_fields(config: RunConfig) -> set[str]:
    """Dotted names of the fields that the short help of a recipe shows."""
    trained = {*config.training.parts, config.algorithm}
    chosen = (names for what, names in FIRST_WHERE_TRAINED.items() if what in trained)
    return {*FIRST, *(name for names in chosen for name in names)}


def shortened(kind: type[Any], default: Any) -> tuple[type[Any], Any]:
    """Arguments with those fields of their configuration alone, to print the help of.

    Args:
        kind: A dataclass of arguments with a `RunConfig` in its field `config`.
        default: One with the recipe's values.

    Returns:
        A class of arguments, and one of it with the same values.
    """
    section: Any = _section(default.config, first_fields(default.config))
    annotation = Annotated[section, tyro.conf.arg(name="")]
    namespace = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__annotations__": {"config": annotation},
    }
    short: Any = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), namespace))
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    return short, short(**(values | {"config": section()}))


def has_short_help(kind: type[Any]) -> bool:
    """Whether a program's arguments are a recipe's, which are too many to read."""
    return typing.get_type_hints(kind).get("config") is RunConfig


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
