"""Directory layout of an encoder with separate question and passage models.

An encoder that reads questions and passages alike lies in its directory itself, one for each in
`question/` and `passage/` beneath.
"""

from __future__ import annotations

from pathlib import Path

from rlrag.retrieval.trainable.protocol import Role

ROLES: tuple[Role, ...] = ("question", "passage")


def has_encoder_each(model_dir: Path) -> bool:
    """Whether a directory holds an encoder for questions and another for passages."""
    return all((model_dir / role).is_dir() for role in ROLES)


def role_directory(model_dir: Path, role: Role) -> Path:
    """Where the encoder of a role lies."""
    return model_dir / role if has_encoder_each(model_dir) else model_dir
