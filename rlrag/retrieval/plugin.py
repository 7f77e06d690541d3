"""Adapts a retriever of your own, which returns passage ids or passages with their texts.

It is a class or function `package.module:name` with whichever it wants of `corpus` and options of
its own, and has a method

    search(questions: Sequence[str], k: int) -> one list a question of k pairs (passage, score)

best first, with scores that do not rise. A passage is its id in the corpus, or a
`rlrag.records.Passage`, which the corpus need not have. Where `scores(questions, ids)`, one list of
numbers a question for one list of ids a question, exists too, filters of the service that name ids
work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlrag import plugins
from rlrag.config import RetrievalConfig
from rlrag.data.corpus import NO_CORPUS, Corpus, encode_passage
from rlrag.errors import ConfigError, DataError, RetrievalError, RlragError
from rlrag.records import Passage
from rlrag.retrieval.protocol import Hits


class FewFoundError(RetrievalError):
    """The retriever found fewer passages than it was asked for."""


class PluginRetriever:
    """Rows and scores of what a named retriever finds; implements `Retriever`.

    Args:
        corpus: The passages of the run; `NO_CORPUS` where the retriever brings them all.
        config: `kind` names the retriever, `options` are its own.

    Raises:
        ConfigError: when it cannot be made.
    """

    def __init__(self, corpus: Corpus, config: RetrievalConfig) -> None:
        self._corpus = corpus
        self._kind = config.kind
        offered = {} if corpus is NO_CORPUS else {"corpus": corpus}
        self._part = plugins.make("retriever", config.kind, config.options, **offered)

    @property
    def name(self) -> str:
        """The name that `retrieval.kind` has."""
        return self._kind

    def search(self, questions: Sequence[str], k: int) -> Hits:
        """The best `k` rows of each question.

        Raises:
            FewFoundError: when the retriever found fewer.
            RetrievalError: when it failed, or its result is not as this module says.
        """
        found = self._ask("search", questions, k)
        brought: dict[Passage, int] = {}
        hits = [self._row(*asked, k, brought) for asked in zip(questions, found, strict=True)]
        shape = (len(questions), k)
        return Hits(
            rows_BK=np.array([rows for rows, _ in hits], dtype=np.int64).reshape(shape),
            scores_BK=np.array([scores for _, scores in hits], dtype=np.float32).reshape(shape),
            brought=tuple(brought),
        )

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        """The score of each given row for its question.

        Raises:
            ConfigError: when the retriever has no method `scores`.
            RetrievalError: when it failed, or gave another number of scores.
        """
        if not callable(getattr(self._part, "scores", None)):
            raise ConfigError(
                f"retriever {self._kind!r} has no method 'scores', which filters with ids need; "
                "add it"
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

    def _row(
        self, question: str, hits: Any, k: int, brought: dict[Passage, int]
    ) -> tuple[list[int], list[float]]:
        """Rows and scores of one question's hits, checked; new passages are added to `brought`."""
        who = f"retriever {self._kind!r}, question {question[:60]!r}"
        try:
            pairs = [(passage, float(score)) for passage, score in hits]
        except (TypeError, ValueError) as error:
            raise RetrievalError(
                f"{who}: a result is not a list of pairs (passage, score): {error}"
            ) from error
        if len(pairs) != k:
            kind = FewFoundError if len(pairs) < k else RetrievalError
            raise kind(f"{who}: {len(pairs)} passages were found, but {k} were asked for")
        ids: set[str] = set()
        rows: list[int] = []
        scores: list[float] = []
        for passage, score in pairs:
            passage_id = passage.id if isinstance(passage, Passage) else str(passage)
            row = self._corpus.row_of(passage_id)
            if isinstance(passage, Passage):
                row = self._row_brought(who, passage, row, brought)
            elif row is None:
                raise RetrievalError(
                    f"{who}: the corpus has no passage {passage_id!r}; return an id of the "
                    "corpus, or the passage with its text as a rlrag.records.Passage"
                )
            if not math.isfinite(score) or (scores and score > scores[-1]):
                raise RetrievalError(
                    f"{who}: the score {score} of passage {passage_id!r} is not finite, or "
                    "higher than that of the passage before; sort by descending score"
                )
            ids.add(passage_id)
            rows.append(row)
            scores.append(score)
        if len(ids) < k:
            raise RetrievalError(
                f"{who}: a result has the same passage twice; return each passage once"
            )
        return rows, scores

    def _row_brought(
        self, who: str, passage: Passage, row: int | None, brought: dict[Passage, int]
    ) -> int:
        """The row of a passage that came with its text: in the corpus, or else behind it."""
        texts = (passage.id, passage.title, passage.text)
        if not all(isinstance(text, str) for text in texts) or not passage.id:
            raise RetrievalError(f"{who}: {passage!r} needs an id, a title and a text, each a str")
        if not passage.text.strip():
            raise RetrievalError(f"{who}: passage {passage.id!r} has an empty text; give it one")
        try:
            encode_passage(passage)
        except DataError as error:
            raise RetrievalError(f"{who}: {error}") from error
        if row is None:
            return brought.setdefault(passage, len(self._corpus) + len(brought))
        if self._corpus[row] != passage:
            raise RetrievalError(
                f"{who}: passage {passage.id!r} has another title or text than in the corpus; "
                "return only the id, or give the passage an id that the corpus does not use"
            )
        return row
