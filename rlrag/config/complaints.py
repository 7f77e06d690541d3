"""Turns pydantic's validation errors into one-line messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel, ValidationError

from rlrag.config.fixed import FIXED, refusal
from rlrag.errors import nearest_name


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One sentence for each problem that pydantic found, with a suggestion for unknown fields.

    Fields are named from `root`, the whole configuration, whichever section was being read.
    """
    sections = {path: section for path, section in _sections(root)}
    places = {section.__name__: path for path, section in sections.items()}
    sentences = []
    for problem in error.errors():
        parts = (*places.get(error.title, ()), *problem["loc"])
        path = ".".join(map(str, parts)) or "the configuration"
        if path in FIXED:
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


def _sections(
    section: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """A section and all below it, also those that a tuple holds, with their paths."""
    yield path, section
    for name, field in section.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _sections(kind, (*path, name))
