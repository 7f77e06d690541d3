"""Semi-parametric retrieval: an on-disk index of sparse vocabulary vectors, and its search.

The whole search of the semi-parametric retriever (SiDR; OpenRAG, arXiv 2503.08398): the inner
product of sparsified question and passage vectors. While the encoder is in training, its passages'
vectors go stale; then `late_parametric` retrieves through the bags of tokens instead.

The directory holds the rows of `sparse_rows`; it is filled chunk by chunk and resumed after a stop.

Shape letters: B questions, K hits, N given rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from rlrag.data.corpus import Corpus
from rlrag.retrieval.chunked_build import fill_in_chunks
from rlrag.retrieval.manifest import Manifest, check_manifest, staged_directory
from rlrag.retrieval.protocol import Hits
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.retrieval.vocabulary.sparse_rows import SparseRows, read_rows, write_rows

CHUNK_PASSAGES = 1024


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
        with staged_directory(directory, manifest, is_finished=False):
            pass
    check_manifest(directory, manifest)
    fill_in_chunks(
        directory,
        len(corpus),
        CHUNK_PASSAGES,
        partial(_encode_chunk, corpus, encoder),
        partial(write_rows, directory, binary=False),
    )
    return read_rows(directory, len(corpus), encoder.size, binary=False)


def _encode_chunk(corpus: Corpus, encoder: VocabularyEncoder, start: int, end: int) -> csr_array:
    return encoder.encode([corpus[row].contents for row in range(start, end)], "passage")


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
