"""Turns pydantic's validation errors into one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel, Tag, ValidationError

from rlrag.config.algorithm import ALGORITHMS, OWN
from rlrag.config.fixed import REMOVED, refusal
from rlrag.errors import nearest_name


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One sentence for each problem that pydantic found, with a suggestion for unknown fields.

    Fields are named from `root`, the whole configuration, whichever section was being read.
    """
    sections = dict(_sections(root))
    places: dict[str, tuple[str, ...]] = {}
    for place, section in sections.items():
        places.setdefault(section.__name__, place)
    sentences = []
    for problem in error.errors():
        parts = (*places.get(error.title, ()), *problem["loc"])
        path = ".".join(map(str, _without_tag(parts))) or "the configuration"
        if path in REMOVED:
            sentences.append(refusal(path, path))
        elif problem["type"] == "extra_forbidden":
            names = sections[tuple(p for p in parts[:-1] if isinstance(p, str))].model_fields
            listing = f"valid fields: {', '.join(sorted(names))}"
            hint = nearest_name(str(parts[-1]), names, listing)
            sentences.append(f"unknown field {path!r}; {hint}")
        elif problem["type"] == "value_error":
            sentences.append(str(problem["ctx"]["error"]))
        else:
            sentences.append(f"{path} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(sentences)


def _without_tag(parts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The path as people write it: pydantic puts the member of a union after the field's name."""
    is_tagged = parts[:1] == ("algorithm",) and parts[1:2] and parts[1] in {*ALGORITHMS, OWN}
    return (parts[0], *parts[2:]) if is_tagged else parts


def _sections(
    section: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """A section and all below it, also those that a tuple or a union holds, with their paths."""
    yield path, section
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            tags = [tag.tag for tag in get_args(kind)[1:] if isinstance(tag, Tag)]
            inner = get_args(kind)[0] if tags else kind
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _sections(inner, (*path, name, *tags))
