"""Passage vectors of a corpus in a memory-mapped file, encoded in resumable chunks.

The directory holds `vectors.npy` (float32, one row a passage, at its full size from the start) and
`progress.json` with the number of rows that are safe on disk. Rows are written with ordinary file
writes: a full disk is then an error that can be caught, and the memory that a build takes does not
grow with the corpus.

Two processes that build the same directory at once do no harm: each writes the same rows.

Shape letters: P passages, B passages of a chunk, D vector length.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError, SetupError
from rlrag.retrieval.chunked_build import fill_in_chunks
from rlrag.retrieval.dense.encoder import Encoder
from rlrag.retrieval.manifest import (
    Manifest,
    check_manifest,
    damaged,
    staged_directory,
)

VECTORS_FILE = "vectors.npy"
CHUNK_PASSAGES = 1024


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
    fill_in_chunks(
        directory,
        len(corpus),
        CHUNK_PASSAGES,
        partial(_encode_chunk, corpus, encoder),
        partial(_write_rows, directory / VECTORS_FILE),
    )
    try:
        return np.load(directory / VECTORS_FILE, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise damaged(directory / VECTORS_FILE, error) from error


def _lay_out(num_passages: int, size: int, directory: Path, manifest: Manifest) -> None:
    with staged_directory(directory, manifest, is_finished=False) as staging:
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
            f"the encoder returned an array of shape {vectors_BD.shape} from passages {start} to "
            f"{end}; expected finite numbers of shape {(end - start, encoder.size)}"
        )
    return vectors_BD
