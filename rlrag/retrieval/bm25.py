"""BM25: builds an on-disk index and searches it.

The score is BM25 in the form that the bm25s library calls "lucene" (Kamphuis et al. 2020, "Which
BM25 Do You Mean?", row "Lucene (accurate)"), summed over the words w of the question, repeated
words counted each time:

    score(q, d) = sum_w  idf_w * tf_wd / (tf_wd + k1 * (1 - b + b * len_d / avg_len))
    idf_w = ln(1 + (P - df_w + 0.5) / (df_w + 0.5))

P passages, df_w passages with w, tf_wd occurrences of w in d, len_d words of d. There is no factor
k1 + 1 in the numerator, and every idf is above zero, so a passage scores zero exactly when it
shares no word with the question.

`words.py` says what a word is. Passages are indexed by `Passage.contents`: title and text.

The library reads and searches the index; building it is done here, in the library's layout and to
the library's numbers, as the library holds a corpus many times over while it builds. The postings
(eight bytes for each pair of a word and a passage that holds it) are resident until they are saved,
as they are the index. Beside them there are the vocabulary, eight bytes a passage, and one block of
passages: the words of the corpus wait in a file.

Shape letters: B questions, P passages, K hits, N given rows, V words, J postings of one block.
"""

from __future__ import annotations

import logging
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError
from rlrag.retrieval.manifest import Manifest, check_manifest, damaged, staged_directory
from rlrag.retrieval.protocol import Hits, best_rows, check_num_hits
from rlrag.retrieval.words import split_words

if TYPE_CHECKING:
    import bm25s

logger = logging.getLogger(__name__)

_BLOCK_PASSAGES = 2048
_COUNT_TYPE = np.dtype(np.int32)


def _library() -> Any:
    import bm25s

    # bm25s 0.3 sets its own logger to DEBUG, which would reach every handler of the program.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def open_bm25(corpus: Corpus, directory: Path, manifest: Manifest) -> BM25Retriever:
    """Load the index in `directory`, after building it where there is none.

    Raises:
        IndexMismatchError: when the directory belongs to something else or is damaged.
        DataError: when no passage holds a word.
    """
    if not directory.exists():
        with staged_directory(directory, manifest) as staging:
            _build(corpus, manifest.parameters["k1"], manifest.parameters["b"], staging)
    check_manifest(directory, manifest)
    try:
        index = _library().BM25.load(directory, mmap=True, show_progress=False)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(directory / "params.index.json", error) from error
    return BM25Retriever(index)


def _build(corpus: Corpus, k1: float, b: float, directory: Path) -> None:
    logger.info("indexing the words of %d passages", len(corpus))
    # Without a name, so that it is gone after a kill too.
    with tempfile.TemporaryFile(dir=directory) as spill:
        counted = _count_words(corpus, spill)
        if not counted.vocabulary:
            raise DataError(
                f"none of the {len(corpus)} passages contains a word that BM25 can index; check "
                "that the corpus has texts, or use retrieval.kind dense"
            )
        scores = counted.scores(k1, b)
    index = _library().BM25(k1=k1, b=b, method="lucene")
    index.scores, index.vocab_dict = scores, counted.vocabulary
    index.nonoccurrence_array = None  # only other methods than "lucene" have one
    index.save(directory, show_progress=False)


def _count_words(corpus: Corpus, spill: IO[bytes]) -> _CountedCorpus:
    """Read the corpus once; the number and the occurrences of each word go to the file."""
    vocabulary: dict[str, int] = {}
    lengths, num_distinct = array("i"), array("i")
    for passage in corpus:
        words = split_words(passage.contents)
        counts = Counter([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        lengths.append(len(words))
        num_distinct.append(len(counts))
        spill.write(array("i", chain.from_iterable(counts.items())).tobytes())
    spill.flush()
    return _CountedCorpus(
        vocabulary,
        np.array(lengths, dtype=_COUNT_TYPE),
        np.array(num_distinct, dtype=_COUNT_TYPE),
        spill,
    )


@dataclass(frozen=True)
class _CountedCorpus:
    """The words of each passage and how often they occur, in a file; the rest in memory."""

    vocabulary: dict[str, int]
    lengths_P: np.ndarray
    num_distinct_P: np.ndarray
    spill: IO[bytes]

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Passage, word and occurrences of each posting, a block of passages after the other."""
        self.spill.seek(0)
        for first in range(0, len(self.lengths_P), _BLOCK_PASSAGES):
            distinct = self.num_distinct_P[first : first + _BLOCK_PASSAGES]
            stored = self.spill.read(2 * _COUNT_TYPE.itemsize * int(distinct.sum()))
            words_J, counts_J = np.frombuffer(stored, dtype=_COUNT_TYPE).reshape(-1, 2).T
            yield np.arange(first, first + len(distinct)).repeat(distinct), words_J, counts_J

    def scores(self, k1: float, b: float) -> dict[str, Any]:
        """The score of every posting, word by word and within a word by passage.

        In the library's layout: the postings of word v are `indptr[v]` to `indptr[v + 1]`, in
        `indices` the passages, in `data` the scores, which are computed in double precision.
        """
        num_passages = len(self.lengths_P)
        df_V = np.zeros(len(self.vocabulary), dtype=np.int64)
        for _, words_J, _ in self._blocks():
            df_V += np.bincount(words_J, minlength=len(df_V))
        idf_V = np.log(1 + (num_passages - df_V + 0.5) / (df_V + 0.5)).astype(np.float32)
        indptr = np.concatenate(([0], np.cumsum(df_V)))
        data = np.empty(indptr[-1], dtype=np.float32)
        indices = np.empty(indptr[-1], dtype=np.int32)
        free_V = indptr[:-1].copy()
        average = self.lengths_P.mean()
        for rows_J, words_J, counts_J in self._blocks():
            order_J = np.argsort(words_J, kind="stable")
            rows_J, words_J, counts_J = rows_J[order_J], words_J[order_J], counts_J[order_J]
            found, starts, runs = np.unique(words_J, return_index=True, return_counts=True)
            places_J = np.arange(len(words_J)) + (free_V[found] - starts).repeat(runs)
            free_V[found] += runs
            norm_J = k1 * ((1 - b) + b * self.lengths_P[rows_J] / average)
            data[places_J] = idf_V[words_J] * (counts_J / (norm_J + counts_J))
            indices[places_J] = rows_J
        return {"data": data, "indices": indices, "indptr": indptr, "num_docs": num_passages}


class BM25Retriever:
    """Ranks passages by the words that they share with the question.

    A question without a known word scores every passage zero: the first rows are then its hits, of
    which `tables.warn_of_unmatched` tells.
    """

    name = "bm25"

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index
        self._num_passages = int(index.scores["num_docs"])

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question."""
        check_num_hits(k, self._num_passages)
        rows_BK = np.zeros((len(questions), k), dtype=np.int64)
        scores_BK = np.zeros((len(questions), k), dtype=np.float32)
        for position, question in enumerate(questions):
            scores_P = self._scores(question)
            rows_BK[position] = best_rows(scores_P, k)
            scores_BK[position] = scores_P[rows_BK[position]]
        return Hits(rows_BK, scores_BK)

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The score of each given row for its question."""
        scores_BN = np.zeros(rows_BN.shape, dtype=np.float32)
        for position, question in enumerate(questions):
            scores_BN[position] = self._scores(question)[rows_BN[position]]
        return scores_BN

    def _scores(self, question: str) -> np.ndarray:
        return self._index.get_scores_from_ids(self._index.get_tokens_ids(split_words(question)))
