"""What users may import and rely on in; one line for each name with its parameters out.

Run `python tests/public_api.py` after an intended change: it rewrites `public_api.txt`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_name("public_api.txt")
MODULES = (
    "rlrag",
    "rlrag.algorithms.contrastive",
    "rlrag.algorithms.dro",
    "rlrag.algorithms.jsa",
    "rlrag.algorithms.off_policy",
    "rlrag.algorithms.rag_labels",
    "rlrag.bundle",
    "rlrag.config",
    "rlrag.data.corpus",
    "rlrag.data.load",
    "rlrag.errors",
    "rlrag.evaluation.significance",
    "rlrag.generation.protocol",
    "rlrag.pipeline",
    "rlrag.records",
    "rlrag.retrieval.protocol",
    "rlrag.rewards.answer_match",
    "rlrag.rewards.protocol",
    "rlrag.selection.plackett_luce",
    "rlrag.selection.protocol",
    "rlrag.training.trainer",
    "rlrag.environment.document_hops",
    "rlrag.environment.document_selection",
    "rlrag.environment.hop_parts",
    "rlrag.environment.scalar",
    "rlrag.environment.task",
    "rlrag.environment.vector",
)


def lines() -> list[str]:
    """Everything public of `MODULES`, in order."""
    return [line for name in MODULES for line in _of_module(importlib.import_module(name))]


def _of_module(module: ModuleType) -> Iterator[str]:
    exported = getattr(module, "__all__", None)
    for name in sorted(vars(module) if exported is None else exported):
        if name.startswith("_"):
            continue
        thing = getattr(module, name)  # which imports what a module offers lazily
        own = getattr(thing, "__module__", None) == module.__name__
        if exported is None and not own:
            continue
        if inspect.isclass(thing):
            yield from _of_class(f"{module.__name__}.{name}", thing)
        elif callable(thing):
            yield f"{module.__name__}.{name}{_parameters(thing)}"


def _of_class(name: str, cls: type) -> Iterator[str]:
    if issubclass(cls, BaseModel):
        yield f"{name}({', '.join(cls.model_fields)})"
    elif dataclasses.is_dataclass(cls):
        yield f"{name}({', '.join(field.name for field in dataclasses.fields(cls))})"
    elif issubclass(cls, tuple):
        yield f"{name}({', '.join(getattr(cls, '_fields', ()))})"
    else:
        yield name
    for member, thing in sorted(vars(cls).items()):
        if member.startswith("_") and member != "__call__":
            continue
        function = thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing
        if inspect.isfunction(function):
            yield f"{name}.{member}{_parameters(function)}"
        elif isinstance(thing, property):
            yield f"{name}.{member}"


def _parameters(function: object) -> str:
    """Names, kinds and whether there is a default; annotations may be worded anew."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else ...,
        )
        for parameter in inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    ]
    return str(inspect.Signature(parameters)).replace("Ellipsis", "...")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FILE.write_text("".join(f"{line}\n" for line in lines()))
