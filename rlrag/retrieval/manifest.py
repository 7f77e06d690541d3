"""The manifest of an index: records what it was built from, and is checked before use.

An index directory holds `manifest.json`. A directory appears under its name only when it is
complete (`staged_directory`), except those with vectors, which say themselves how far they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rlrag.errors import IndexMismatchError, RlragError, SetupError
from rlrag.files.checksums import checksum, difference
from rlrag.files.text import apply_umask, hidden_beside
from rlrag.retrieval.dense.encoder import EncoderIdentity

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
_LIBRARIES = (
    "bm25s",
    "faiss-cpu",
    "numpy",
    "scipy",
    "sentence-transformers",
    "torch",
    "transformers",
)

IndexKind = Literal[
    "bm25", "vectors", "hnsw", "ivfpq", "bag_of_tokens", "vocabulary_vectors", "graph"
]


@dataclass(frozen=True)
class Manifest:
    """What determines the content of an index.

    `encoder` is the name that the encoder was configured under. It is recorded for people and not
    compared: the same weights under another name or path make the same vectors.
    """

    kind: IndexKind
    corpus_hash: str
    num_passages: int
    encoder: str | None = None
    encoder_identity: EncoderIdentity | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, Any]:
        """Every field that must agree, flat, by the name under which an error shows it."""
        identity = self.encoder_identity
        return {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "corpus_hash": self.corpus_hash,
            "num_passages": self.num_passages,
            "encoder_weights_hash": identity.weights_hash if identity else None,
            "encoder_dtype": identity.dtype if identity else None,
            "encoder_max_tokens": identity.max_tokens if identity else None,
            **{f"parameters.{name}": value for name, value in sorted(self.parameters.items())},
        }

    @property
    def directory_name(self) -> str:
        """Kind and a hash of the compared fields: different indexes lie in different places."""
        return f"{self.kind}-{digest(self.compared)}"


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(directory: Path, manifest: Manifest, is_finished: bool = True) -> None:
    """Describe a directory whose other files are already there.

    Args:
        directory: Of the index.
        manifest: What it is made from.
        is_finished: Whether the files have their final content; what fills them later vouches for
            them then.
    """
    paths = sorted(directory.iterdir()) if is_finished else []
    files = {path.name: checksum(path) for path in paths}
    libraries = {name: found for name in _LIBRARIES if (found := _installed_version(name))}
    content = {
        "compared": manifest.compared,
        "encoder": manifest.encoder,
        "libraries": libraries,
        "files": files,
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:  # FAISS has other distributions; the record then lacks it
        return None


def check_manifest(directory: Path, expected: Manifest) -> None:
    """Refuse a directory that is not exactly the index that is wanted, whole.

    Raises:
        IndexMismatchError: naming each differing field with both values, or the damaged file.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
        found, files = dict(content["compared"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise IndexMismatchError(
            f"{path} is missing or unreadable ({type(error).__name__}: {error}); delete "
            f"{directory} and run again to rebuild the index"
        ) from error
    wanted = expected.compared
    differences = [
        f"{name} is {found.get(name)!r} and not {wanted.get(name)!r}"
        for name in [*wanted, *(name for name in found if name not in wanted)]
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise IndexMismatchError(
            f"the index {directory} was built from something else: {'; '.join(differences)}. Use "
            "the corpus, encoder and parameters that it was built from, or delete the directory "
            "and run again to rebuild the index"
        )
    check_files(directory, files, path)


def check_files(directory: Path, files: Mapping[str, Any], listing: Path) -> None:
    """Refuse a directory in which a file has other bytes than when it was finished.

    Args:
        directory: Of the index.
        files: Checksums by name.
        listing: The file that they were read from.

    Raises:
        IndexMismatchError: naming the damaged file.
    """
    for name, expected in files.items():
        file = directory / name
        try:
            reason = difference(file, expected, listing)
        except (OSError, KeyError, TypeError) as error:  # a name that no file can have, for one
            raise damaged(listing, f"{name[:40]!r}: {error}") from error
        if reason:
            raise damaged(file, reason)


def damaged(file: Path, reason: object) -> IndexMismatchError:
    """The error for a file of an index that is truncated or unreadable."""
    return IndexMismatchError(
        f"{file} is damaged: {reason}; delete {file.parent} and run again to rebuild the index"
    )


@contextmanager
def staged_directory(target: Path, manifest: Manifest, is_finished: bool = True) -> Iterator[Path]:
    """A new directory that gets its manifest and becomes `target` when the block ends well.

    `is_finished` is that of `write_manifest`.

    Where another process was first, its directory stays and this one is dropped: both were made
    from the same things.

    Raises:
        SetupError: naming `target` and what the operating system said, a full disk for one.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = hidden_beside(target)
        staging.mkdir()
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield staging
        apply_umask(staging)
        write_manifest(staging, manifest, is_finished)
        for file in staging.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # anything but another process that was first
                raise
    except RlragError:  # some of these are OSErrors too and say more
        raise
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> SetupError:
    """The error for a full disk or a missing permission."""
    return SetupError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another cache "
        "directory, then run the same command again: completed work is kept"
    )
