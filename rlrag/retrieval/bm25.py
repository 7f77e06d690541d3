"""A corpus to a BM25 index on disk, and questions to its best passages.

The score is BM25 in the form that the bm25s library calls "lucene" (Kamphuis et al. 2020, "Which
BM25 Do You Mean?", row "Lucene (accurate)"), summed over the words w of the question, repeated
words counted each time:

    score(q, d) = sum_w  idf_w * tf_wd / (tf_wd + k1 * (1 - b + b * len_d / avg_len))
    idf_w = ln(1 + (P - df_w + 0.5) / (df_w + 0.5))

P passages, df_w passages with w, tf_wd occurrences of w in d, len_d words of d. There is no factor
k1 + 1 in the numerator, and every idf is above zero, so a passage scores zero exactly when it
shares no word with the question.

Words are runs of two or more letters, digits or underscores, lower-cased, without English stop
words and without stemming. Passages are indexed by `Passage.contents`: title and text.

Shape letters: B questions, P passages, K hits, N given rows.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.errors import DataError
from rlrag.retrieval.manifest import Manifest, check_manifest, damaged, staged_directory
from rlrag.retrieval.protocol import Hits, best_rows, check_num_hits

if TYPE_CHECKING:
    import bm25s

logger = logging.getLogger(__name__)

_find_words = re.compile(r"\b\w\w+\b").findall


def _library() -> Any:
    import bm25s

    # bm25s 0.3 sets its own logger to DEBUG, which would reach every handler of the program.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def split_words(text: str) -> list[str]:
    """The words of a text that are indexed, in order.

    Example:
        >>> split_words("What is the capital of Guinea-Bissau?")
        ['what', 'capital', 'guinea', 'bissau']
    """
    stop_words = _stop_words()
    return [word for word in _find_words(text.lower()) if word not in stop_words]


@cache
def _stop_words() -> frozenset[str]:
    from bm25s.stopwords import STOPWORDS_EN

    return frozenset(STOPWORDS_EN)


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
    """Read the corpus once; what stays in memory is four bytes a word and the vocabulary."""
    logger.info("indexing the words of %d passages", len(corpus))
    vocabulary: dict[str, int] = {}
    words_of_passages = [
        array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in split_words(text)])
        for text in (passage.contents for passage in corpus)
    ]
    if not vocabulary:
        raise DataError(
            f"none of the {len(corpus)} passages holds a word that BM25 can index; check that "
            "the corpus has texts, or use retrieval.kind dense"
        )
    index = _library().BM25(k1=k1, b=b, method="lucene")
    index.index((words_of_passages, vocabulary), create_empty_token=False, show_progress=False)
    index.save(directory, show_progress=False)


class BM25Retriever:
    """Ranks passages by the words that they share with the question.

    A question without a known word scores every passage zero: the first rows are then its hits.
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
