"""Builds an index directory in chunks, so that an interrupted build can resume.

Beside what is written stands `progress.json` with the number of passages that are safe on disk, and
once they all are, with the files' checksums.
Chunks begin at the same passages in every build. Two processes that fill one directory at once do
no harm where each writes the same bytes at the same places.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rlrag.files.checksums import checksum
from rlrag.files.text import hidden_beside
from rlrag.retrieval.manifest import MANIFEST_FILE, cannot_write, check_files, damaged

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
_LOG_EVERY_S = 10.0

Encoded = TypeVar("Encoded")


def fill_in_chunks(
    directory: Path,
    num_passages: int,
    chunk_size: int,
    encode: Callable[[int, int], Encoded],
    write: Callable[[int, Encoded], None],
) -> None:
    """Encode the passages that are not in the directory yet.

    Args:
        directory: Where progress is kept.
        num_passages: Passages in all.
        chunk_size: Large enough that sorting by length saves padding, small enough that a stop
            loses little.
        encode: Passages from the first to before the second number.
        write: What was encoded, at the place that its first passage's number gives.

    Raises:
        IndexMismatchError: when a file is damaged.
        SetupError: when the disk has no room.
    """
    first = _read_progress(directory, num_passages)
    if first == num_passages:
        return
    logger.info("encoding passages %d to %d into %s", first, num_passages, directory)
    started = last_logged = time.monotonic()
    for start in range(first, num_passages, chunk_size):
        end = min(start + chunk_size, num_passages)
        encoded = encode(start, end)
        try:
            write(start, encoded)
            _write_progress(directory, end, _finished(directory) if end == num_passages else {})
        except OSError as error:
            raise cannot_write(directory, error) from error
        now = time.monotonic()
        if now - last_logged >= _LOG_EVERY_S or end == num_passages:
            last_logged = now
            rate = (end - first) / max(now - started, 1e-9)
            logger.info(
                "encoded %d of %d passages, %.0f per second, %.0f s left",
                *(end, num_passages, rate, (num_passages - end) / rate),
            )


def _read_progress(directory: Path, num_passages: int) -> int:
    path = directory / PROGRESS_FILE
    if not path.exists():
        return 0
    try:
        content = json.loads(path.read_text())
        num_done, files = int(content["num_encoded"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if not 0 <= num_done <= num_passages:
        raise damaged(path, f"it counts {num_done} of {num_passages} passages")
    check_files(directory, files, path)
    return num_done


def _finished(directory: Path) -> dict[str, Any]:
    """Checksums of what was written."""
    return {
        path.name: checksum(path)
        for path in sorted(directory.iterdir())
        if path.name not in (MANIFEST_FILE, PROGRESS_FILE)
    }


def _write_progress(directory: Path, num_done: int, files: Mapping[str, Any]) -> None:
    # Two builders, which on two nodes may have one process id, must not write the same temporary
    # file; and what a kill leaves of it must not lie in the directory, which bundles copy.
    temporary = hidden_beside(directory)
    try:
        with temporary.open("w") as stream:
            json.dump({"num_encoded": num_done, "files": files}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(directory / PROGRESS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
