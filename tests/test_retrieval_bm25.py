from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, DataError
from rlrag.records import Passage
from rlrag.retrieval.bm25 import BM25Retriever, open_bm25
from rlrag.retrieval.manifest import Manifest
from rlrag.retrieval.protocol import Retriever, best_rows
from rlrag.retrieval.words import split_words

TEXTS = (
    ("Niger", "Niger is a landlocked country. Its capital is Niamey."),
    ("Nigeria", "Nigeria has its capital in Abuja; Lagos is the largest city of Nigeria."),
    ("Guinea", "The capital of Guinea is Conakry, a port city."),
    ("Guinea-Bissau", "Bissau is the capital."),
    ("", "of the and"),
    ("France", "Paris, Paris, Paris!"),
)


def toy_corpus(texts: tuple[tuple[str, str], ...] = TEXTS) -> MemoryCorpus:
    return MemoryCorpus(Passage(f"p{i}", title, text) for i, (title, text) in enumerate(texts))


def open_toy(directory: Path, corpus: MemoryCorpus, k1: float, b: float) -> BM25Retriever:
    manifest = Manifest("bm25", corpus.content_hash, len(corpus), parameters={"k1": k1, "b": b})
    return open_bm25(corpus, directory / manifest.directory_name, manifest)


def score_by_formula(question: str, passages: list[str], k1: float, b: float, row: int) -> float:
    documents = [split_words(text) for text in passages]
    average = sum(len(words) for words in documents) / len(documents)
    total = 0.0
    for word in split_words(question):
        df = sum(word in words for words in documents)
        tf = documents[row].count(word)
        if not tf:
            continue
        idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
        total += idf * tf / (tf + k1 * (1 - b + b * len(documents[row]) / average))
    return total


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (1.2, 0.0), (2.0, 1.0)])
def test_scores_equal_the_formula(tmp_path: Path, k1: float, b: float) -> None:
    corpus = toy_corpus()
    retriever = open_toy(tmp_path, corpus, k1, b)
    assert isinstance(retriever, Retriever)
    questions = ["capital of Guinea", "largest city of Nigeria, Nigeria?", "Paris", "xylophone"]
    rows_BN = np.tile(np.arange(len(corpus)), (len(questions), 1))
    expected = [
        [
            score_by_formula(question, [passage.contents for passage in corpus], k1, b, row)
            for row in range(len(corpus))
        ]
        for question in questions
    ]
    scores_BN = retriever.scores(questions, rows_BN)
    assert scores_BN.dtype == np.float32
    np.testing.assert_allclose(scores_BN, expected, rtol=1e-5)


def test_one_score_by_hand(tmp_path: Path) -> None:
    # Two passages of two words each: idf(red) = ln(1 + 1.5/1.5) = ln 2; tf part = 2 / (2 + 1).
    corpus = toy_corpus((("", "red red"), ("", "blue sky")))
    retriever = open_toy(tmp_path, corpus, 1.0, 0.5)
    hits = retriever.search(["red"], 2)
    assert hits.rows_BK.tolist() == [[0, 1]]
    np.testing.assert_allclose(hits.scores_BK, [[math.log(2) * 2 / 3, 0.0]], rtol=1e-6)


def test_search_is_ordered_and_agrees_with_scores(tmp_path: Path) -> None:
    corpus = toy_corpus()
    retriever = open_toy(tmp_path, corpus, 0.9, 0.4)
    questions = ["capital of Guinea", "Paris"]
    hits = retriever.search(questions, 4)
    assert corpus[int(hits.rows_BK[0, 0])].title == "Guinea"
    assert np.all(np.diff(hits.scores_BK, axis=1) <= 0)
    np.testing.assert_array_equal(hits.scores_BK, retriever.scores(questions, hits.rows_BK))


def test_ties_and_unknown_words_go_to_the_lower_row(tmp_path: Path) -> None:
    corpus = toy_corpus((("", "sky"), ("", "sea"), ("", "sea"), ("", "sky"), ("", "sea")))
    retriever = open_toy(tmp_path, corpus, 0.9, 0.4)
    assert retriever.search(["sea"], 2).rows_BK.tolist() == [[1, 2]]
    assert retriever.search(["sky"], 4).rows_BK.tolist() == [[0, 3, 1, 2]]
    unknown = retriever.search(["xylophone", "", "the of"], 3)
    assert unknown.rows_BK.tolist() == [[0, 1, 2]] * 3
    assert not unknown.scores_BK.any()
    assert retriever.search([], 3).rows_BK.shape == (0, 3)


def test_index_read_from_disk_equals_the_built_one(tmp_path: Path) -> None:
    corpus = toy_corpus()
    built = open_toy(tmp_path, corpus, 0.9, 0.4).search(["capital city"], 6)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    loaded = open_toy(tmp_path, corpus, 0.9, 0.4).search(["capital city"], 6)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    np.testing.assert_array_equal(built.rows_BK, loaded.rows_BK)
    np.testing.assert_array_equal(built.scores_BK, loaded.scores_BK)


def test_a_corpus_without_words_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 2 passages"):
        open_toy(tmp_path, toy_corpus((("", "the"), ("", "a ..."))), 0.9, 0.4)
    assert list(tmp_path.iterdir()) == []


def test_more_hits_than_passages_is_refused(tmp_path: Path) -> None:
    retriever = open_toy(tmp_path, toy_corpus(), 0.9, 0.4)
    with pytest.raises(ConfigError, match=r"7 candidates .* 6 passages"):
        retriever.search(["capital"], 7)


def test_best_rows_equals_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores_P = rng.integers(0, 4, size=rng.integers(1, 12)).astype(np.float32)
        k = int(rng.integers(1, len(scores_P) + 1))
        expected = sorted(range(len(scores_P)), key=lambda row, s=scores_P: (-s[row], row))[:k]
        assert best_rows(scores_P, k).tolist() == expected


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (2.0, 1.0)])
def test_the_index_is_the_one_that_the_library_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, k1: float, b: float
) -> None:
    import bm25s

    monkeypatch.setattr("rlrag.retrieval.bm25._BLOCK_PASSAGES", block)
    rng = np.random.default_rng(0)
    # Some passages have no word; some words are in nearly all, most in few.
    texts = [
        " ".join(f"word{w}" for w in rng.zipf(1.4, rng.integers(0, 30)) % 97) for _ in range(100)
    ]
    corpus = toy_corpus(tuple(("", text) for text in texts))
    ours = open_toy(tmp_path, corpus, k1, b)._index
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in split_words(t)] for t in texts]
    theirs = bm25s.BM25(k1=k1, b=b, method="lucene")
    theirs.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    assert ours.vocab_dict == theirs.vocab_dict
    assert ours.scores["num_docs"] == theirs.scores["num_docs"] == 100
    for name in ("indptr", "indices", "data"):
        assert ours.scores[name].dtype == theirs.scores[name].dtype
    np.testing.assert_array_equal(ours.scores["indptr"], theirs.scores["indptr"])
    np.testing.assert_array_equal(ours.scores["indices"], theirs.scores["indices"])
    np.testing.assert_allclose(ours.scores["data"], theirs.scores["data"], rtol=2e-7)


def test_only_the_index_is_left_on_disk(tmp_path: Path) -> None:
    open_toy(tmp_path, toy_corpus(), 0.9, 0.4)
    (directory,) = tmp_path.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == [
        "data.csc.index.npy",
        "indices.csc.index.npy",
        "indptr.csc.index.npy",
        "manifest.json",
        "params.index.json",
        "vocab.index.json",
    ]
