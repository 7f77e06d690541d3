"""Reinforcement learning for retrieval-augmented generation, from the retriever to the answer.

    >>> import rlrag
    >>> with rlrag.load_pipeline("runs/quickstart/bundle") as pipeline:  # doctest: +SKIP
    ...     pipeline.answer("What is the capital of Mongolia?").text
    'Ulaanbaatar'

`train` and `evaluate` do what the commands of these names do. All are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlrag.cli.evaluate import evaluate
    from rlrag.cli.train import train
    from rlrag.pipeline import load_pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_pipeline", "train"]

_MODULES = {
    "evaluate": "rlrag.cli.evaluate",
    "load_pipeline": "rlrag.pipeline",
    "train": "rlrag.cli.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
