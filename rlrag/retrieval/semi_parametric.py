"""Vectors in vocabulary space of a corpus, on disk, and questions to the passages nearest them.

The whole search of the semi-parametric retriever (SiDR; OpenRAG, arXiv 2503.08398): the inner
product of sparsified question and passage vectors. While the encoder is in training, its passages'
vectors go stale; then `late_parametric` retrieves through the bags of tokens instead.

The directory holds the rows of `sparse_rows` and `progress.json` with the number of rows and
entries that are safe on disk. It is filled chunk by chunk and resumed after a stop; two processes
that fill it at once do no harm, as each writes the same bytes at the same places.

Shape letters: B questions, K hits, N given rows, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from rlrag.data.corpus import Corpus
from rlrag.retrieval.manifest import (
    Manifest,
    cannot_write,
    check_manifest,
    damaged,
    staged_directory,
)
from rlrag.retrieval.protocol import Hits
from rlrag.retrieval.sparse_rows import SparseRows, read_rows, write_rows
from rlrag.retrieval.vocabulary_encoder import VocabularyEncoder

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
# Large enough that sorting by length saves padding, small enough that a stop loses little.
CHUNK_PASSAGES = 1024
_LOG_EVERY_S = 10.0


def vocabulary_manifest(
    corpus: Corpus, encoder: VocabularyEncoder, encoder_name: str | None = None
) -> Manifest:
    """What the vectors of a corpus are made from, with the encoder's weights as they are now."""
    return Manifest(
        "vocabulary_vectors",
        corpus.content_hash,
        len(corpus),
        encoder=encoder_name,
        encoder_identity=encoder.identity,
    )


def open_vocabulary_vectors(
    corpus: Corpus, encoder: VocabularyEncoder, directory: Path, manifest: Manifest
) -> SparseRows:
    """The vectors of all passages, read from disk; what is missing is encoded.

    Raises:
        IndexMismatchError: when the directory belongs to something else, to other weights for one,
            or is damaged.
        SetupError: when the disk has no room.
    """
    if not directory.exists():
        with staged_directory(directory, manifest):
            pass
    check_manifest(directory, manifest)
    num_rows, num_entries = _read_progress(directory, len(corpus))
    if num_rows < len(corpus):
        _encode_from(num_rows, num_entries, corpus, encoder, directory)
    return read_rows(directory, len(corpus), encoder.size, binary=False)


def _read_progress(directory: Path, num_passages: int) -> tuple[int, int]:
    path = directory / PROGRESS_FILE
    if not path.exists():
        return 0, 0
    try:
        content = json.loads(path.read_text())
        num_rows, num_entries = int(content["num_rows"]), int(content["num_entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if not 0 <= num_rows <= num_passages or num_entries < 0:
        raise damaged(path, f"it counts {num_rows} of {num_passages} passages")
    return num_rows, num_entries


def _write_progress(directory: Path, num_rows: int, num_entries: int) -> None:
    # One name a process: two builders of one directory must not write the same temporary file.
    temporary = directory / f".{PROGRESS_FILE}-{os.getpid()}"
    with temporary.open("w") as stream:
        json.dump({"num_rows": num_rows, "num_entries": num_entries}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(directory / PROGRESS_FILE)


def _encode_from(
    first_row: int, num_entries: int, corpus: Corpus, encoder: VocabularyEncoder, directory: Path
) -> None:
    num_passages = len(corpus)
    logger.info("encoding passages %d to %d into %s", first_row, num_passages, directory)
    started = last_logged = time.monotonic()
    for start in range(first_row, num_passages, CHUNK_PASSAGES):
        end = min(start + CHUNK_PASSAGES, num_passages)
        rows = encoder.encode([corpus[row].contents for row in range(start, end)], "passage")
        try:
            num_entries = write_rows(directory, start, num_entries, rows, binary=False)
            _write_progress(directory, end, num_entries)
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


class SemiParametricRetriever:
    """Ranks passages by the inner product of their vector in vocabulary space with the question's.

    Args:
        encoder: Encodes questions, with the weights that made the passages' vectors; whoever trains
            an encoder gives a copy. The last batch of questions is remembered, so that `search` and
            `scores` of one batch encode it once.
        passages: Vectors of all passages, as `open_vocabulary_vectors` gives them.
    """

    name = "semi_parametric"

    def __init__(self, encoder: VocabularyEncoder, passages: SparseRows) -> None:
        self.encoder = encoder
        self.passages = passages
        self._last: tuple[tuple[str, ...], csr_array] | None = None

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question."""
        return self.passages.search_vectors(self._vectors(questions), k)

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The inner product of each given row with its question."""
        return self.passages.scores(self._vectors(questions), rows_BN)

    def _vectors(self, questions: Sequence[str]) -> csr_array:
        texts = tuple(questions)
        last = self._last
        if last is None or last[0] != texts:
            last = self._last = (texts, self.encoder.encode(texts, "question"))
        return last[1]
