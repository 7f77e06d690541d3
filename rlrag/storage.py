"""Directories that are whole or absent, and tensors in safetensors files.

Checkpoints and bundles are directories with a `manifest.json` that holds the SHA-256 of every other
file. They are built beside their place and renamed into it. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlrag.errors import CheckpointError

MANIFEST = "manifest.json"


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` when the block ends without an error.

    Every file is flushed to disk and listed in `manifest.json` before the rename. A full disk or
    missing permission leaves the old `target` as it was.

    Raises:
        CheckpointError: naming `target` and what the operating system said.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile.mkdtemp, whose directories no other user may read: bundles are served.
        staging = target.parent / f".{target.name}-{uuid.uuid4().hex}"
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(_cannot_write(target, error)) from error
    try:
        yield staging
        _seal(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise CheckpointError(_cannot_write(target, error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _cannot_write(target: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"cannot write {target}: {reason}; free space or choose another directory, then run the "
        "same command again: it continues from the last checkpoint"
    )


def _seal(directory: Path) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {path.relative_to(directory).as_posix(): _sha256(path) for path in files}
    (directory / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2) + "\n")
    for path in [*files, directory / MANIFEST]:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_whole(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: naming the file that is missing, truncated or altered.
    """
    manifest_path = directory / MANIFEST
    try:
        files = json.loads(manifest_path.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{manifest_path} is missing or unreadable ({type(error).__name__}); the directory is "
            "not a whole checkpoint or bundle: delete it to go on from an older one"
        ) from error
    for name, expected in files.items():
        path = directory / name
        if not path.is_file() or _sha256(path) != expected:
            raise CheckpointError(
                f"{path} is missing, truncated or altered since it was written; delete "
                f"{directory} to go on from an older one"
            )


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into a module whose tensors it must match exactly."""
    try:
        module.load_state_dict(load_file(path))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} does not fit the configured selector: {error}; use the configuration that "
            "it was saved with"
        ) from error


def save_weights(module: torch.nn.Module, path: Path) -> None:
    """Write a module's tensors as safetensors."""
    save_file(contiguous(module.state_dict()), path)


def contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
