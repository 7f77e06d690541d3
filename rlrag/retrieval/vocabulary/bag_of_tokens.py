"""Bag-of-tokens index of a corpus; training does not change it.

A bag has a 1 for every ordinary token that a passage holds, as often as it may occur. It depends on
the tokenizer alone and on no weights, so that an encoder in training can search it with its present
question vectors (SiDR; OpenRAG, arXiv 2503.08398, section 3.3):

    score(q, d) = sum of v(q)_w over the tokens w of d
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError
from rlrag.retrieval.manifest import Manifest, check_manifest, staged_directory
from rlrag.retrieval.vocabulary.sparse_rows import SparseRows, read_rows, write_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

logger = logging.getLogger(__name__)

_CHUNK_PASSAGES = 2048


class Bags(Protocol):
    """What makes bags of tokens; an encoder into vocabulary space does."""

    @property
    def size(self) -> int:
        """Length of a bag (V)."""
        ...

    @property
    def bags_identity(self) -> str:
        """What determines the bags; equal identities give equal bags."""
        ...

    def bags(self, texts: Sequence[str]) -> csr_array:
        """A 1 for every token of each text, shape (B, V)."""
        ...


def bag_manifest(corpus: Corpus, tokens: Bags) -> Manifest:
    """What the bags of a corpus are made from."""
    parameters = {"tokens": tokens.bags_identity, "size": tokens.size}
    return Manifest("bag_of_tokens", corpus.content_hash, len(corpus), parameters=parameters)


def open_bag_of_tokens(corpus: Corpus, tokens: Bags, indexes_dir: Path) -> SparseRows:
    """Load the bags of the corpus, after making them where there are none.

    Raises:
        DataError: when no passage holds a token.
        IndexMismatchError: when the directory belongs to something else or is damaged.
    """
    manifest = bag_manifest(corpus, tokens)
    directory = indexes_dir / manifest.directory_name
    if not directory.exists():
        logger.info("indexing the tokens of %d passages", len(corpus))
        with staged_directory(directory, manifest) as staging:
            _build(corpus, tokens, staging)
    check_manifest(directory, manifest)
    return read_rows(directory, len(corpus), tokens.size, binary=True)


def _build(corpus: Corpus, tokens: Bags, directory: Path) -> None:
    num_entries = 0
    for start in range(0, len(corpus), _CHUNK_PASSAGES):
        end = min(start + _CHUNK_PASSAGES, len(corpus))
        bags = tokens.bags([corpus[row].contents for row in range(start, end)])
        write_rows(directory, start, bags, binary=True)
        num_entries += bags.nnz
    if not num_entries:
        raise DataError(
            f"none of the {len(corpus)} passages contains a token of the vocabulary; check that "
            "the corpus has texts, and that the encoder is made for their language"
        )
