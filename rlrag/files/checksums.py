"""Checksums of cached files, compared before the files are used.

A file of up to 64 MiB is read each time. Reading a larger one whole would take longer than opening
it, so that is done only where it was written to after the list was, as its time of change tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ALWAYS_READ_BYTES = 2**26


def checksum(path: Path) -> dict[str, Any]:
    """Of a finished file: its size and SHA-256, as JSON keeps them."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def difference(path: Path, expected: Mapping[str, Any], listing: Path) -> str:
    """What a file has other than `checksum` said of it; empty where nothing is known to.

    Args:
        path: The file.
        expected: Its checksum.
        listing: The file that this was read from.

    Raises:
        OSError: when one cannot be read.
        KeyError: when `expected` is no checksum.
    """
    size, sha256 = expected["bytes"], expected["sha256"]
    stat = path.stat() if path.is_file() else None
    if stat is None or stat.st_size != size:
        return f"it has {stat.st_size if stat else 0} bytes and not {size}"
    if size > ALWAYS_READ_BYTES and stat.st_mtime_ns <= listing.stat().st_mtime_ns:
        return ""
    return "" if _sha256(path) == sha256 else "its bytes are others than were written"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
