"""Flags of the algorithm that a command line names by `--algorithm.name`.

Each algorithm has settings of its own, so that the flags of a run depend on which one it is.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import create_model

from rlrag.config import (
    ALGORITHMS,
    Algorithm,
    AlternatingConfig,
    DROConfig,
    FeedbackConfig,
    JSAConfig,
    OpenRAGConfig,
    OwnTrainerConfig,
    RunConfig,
    SFTConfig,
    algorithm_kind,
)
from rlrag.errors import ConfigError

_FLAG = "--algorithm.name"


def takes_recipe(kind: type[Any]) -> bool:
    """Whether a program's arguments are those of a whole run."""
    return typing.get_type_hints(kind).get("config") is RunConfig


def of_named_algorithm(kind: type[Any], default: Any, argv: Sequence[str]) -> tuple[type[Any], Any]:
    """The same arguments with the settings of the algorithm that `argv` names as flags.

    What the recipe says of an algorithm holds for it; another one starts from its own defaults.

    Args:
        kind: A dataclass of arguments with a `RunConfig` in its field `config`.
        default: One with the recipe's values.
        argv: The words of the command line.

    Raises:
        ConfigError: when there is no such algorithm.
    """
    config: RunConfig = default.config
    name = _named(argv, config.algorithm.name)
    if name != config.algorithm.name:
        config = config.model_copy(update={"algorithm": _other(config, name)})
    section = type(config.algorithm)
    narrow: Any = create_model(
        "RunConfig",
        __base__=RunConfig,
        __doc__=RunConfig.__doc__,
        algorithm=(section, config.algorithm),
    )
    values = {field: getattr(config, field) for field in RunConfig.model_fields}
    return with_config(kind, default, narrow, narrow.model_construct(**values))


def with_config(
    kind: type[Any], default: Any, section: type[Any], config: Any
) -> tuple[type[Any], Any]:
    """Arguments whose configuration is of another class, and one of them with its values."""
    namespace = {
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__annotations__": {"config": Annotated[section, tyro.conf.arg(name="")]},
    }
    made: Any = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), namespace))
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    return made, made(**(values | {"config": config}))


def refuse_other_settings(argv: Sequence[str], algorithm: Algorithm) -> None:
    """Refuse flags that are settings of another algorithm, saying of which.

    Raises:
        ConfigError: for the first such flag.
    """
    for word in argv:
        flag = word.partition("=")[0]
        section, _, field = flag.removeprefix("--").replace("-", "_").partition(".")
        if section != "algorithm" or field in type(algorithm).model_fields:
            continue
        if isinstance(algorithm, AlternatingConfig):
            for part in ("retriever", "selection"):
                if field in type(getattr(algorithm, part)).model_fields:
                    raise ConfigError(
                        f"{flag} is --algorithm.{part}.{flag.partition('.')[2]} in this run"
                    )
        owners = [name for name, kind in ALGORITHMS.items() if field in kind.model_fields]
        if owners:
            raise ConfigError(
                f"{flag} is a setting of algorithm {' or '.join(owners)}, but this run's is "
                f"{algorithm.name}; choose one with --algorithm.name, or leave the flag out"
            )


def _named(argv: Sequence[str], recipe: str) -> str:
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == _FLAG and equals:
            return value
        if flag == _FLAG and place + 1 < len(argv):
            return argv[place + 1]
    return recipe


def _other(config: RunConfig, name: str) -> Algorithm:
    try:
        kind = algorithm_kind(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    answers = [part for part in config.algorithm.parts if part != "retriever"]
    dro = config.dro if isinstance(config.algorithm, DROConfig | AlternatingConfig) else None
    if dro is None:
        dro = DROConfig.model_validate({"parts": answers or ("selector",)})
    if kind is FeedbackConfig:  # its log has no default
        return FeedbackConfig.model_construct(log=tyro.MISSING)
    made: dict[type[Any], Algorithm] = {
        DROConfig: dro,
        SFTConfig: SFTConfig(),
        OpenRAGConfig: config.openrag,
        JSAConfig: config.jsa,
        AlternatingConfig: AlternatingConfig(retriever=config.openrag, selection=dro),
    }
    if kind in made:
        return made[kind]
    return OwnTrainerConfig(name=name, parts=config.algorithm.parts)
