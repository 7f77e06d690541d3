"""Late-parametric retrieval: the encoder in training reranks results of a fixed first stage.

Late-parametric retrieval (OpenRAG, arXiv 2503.08398, section 3.3): a first stage whose index never
changes proposes m passages for the questions' present vectors. Only those are embedded with the
present weights and ranked again. With m the size of the corpus this is a full search.

Shape letters: B questions, M proposed passages, U different passages among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from rlrag.data.corpus import Corpus
from rlrag.retrieval.protocol import Hits, Retriever, in_order
from rlrag.retrieval.trainable.protocol import Role, TrainableEncoder


class FirstStage(Protocol):
    """Proposes passages from an index that does not change with the encoder's weights."""

    def propose(self, questions: Sequence[str], vectors_BD: np.ndarray, m: int) -> np.ndarray:
        """Corpus rows of shape (B, M) for questions with these vectors."""
        ...


class RetrieverProposals:
    """The proposals of a retriever that reads the questions itself, BM25 for one."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    def propose(self, questions: Sequence[str], vectors_BD: np.ndarray, m: int) -> np.ndarray:
        """Corpus rows of shape (B, M); the vectors are not looked at."""
        return self._retriever.search(questions, m).rows_BK


class VectorSearch(Protocol):
    """An index that is searched by vectors."""

    def search_vectors(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """The best `k` rows for each vector."""
        ...


class FrozenIndex:
    """The proposals of an index that was built once, searched with the present vectors."""

    def __init__(self, index: VectorSearch) -> None:
        self._index = index

    def propose(self, questions: Sequence[str], vectors_BD: np.ndarray, m: int) -> np.ndarray:
        """Corpus rows of shape (B, M)."""
        return self._index.search_vectors(vectors_BD, m).rows_BK


class LateParametricRetriever:
    """Ranks the first stage's proposals by the encoder's present weights."""

    def __init__(
        self,
        encoder: TrainableEncoder,
        first_stage: FirstStage,
        corpus: Corpus,
        num_proposals: int,
        micro_batch_texts: int = 32,
    ) -> None:
        self._encoder = encoder
        self._first_stage = first_stage
        self._corpus = corpus
        self._num_proposals = min(num_proposals, len(corpus))
        self._micro_batch_texts = micro_batch_texts

    def search(self, questions: Sequence[str], k: int | None = None) -> Hits:
        """The best `k` of the proposals of each question; all of them when unset.

        A passage that is proposed for several questions is embedded once.
        """
        k = self._num_proposals if k is None else min(k, self._num_proposals)
        if not questions:
            return Hits(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
        question_BD = torch.cat(list(self._embed(questions, "question")))
        rows_BM = self._first_stage.propose(questions, question_BD.numpy(), self._num_proposals)
        rows_U, places_BM = np.unique(rows_BM, return_inverse=True)
        texts = [self._corpus[int(row)].contents for row in rows_U]
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        scores_BU = torch.empty(len(questions), len(texts))
        start = 0
        # A micro batch of passages at a time: in vocabulary space all of them would be large.
        for part_UD in self._embed([texts[place] for place in order], "passage"):
            places = order[start : start + len(part_UD)]
            scores_BU[:, places] = question_BD @ part_UD.T
            start += len(part_UD)
        places_BM = places_BM.reshape(rows_BM.shape)
        return in_order(rows_BM, np.take_along_axis(scores_BU.numpy(), places_BM, axis=1), k)

    def _embed(self, texts: Sequence[str], role: Role) -> Iterator[torch.Tensor]:
        for start in range(0, len(texts), self._micro_batch_texts):
            with torch.no_grad():
                part = texts[start : start + self._micro_batch_texts]
                yield self._encoder.embed(part, role).vectors_BD.float().cpu()
