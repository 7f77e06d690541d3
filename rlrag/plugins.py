"""Loads your own parts by name, `package.module:name`.

A part is a class or a function that makes one. It is called with keyword arguments: those of what
its kind is offered that it has parameters for, and its own options, which are its other parameters.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, RlragError, nearest_name

OFFERED: Mapping[str, tuple[str, ...]] = {
    "retriever": ("corpus",),
    "policy": ("num_selected", "num_scores", "vector_size"),
    "generator": ("model_dir",),
    "trainer": ("context",),
    "query_writer": (),
}
"""By kind of part, the keyword arguments that are no options of its own."""
FIELDS: Mapping[str, str] = {
    "retrieval.kind": "retriever",
    "selector.kind": "policy",
    "generator.backend": "generator",
    "algorithm.name": "trainer",
}
"""Fields of a configuration that may be such a name, and the kind of part; `options` of the same
section are the part's own."""
METHODS: Mapping[str, tuple[str, ...]] = {
    "retriever": ("search",),
    "policy": ("act", "log_prob", "named_parameters"),
    "generator": ("generate",),
    "trainer": ("step", "tensors", "load"),
    "query_writer": ("write",),
}
"""By kind, the methods that a part must have; a policy is a `torch.nn.Module`, a trainer a
`rlrag.training.trainer.Trainer`."""
_BASES: Mapping[str, str] = {"trainer": "rlrag.training.trainer.Trainer"}
"""By kind, the class that a part is a subclass of; by name, as it lies above this module."""


def is_own(name: str) -> bool:
    """Whether a name is one of `package.module:name`, and of no built-in part.

    Example:
        >>> is_own("my_retrievers:Fuzzy"), is_own("bm25")
        (True, False)
    """
    return ":" in name


def load(kind: str, name: str) -> Any:
    """The object that `package.module:name` names.

    Args:
        kind: What it is to be, for the message.
        name: Its name.

    Raises:
        ConfigError: when the name has another form, or the module is missing, fails to import or
            has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not (all(map(str.isidentifier, module_name.split("."))) and attribute.isidentifier()):
        raise ConfigError(f"{kind} {name!r} is not of the form 'package.module:name'")
    module = _import(kind, name, module_name)
    if not hasattr(module, attribute):
        hint = nearest_name(attribute, vars(module), "correct the name")
        raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}; {hint}")
    return getattr(module, attribute)


def check(kind: str, name: str, words: Sequence[str]) -> None:
    """Check that a part can be found and takes these options, without making it.

    What a function makes is seen when it is made.

    Raises:
        ConfigError: what is wrong.
    """
    factory = load(kind, name)
    _values(kind, name, factory, words)
    base = _BASES.get(kind)
    if base and inspect.isclass(factory) and base not in map(_full_name, factory.__mro__):
        raise ConfigError(
            f"{kind} {name!r} is not a {base.rpartition('.')[2]}; make it a subclass of {base}"
        )
    for method in sorted(getattr(factory, "__abstractmethods__", ())):
        raise _lacking(kind, name, method)


def check_named(config: RunConfig) -> list[str]:
    """`check` the parts that a configuration names; returns their names."""
    found = []
    for path, kind in FIELDS.items():
        section, _, field = path.partition(".")
        part = getattr(config, section)
        if is_own(name := getattr(part, field)):
            check(kind, name, part.options)
            found.append(name)
    for name in filter(is_own, config.environment.hops.writers):
        check("query_writer", name, ())
        found.append(name)
    return found


def make(kind: str, name: str, words: Sequence[str], **offered: Any) -> Any:
    """Make a part.

    Args:
        kind: A key of `OFFERED`.
        name: Its name.
        words: Its options, each `name=value`.
        offered: What parts of this kind may ask for.

    Raises:
        ConfigError: when it cannot be found, an option is unknown or wrong, it cannot be made, or
            what was made lacks a method.
    """
    factory = load(kind, name)
    options = _values(kind, name, factory, words)
    wanted = _parameters(kind, name, factory)
    given = {key: value for key, value in offered.items() if key in wanted}
    for key in OFFERED[kind]:
        if key in wanted and key not in given and wanted[key].default is inspect.Parameter.empty:
            raise ConfigError(f"{kind} {name!r} needs a {key}, but the run has none; configure one")
    try:
        part = factory(**given, **options)
    except RlragError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{kind} {name!r}: creating it failed with {type(error).__name__}: {error}"
        ) from error
    for method in METHODS[kind]:
        if not callable(getattr(part, method, None)):
            raise _lacking(kind, name, method, f" made a {type(part).__name__}, which")
    return part


def identity(kind: str, name: str, words: Sequence[str]) -> list[str]:
    """What the results of a part depend on: its name, its options and the text of its module.

    What else they depend on, such as the version of a package or of a file, the class or function
    may tell by an attribute `revision`, which is a text.

    Raises:
        ConfigError: when the part cannot be found, or its `revision` is no text.
    """
    found = load(kind, name)
    try:
        source = inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:  # an object that was made, such as a functools.partial
        source = inspect.getsourcefile(sys.modules[name.partition(":")[0]])
    content = Path(source).read_bytes() if source else b""
    revision = getattr(found, "revision", "")
    if not isinstance(revision, str):
        raise ConfigError(
            f"{kind} {name!r} has a revision of type {type(revision).__name__}; set `revision` "
            "of the class or function to a str"
        )
    parts = [name, *sorted(words), hashlib.sha256(content).hexdigest()]
    return [*parts, revision] if revision else parts


def options_of(kind: str, name: str) -> Iterator[str]:
    """A line of help for each option of a part, with its type and default.

    Raises:
        ConfigError: when the part cannot be found.
    """
    factory = load(kind, name)
    hints = _hints(factory)
    for option, parameter in _parameters(kind, name, factory).items():
        if option in OFFERED[kind]:
            continue
        hint = hints.get(option, str)
        default = (
            "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
        )
        yield f"{option}={getattr(hint, '__name__', hint)} ({default})"


def _full_name(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _lacking(kind: str, name: str, method: str, who: str = "") -> ConfigError:
    return ConfigError(
        f"{kind} {name!r}{who} has no method {method!r}; rlrag.testing.check_{kind} checks what "
        f"a {kind} must do"
    )


def _import(kind: str, name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that runs and exits when it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{kind} {name!r}: there is no module {missing!r}; install it, or start the "
                "program in the folder that contains it"
            ) from error
        raise ConfigError(
            f"{kind} {name!r}: importing {module_name!r} failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _parameters(kind: str, name: str, factory: Any) -> Mapping[str, inspect.Parameter]:
    if not callable(factory):
        raise ConfigError(
            f"{kind} {name!r} is a {type(factory).__name__}; name a class, or a function that "
            f"returns a {kind}"
        )
    try:
        found = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind} {name!r} has no readable signature ({error}); wrap it in a function"
        ) from error
    for parameter in found.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"{kind} {name!r}: parameter {parameter} cannot be passed by keyword; use only "
                "parameters that can, without *args or positional-only ones"
            )
    return found


def _hints(factory: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):  # names that exist for a type checker alone
        return {}


def _values(kind: str, name: str, factory: Any, words: Sequence[str]) -> dict[str, Any]:
    """The options that words give, each of the type that its parameter says."""
    parameters = _parameters(kind, name, factory)
    known = [option for option in parameters if option not in OFFERED[kind]]
    hints = _hints(factory)
    values: dict[str, Any] = {}
    for word in words:
        option, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"option {word!r} of {kind} {name!r} is not of the form 'name=value'")
        if option not in known:
            hint = nearest_name(option, known, f"it has: {', '.join(known) or 'no options'}")
            raise ConfigError(f"{kind} {name!r} has no option {option!r}; {hint}")
        values[option] = _value(kind, name, option, hints.get(option, str), text)
    missing = [
        option
        for option in known
        if option not in values and parameters[option].default is inspect.Parameter.empty
    ]
    if missing:
        raise ConfigError(f"{kind} {name!r} needs the option {missing[0]!r}; give {missing[0]}=...")
    return values


def _value(kind: str, name: str, option: str, hint: Any, text: str) -> Any:
    """A text as the value of its type; lists and the like are written as JSON."""
    adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        try:
            return adapter.validate_python(json.loads(text))
        except ValueError:  # a ValidationError is one too
            reason = error.errors()[0]["msg"]
            raise ConfigError(
                f"option {option} of {kind} {name!r} is {text!r}: {reason}"
            ) from error
