"""Replaces the encoder of a retrieval configuration with a trained one."""

from __future__ import annotations

from pathlib import Path

from rlrag.config import RetrievalConfig


def tuned_retrieval(retrieval: RetrievalConfig, directory: Path) -> RetrievalConfig:
    """The same retrieval with the encoder that was saved in `directory`."""
    field = "vocabulary_encoder" if retrieval.kind == "semi_parametric" else "encoder"
    return retrieval.model_copy(update={field: str(directory)})
