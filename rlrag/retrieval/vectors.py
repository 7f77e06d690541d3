"""A corpus to a memory map of its vectors: encoded in chunks, resumed after a stop.

The directory holds `vectors.npy` (float32, one row a passage, at its full size from the start) and
`progress.json` with the number of rows that are safe on disk. Rows are written with ordinary file
writes: a full disk is then an error that can be caught, and the memory that a build takes does not
grow with the corpus.

Two processes that build the same directory at once do no harm: each writes the same rows.

Shape letters: P passages, B passages of a chunk, D vector length.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError, SetupError
from rlrag.retrieval.encoder import Encoder
from rlrag.retrieval.manifest import (
    Manifest,
    cannot_write,
    check_manifest,
    damaged,
    staged_directory,
)

logger = logging.getLogger(__name__)

VECTORS_FILE = "vectors.npy"
PROGRESS_FILE = "progress.json"
# Large enough that sorting by length saves padding, small enough that a stop loses little.
CHUNK_PASSAGES = 1024
_LOG_EVERY_S = 10.0


def open_vectors(
    corpus: Corpus, encoder: Encoder, directory: Path, manifest: Manifest
) -> np.ndarray:
    """The vectors of all passages, shape (P, D), as a read-only memory map.

    Encodes what is missing. Chunks begin at the same rows in every run, so a build that was
    stopped and taken up again gives the bytes of one that was not.

    Raises:
        IndexMismatchError: when the directory belongs to something else or is damaged.
        SetupError: when the disk has no room.
    """
    if not directory.exists():
        _lay_out(len(corpus), encoder.size, directory, manifest)
    check_manifest(directory, manifest)
    num_done = _read_progress(directory, len(corpus))
    if num_done < len(corpus):
        _encode_from(num_done, corpus, encoder, directory)
    try:
        return np.load(directory / VECTORS_FILE, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise damaged(directory / VECTORS_FILE, error) from error


def _lay_out(num_passages: int, size: int, directory: Path, manifest: Manifest) -> None:
    with staged_directory(directory, manifest) as staging:
        num_bytes = num_passages * size * 4
        free = shutil.disk_usage(staging).free
        if free < num_bytes:
            raise SetupError(
                f"the vectors of {num_passages} passages take {num_bytes / 2**30:.2f} GiB, but "
                f"{directory.parent} has {free / 2**30:.2f} GiB free; free space or choose "
                "another cache directory"
            )
        with (staging / VECTORS_FILE).open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_passages, size)}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + num_bytes)


def _read_progress(directory: Path, num_passages: int) -> int:
    path = directory / PROGRESS_FILE
    if not path.exists():
        return 0
    try:
        num_done = int(json.loads(path.read_text())["num_encoded"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if not 0 <= num_done <= num_passages:
        raise damaged(path, f"it counts {num_done} of {num_passages} passages")
    return num_done


def _write_progress(directory: Path, num_done: int) -> None:
    # One name a process: two builders of one directory must not write the same temporary file.
    temporary = directory / f".{PROGRESS_FILE}-{os.getpid()}"
    with temporary.open("w") as stream:
        json.dump({"num_encoded": num_done}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(directory / PROGRESS_FILE)


def _encode_from(first_row: int, corpus: Corpus, encoder: Encoder, directory: Path) -> None:
    num_passages = len(corpus)
    logger.info("encoding passages %d to %d into %s", first_row, num_passages, directory)
    started = last_logged = time.monotonic()
    for start in range(first_row, num_passages, CHUNK_PASSAGES):
        end = min(start + CHUNK_PASSAGES, num_passages)
        vectors_BD = _encode_chunk(corpus, encoder, start, end)
        try:
            _write_rows(directory / VECTORS_FILE, start, vectors_BD)
            _write_progress(directory, end)
        except OSError as error:
            raise cannot_write(directory, error) from error
        now = time.monotonic()
        if now - last_logged >= _LOG_EVERY_S or end == num_passages:
            last_logged = now
            rate = (end - first_row) / max(now - started, 1e-9)
            logger.info(
                "encoded %d of %d passages, %.0f a second, %.0f s left",
                *(end, num_passages, rate, (num_passages - end) / rate),
            )


def _write_rows(path: Path, start: int, vectors_BD: np.ndarray) -> None:
    with path.open("r+b") as stream:
        np.lib.format.read_magic(stream)
        np.lib.format.read_array_header_1_0(stream)
        stream.seek(stream.tell() + start * vectors_BD[0].nbytes)
        stream.write(vectors_BD.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _encode_chunk(corpus: Corpus, encoder: Encoder, start: int, end: int) -> np.ndarray:
    texts = [corpus[row].contents for row in range(start, end)]
    vectors_BD = np.ascontiguousarray(encoder.encode(texts), dtype="<f4")
    if vectors_BD.shape != (end - start, encoder.size) or not np.isfinite(vectors_BD).all():
        raise DataError(
            f"the encoder made an array of shape {vectors_BD.shape} from passages {start} to "
            f"{end}; expected finite numbers of shape {(end - start, encoder.size)}"
        )
    return vectors_BD
