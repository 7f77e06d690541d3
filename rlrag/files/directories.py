"""Writes directories atomically and verifies them; reads tensors from safetensors files.

Checkpoints and bundles are directories with a `manifest.json` that holds the SHA-256 of every other
file. They are built beside their place and renamed into it. Nothing is pickled.

Beside a directory `NAME` a writer makes hidden ones:

    .NAME-<32 hex digits>   being built, or being deleted; rubbish once its writer is gone
    .NAME.replaced          the version that is being replaced; always whole

A writer renames NAME to `.NAME.replaced`, the new version to NAME, and deletes the old one. A kill
between the first two leaves the old version alone: readers find it (`find_whole`) and the next
writer puts it back. A directory has one writer at a time, which `rlrag.files.locks` sees to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlrag.errors import CheckpointError, RlragError
from rlrag.files.text import apply_umask, hidden_beside
from rlrag.submitted_job import where_to_look

MANIFEST = "manifest.json"
_ASIDE_NAME = re.compile(r"\.(.+)\.replaced")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` when the block ends without an error.

    Every file is flushed to disk and listed in `manifest.json` before the rename. A full disk or
    missing permission leaves the old `target` as it was. A kill at any moment leaves the old or
    the new version whole, where `find_whole` finds it.

    Raises:
        CheckpointError: naming `target` and what the operating system said.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle(target)
        # Not tempfile.mkdtemp, whose directories no other user may read: bundles are served.
        staging = hidden_beside(target)
        staging.mkdir()
    except OSError as error:
        raise CheckpointError(_cannot_write(target, error)) from error
    try:
        yield staging
        _seal(staging)
        _replace(target, staging)
    except RlragError:  # some are an OSError too, and say themselves what is wrong
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own
        raise CheckpointError(_cannot_write(target, error)) from error
    finally:
        _remove(staging)


def find_whole(target: Path) -> Path:
    """Where the version of `target` lies that a reader must use.

    That is `target`, except after a writer was killed between its two renames: then it is the old
    version beside it. Nothing is renamed here, as a reader may lack the right and a writer may be
    at work. Where there is neither, `target` itself is returned.
    """
    aside = _aside(target)
    return aside if aside.is_dir() and not target.exists() else target


def names_in(directory: Path) -> set[str]:
    """Names in `directory` under which `find_whole` finds a version."""
    if not directory.is_dir():
        return set()
    names = set()
    for path in directory.iterdir():
        aside = _ASIDE_NAME.fullmatch(path.name)
        if aside or not path.name.startswith("."):
            names.add(aside[1] if aside else path.name)
    return names


def delete(target: Path) -> None:
    """Delete every version of a directory; half of one is never left under its name."""
    for place in (_aside(target), target):
        if place.exists():
            _discard(target, place)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _replace(target: Path, staging: Path) -> None:
    try:
        if target.exists():
            target.rename(_aside(target))
        staging.rename(target)
    finally:
        _settle(target)


def _settle(target: Path) -> None:
    """End a replacement that stopped half-way: put the old version back, or delete it."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        _discard(target, aside)
    else:
        aside.rename(target)


def _discard(target: Path, place: Path) -> None:
    """Delete a version; it loses its name first, so that nobody reads half of it."""
    hidden = hidden_beside(target)
    place.rename(hidden)
    _remove(hidden)


def _remove(directory: Path) -> None:
    # Shared storage keeps files that somebody has open; what stays bears a name that nobody reads.
    shutil.rmtree(directory, ignore_errors=True)


def _cannot_write(target: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return (
        f"cannot write {target}: {reason}; free space or choose another directory, then run the "
        "same command again: it continues from the last checkpoint"
    )


def _seal(directory: Path) -> None:
    apply_umask(directory)
    files = dict(sorted(_files_below(directory).items()))
    manifest = {name: _sha256(path) for name, path in files.items()}
    (directory / MANIFEST).write_text(json.dumps({"files": manifest}, indent=2) + "\n")
    for path in [*files.values(), directory / MANIFEST]:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_whole(directory: Path) -> None:
    """Compare every file with the manifest, which must list them all and nothing else.

    Hidden entries of `directory` itself are no part of it, whatever they are: a download from a hub
    leaves `.gitattributes` and `.cache` there.

    Raises:
        CheckpointError: naming the file that is missing, truncated or altered, that the manifest
            does not list or that lies elsewhere, or the symbolic link.
    """
    listed = listed_files(directory)
    found = _files_below(directory)
    unlisted = sorted(found.keys() - listed.keys())
    if unlisted:
        raise CheckpointError(
            f"{directory / unlisted[0]} is not in the manifest {directory / MANIFEST} and cannot "
            "be verified; delete it, or fetch the directory again"
        )
    for name, expected in listed.items():
        path = found.get(name)
        if path is None and leads_outside(name):
            raise CheckpointError(
                f"{directory / MANIFEST} lists {name!r}, which is outside {directory}; do not "
                "use this directory, and fetch it again from its source"
            )
        if path is None or _read_sha256(path) != expected:
            raise CheckpointError(
                f"{directory / name} is missing, truncated or altered since it was written; "
                f"delete {directory} to continue from an older one"
            )


def listed_files(directory: Path) -> dict[str, str]:
    """Hashes by file name, as the manifest of a directory gives them.

    Raises:
        CheckpointError: when there is none, or it is unreadable.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(_no_manifest(str(path), error)) from error
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, place: str) -> dict[str, str]:
    """Hashes by file name; `place` is named in the error.

    Raises:
        CheckpointError: when it is no manifest.
    """
    try:
        files = json.loads(content)["files"]
        if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(_no_manifest(place, error)) from error
    return files


def _no_manifest(place: str, error: Exception) -> str:
    return (
        f"{place} is missing or unreadable ({type(error).__name__}); the directory is not a whole "
        "checkpoint or bundle: delete it to go on from an older one"
    )


def _files_below(directory: Path) -> dict[str, Path]:
    """Every file but the manifest and what is hidden, by its name relative to the directory.

    Raises:
        CheckpointError: when something is neither a file nor a directory, or cannot be listed.
    """

    def fail(error: OSError) -> NoReturn:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error

    files = {}
    for place, directories, names in os.walk(directory, onerror=fail):
        if Path(place) == directory:
            directories[:] = [name for name in directories if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".")]
        for path in [Path(place, name) for name in [*directories, *names]]:
            try:
                mode = path.lstat().st_mode
            except OSError as error:  # deleted since it was listed
                fail(error)
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise CheckpointError(
                    f"{path} is a symbolic link or another special file, which leads outside "
                    f"{directory}; replace it with a copy of its target"
                )
            if stat.S_ISREG(mode) and path != directory / MANIFEST:
                files[path.relative_to(directory).as_posix()] = path
    return files


def leads_outside(name: str) -> bool:
    """Whether a name from a manifest is no path below its directory."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def _read_sha256(path: Path) -> str:
    try:
        return _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Load a safetensors file into a module whose tensors it must match exactly."""
    restore_weights(module, load_tensors(path), str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: when it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; "
            + where_to_look(path, "check the path, or write or fetch the file anew")
        ) from error


def restore_weights(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str
) -> None:
    """Put tensors into a module that they must match exactly; `source` is named in the error.

    Raises:
        CheckpointError: when they do not fit, or hold a number that is not finite.
    """
    check_finite(tensors, source)
    try:
        module.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not fit the configuration: {error}; use the configuration that "
            "it was saved with"
        ) from error


def save_weights(module: torch.nn.Module, path: Path) -> None:
    """Write a module's tensors as safetensors.

    Raises:
        CheckpointError: when one holds a number that is not finite.
    """
    tensors = contiguous(module.state_dict())
    check_finite(tensors, str(path))
    save_file(tensors, path)


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Refuse weights that make every answer NaN; `source` is named in the error.

    Raises:
        CheckpointError: naming the first tensor with a number that is NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{source} contains NaN or infinite values, first in {name!r}; use weights of an "
                "earlier step, or train again with a lower learning rate"
            )


def contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
