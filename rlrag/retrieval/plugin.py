"""A retriever of anybody's own, which names the passages that it finds by their ids.

It is a class or function `package.module:name` with whichever it wants of `corpus` and options of
its own, and has a method

    search(questions: Sequence[str], k: int) -> one list a question of k pairs (passage id, score)

best first, with scores that do not rise. Where `scores(questions, ids)`, one list of numbers a
question for one list of ids a question, exists too, filters of the service that name ids work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlrag import plugins
from rlrag.config import RetrievalConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import ConfigError, RetrievalError, RlragError
from rlrag.retrieval.protocol import Hits, check_num_hits


class PluginRetriever:
    """Rows and scores of what a named retriever finds; implements `Retriever`.

    Args:
        corpus: The passages.
        config: `kind` names the retriever, `options` are its own.

    Raises:
        ConfigError: when it cannot be made.
    """

    def __init__(self, corpus: Corpus, config: RetrievalConfig) -> None:
        self._corpus = corpus
        self._kind = config.kind
        self._part = plugins.make("retriever", config.kind, config.options, corpus=corpus)

    @property
    def name(self) -> str:
        """The name that `retrieval.kind` has."""
        return self._kind

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question.

        Raises:
            ConfigError: when the corpus has fewer passages.
            RetrievalError: when the retriever failed, or its result is not as this module says.
        """
        check_num_hits(k, len(self._corpus))
        found = self._ask("search", questions, k)
        hits = [self._row(*asked, k) for asked in zip(questions, found, strict=True)]
        shape = (len(questions), k)
        return Hits(
            rows_BK=np.array([rows for rows, _ in hits], dtype=np.int64).reshape(shape),
            scores_BK=np.array([scores for _, scores in hits], dtype=np.float32).reshape(shape),
        )

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The score of each given row for its question.

        Raises:
            ConfigError: when the retriever has no method `scores`.
            RetrievalError: when it failed, or gave another number of scores.
        """
        if not callable(getattr(self._part, "scores", None)):
            raise ConfigError(
                f"retriever {self._kind!r} has no method 'scores', which filters that name ids "
                "need; add it"
            )
        ids = [[self._corpus[int(row)].id for row in rows_N] for rows_N in rows_BN]
        found = self._ask("scores", questions, ids)
        scores_BN = np.asarray([list(scores) for scores in found], dtype=np.float32)
        if scores_BN.shape != rows_BN.shape:
            raise RetrievalError(
                f"retriever {self._kind!r}: scores gave shape {scores_BN.shape} for ids of shape "
                f"{rows_BN.shape}"
            )
        return scores_BN

    def _ask(self, method: str, questions: Sequence[str], argument: Any) -> list[Any]:
        try:
            found = list(getattr(self._part, method)(list(questions), argument))
        except RlragError:
            raise
        except Exception as error:
            raise RetrievalError(
                f"retriever {self._kind!r}: {method} failed with {type(error).__name__}: {error}"
            ) from error
        if len(found) != len(questions):
            raise RetrievalError(
                f"retriever {self._kind!r}: {method} gave {len(found)} results for "
                f"{len(questions)} questions"
            )
        return found

    def _row(self, question: str, hits: Any, k: int) -> tuple[list[int], list[float]]:
        """Rows and scores of one question's hits, checked."""
        who = f"retriever {self._kind!r}, question {question[:60]!r}"
        try:
            pairs = [(str(passage_id), float(score)) for passage_id, score in hits]
        except (TypeError, ValueError) as error:
            raise RetrievalError(
                f"{who}: a result is no list of pairs (passage id, score): {error}"
            ) from error
        if len(pairs) != k:
            raise RetrievalError(f"{who}: {len(pairs)} passages were found, but {k} were asked for")
        rows: list[int] = []
        scores: list[float] = []
        for passage_id, score in pairs:
            row = self._corpus.row_of(passage_id)
            if row is None:
                raise RetrievalError(f"{who}: the corpus has no passage {passage_id!r}")
            if not math.isfinite(score) or (scores and score > scores[-1]):
                raise RetrievalError(
                    f"{who}: the score {score} of passage {passage_id!r} is not finite, or above "
                    "that of the passage before it; sort by falling scores"
                )
            rows.append(row)
            scores.append(score)
        if len(set(rows)) < k:
            raise RetrievalError(f"{who}: a passage was found twice")
        return rows, scores
