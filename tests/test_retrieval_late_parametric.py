"""Retrieval without an index of its own, against a search through the whole corpus."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.dense.search import DenseRetriever
from rlrag.retrieval.trainable.late_parametric import (
    FrozenIndex,
    LateParametricRetriever,
    RetrieverProposals,
)
from rlrag.retrieval.trainable.protocol import Embedded, Role

SIZE = 16
WORDS = ("red", "green", "blue", "old", "new", "boat", "house", "tree", "fish", "bird", "stone")
QUESTIONS = ["red boat", "old house tree", "new blue fish", "bird", "stone green green"]


class WordEncoder(torch.nn.Module):
    """Counts of hashed words through a matrix; remembers what it embedded."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        # Whole numbers: sums are exact, so that equal texts tie whatever batch they are in.
        weight = torch.randint(-4, 5, (SIZE, SIZE), generator=generator)
        self.weight = torch.nn.Parameter(weight.float())
        self.embedded: list[tuple[str, Role]] = []
        self.most = 0

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        self.embedded += [(text, role) for text in texts]
        self.most = max(self.most, len(texts))
        counts_BD = torch.zeros(len(texts), SIZE)
        for row, text in enumerate(texts):
            for word in text.split():
                counts_BD[row, zlib.crc32(word.encode()) % SIZE] += 1
        return Embedded(counts_BD @ self.weight)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(texts, "passage").vectors_BD.detach().numpy().astype(np.float64)


class Proposing:
    """Proposes the rows that a test names; remembers the vectors that it was given."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._rows_BM = np.array(rows)
        self.vectors: list[np.ndarray] = []

    def propose(self, questions, vectors_BD, m):
        self.vectors.append(vectors_BD)
        return self._rows_BM[: len(questions), :m]


def make_corpus(num: int = 30, seed: int = 0) -> MemoryCorpus:
    rng = np.random.default_rng(seed)
    return MemoryCorpus(
        Passage(f"p{n}", "", " ".join(rng.choice(WORDS, rng.integers(1, 9)))) for n in range(num)
    )


def everything(corpus: MemoryCorpus) -> Proposing:
    """Proposes the whole corpus, each question in another order."""
    rng = np.random.default_rng(1)
    return Proposing([rng.permutation(len(corpus)) for _ in QUESTIONS])


def brute_force(
    encoder: WordEncoder, corpus: MemoryCorpus, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best rows of the corpus in a loop, the lower row first among equals."""
    passages = encoder.vectors([passage.contents for passage in corpus])
    rows, scores = [], []
    for vector in encoder.vectors(QUESTIONS):
        found = passages @ vector
        order = sorted(range(len(corpus)), key=lambda row: (-found[row], row))[:k]
        rows.append(order)
        scores.append(found[order])
    return np.array(rows), np.array(scores)


@pytest.mark.parametrize("micro_batch_texts", [1, 7, 100])
@pytest.mark.parametrize("num_proposals", [30, 1000])
def test_with_the_whole_corpus_proposed_it_is_a_full_search(micro_batch_texts, num_proposals):
    corpus, encoder = make_corpus(), WordEncoder()
    retriever = LateParametricRetriever(
        encoder, everything(corpus), corpus, num_proposals, micro_batch_texts
    )
    rows, scores = brute_force(WordEncoder(), corpus, 30)
    found = retriever.search(QUESTIONS)
    assert found.rows_BK.tolist() == rows.tolist()
    assert np.allclose(found.scores_BK, scores)
    assert encoder.most <= micro_batch_texts
    few = retriever.search(QUESTIONS, 4)
    assert few.rows_BK.tolist() == rows[:, :4].tolist()
    assert np.allclose(few.scores_BK, scores[:, :4])


def test_only_what_is_proposed_is_found_and_ranked_anew():
    corpus, encoder = make_corpus(), WordEncoder()
    proposed = [[4, 9, 2], [9, 4, 20], [0, 1, 2], [3, 3 + 1, 8], [29, 5, 9]]
    found = LateParametricRetriever(encoder, Proposing(proposed), corpus, 3).search(QUESTIONS)
    full = brute_force(WordEncoder(), corpus, 30)[0].tolist()
    for rows, of, ranking in zip(found.rows_BK.tolist(), proposed, full, strict=True):
        assert rows == [row for row in ranking if row in of]
    assert found.rows_BK.dtype == np.int64
    assert found.scores_BK.dtype == np.float32


def test_a_passage_is_embedded_once_whoever_it_is_proposed_for():
    corpus, encoder = make_corpus(), WordEncoder()
    proposed = [[4, 9, 2], [9, 4, 20], [2, 9, 4], [20, 2, 4], [9, 20, 2]]
    LateParametricRetriever(encoder, Proposing(proposed), corpus, 3, 2).search(QUESTIONS)
    questions = [text for text, role in encoder.embedded if role == "question"]
    passages = [text for text, role in encoder.embedded if role == "passage"]
    assert questions == QUESTIONS
    assert sorted(passages) == sorted(corpus[row].contents for row in (2, 4, 9, 20))


def test_the_first_stage_gets_the_questions_present_vectors_and_the_ranking_their_weights():
    corpus, encoder = make_corpus(), WordEncoder()
    first_stage = everything(corpus)
    retriever = LateParametricRetriever(encoder, first_stage, corpus, 30)
    before = retriever.search(QUESTIONS)
    with torch.no_grad():
        encoder.weight.copy_(WordEncoder(seed=5).weight)
    after = retriever.search(QUESTIONS)
    assert after.rows_BK.tolist() != before.rows_BK.tolist()
    assert after.rows_BK.tolist() == brute_force(WordEncoder(seed=5), corpus, 30)[0].tolist()
    for given, seed in zip(first_stage.vectors, (0, 5), strict=True):
        assert np.array_equal(given, WordEncoder(seed).vectors(QUESTIONS))


def test_equal_passages_stand_in_the_order_of_their_rows():
    texts = ["red boat", "bird", "red boat", "red boat", "tree", "red boat"]
    corpus = MemoryCorpus(Passage(f"p{n}", "", text) for n, text in enumerate(texts))
    first_stage = Proposing([[5, 2, 4, 0, 1, 3]])
    for micro_batch_texts in (1, 2, 6):
        found = LateParametricRetriever(
            WordEncoder(), first_stage, corpus, 6, micro_batch_texts
        ).search(["red boat"])
        equal = [row for row in found.rows_BK[0].tolist() if texts[row] == "red boat"]
        assert equal == [0, 2, 3, 5]


def test_no_questions_find_nothing():
    corpus, encoder = make_corpus(), WordEncoder()
    retriever = LateParametricRetriever(encoder, everything(corpus), corpus, 5)
    for k, width in ((None, 5), (3, 3), (9, 5)):
        found = retriever.search([], k)
        assert found.rows_BK.shape == found.scores_BK.shape == (0, width)
    assert encoder.embedded == []


def test_no_graph_is_kept():
    corpus, encoder = make_corpus(), WordEncoder()
    first_stage = everything(corpus)
    LateParametricRetriever(encoder, first_stage, corpus, 30).search(QUESTIONS)
    assert encoder.weight.grad is None
    assert all(isinstance(vectors, np.ndarray) for vectors in first_stage.vectors)


def test_bm25_proposes_whatever_the_weights_are(tmp_path):
    corpus = make_corpus(60)
    config = RetrievalConfig(kind="bm25", encoder=None)
    bm25 = open_retrievers(corpus, config, tmp_path).components["bm25"]
    proposed = bm25.search(QUESTIONS, 8).rows_BK
    rankings = []
    for seed in (0, 5):
        retriever = LateParametricRetriever(
            WordEncoder(seed), RetrieverProposals(bm25), corpus, 8, 5
        )
        found = retriever.search(QUESTIONS).rows_BK
        assert np.array_equal(np.sort(found), np.sort(proposed))
        full = brute_force(WordEncoder(seed), corpus, 60)[0].tolist()
        for rows, of, ranking in zip(found.tolist(), proposed.tolist(), full, strict=True):
            assert rows == [row for row in ranking if row in of]
        rankings.append(found.tolist())
    assert rankings[0] != rankings[1]


def test_a_frozen_index_is_searched_with_the_present_vectors():
    """The index holds what the untrained weights made; only the questions' vectors are new."""
    corpus, untrained, present = make_corpus(60), WordEncoder(), WordEncoder(seed=5)
    vectors = untrained.vectors([passage.contents for passage in corpus]).astype(np.float32)
    index = DenseRetriever(untrained, vectors, RetrievalConfig(kind="dense"))
    found = LateParametricRetriever(present, FrozenIndex(index), corpus, 8).search(QUESTIONS)
    full = brute_force(present, corpus, 60)[0].tolist()
    for vector, rows, ranking in zip(
        present.vectors(QUESTIONS), found.rows_BK.tolist(), full, strict=True
    ):
        scores = vectors.astype(np.float64) @ vector
        proposed = sorted(range(60), key=lambda row: (-scores[row], row))[:8]
        assert rows == [row for row in ranking if row in proposed]
