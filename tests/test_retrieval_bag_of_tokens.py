"""Bags of tokens: the search against a loop over sets, and the files that it reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, DataError, IndexMismatchError, SetupError
from rlrag.records import Passage
from rlrag.retrieval.vocabulary import bag_of_tokens, sparse_rows
from rlrag.retrieval.vocabulary.bag_of_tokens import open_bag_of_tokens
from rlrag.retrieval.vocabulary.sparse_rows import SparseRows

NUM_WORDS = 40


class NumberedWords:
    """The token of the word `w7` is 7; counts the texts that it reads."""

    size = NUM_WORDS

    def __init__(self, bags_identity: str = "numbers", full_at: int | None = None) -> None:
        self.bags_identity = bags_identity
        self.num_texts = 0
        self._full_at = full_at

    def bags(self, texts: Sequence[str]) -> csr_array:
        self.num_texts += len(texts)
        if self._full_at is not None and self.num_texts > self._full_at:
            raise OSError(28, "No space left on device")
        bags = np.zeros((len(texts), self.size), dtype=np.float32)
        for row, text in enumerate(texts):
            bags[row, list(words_of(text))] = 1
        return csr_array(bags)


def words_of(text: str) -> set[int]:
    return {int(word[1:]) for word in text.split() if word.startswith("w")}


def corpus_of(num_passages: int, seed: int = 0) -> MemoryCorpus:
    """Passages with up to nine words, some without one, many with the same."""
    generator = np.random.default_rng(seed)
    texts = [
        " ".join(f"w{word}" for word in generator.integers(0, NUM_WORDS, generator.integers(0, 9)))
        for _ in range(num_passages)
    ]
    return MemoryCorpus(Passage(f"p{i}", "", text or "-") for i, text in enumerate(texts))


def vectors_of(num: int, seed: int = 1) -> np.ndarray:
    """Positive vectors with half of their entries zero, in sixteenths, so that sums are exact."""
    generator = np.random.default_rng(seed)
    vectors = generator.integers(1, 99, (num, NUM_WORDS)) / 16
    return (vectors * (generator.random(vectors.shape) < 0.5)).astype(np.float32)


def loop_over_sets(corpus: MemoryCorpus, vectors_BV: np.ndarray, k: int) -> np.ndarray:
    """Rows ranked by the sum of the vector over each passage's set of words, lower rows first."""
    rows_BK = []
    for vector_V in vectors_BV:
        scores = [sum(vector_V[word] for word in words_of(each.contents)) for each in corpus]
        rows_BK.append(sorted(range(len(corpus)), key=lambda row: (-scores[row], row))[:k])
    return np.array(rows_BK)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "many blocks":
        monkeypatch.setattr(sparse_rows, "_BLOCK_ROWS", 17)
        monkeypatch.setattr(sparse_rows, "_BLOCK_QUESTIONS", 3)
        monkeypatch.setattr(bag_of_tokens, "_CHUNK_PASSAGES", 50)
    return request.param


@pytest.mark.parametrize("k", [1, 10, 60, 120])
def test_search_equals_a_loop_over_sets(tmp_path: Path, blocks: str, k: int) -> None:
    corpus = corpus_of(120)
    index = open_bag_of_tokens(corpus, NumberedWords(), tmp_path)
    vectors_BV = vectors_of(8)
    hits = index.search_vectors(vectors_BV, k)
    np.testing.assert_array_equal(hits.rows_BK, loop_over_sets(corpus, vectors_BV, k))
    assert (hits.rows_BK.dtype, hits.scores_BK.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(hits.scores_BK, index.scores(vectors_BV, hits.rows_BK))
    sparse = index.search_vectors(csr_array(vectors_BV), k)
    np.testing.assert_array_equal(sparse.rows_BK, hits.rows_BK)
    np.testing.assert_array_equal(sparse.scores_BK, hits.scores_BK)


def test_a_bag_as_question_counts_the_shared_tokens(tmp_path: Path, blocks: str) -> None:
    corpus = corpus_of(90)
    words = NumberedWords()
    index = open_bag_of_tokens(corpus, words, tmp_path)
    question = "w1 w2 w3 w5 w8 w13"
    hits = index.search_vectors(words.bags([question]), len(corpus))
    shared = [len(words_of(question) & words_of(passage.contents)) for passage in corpus]
    assert hits.scores_BK[0].tolist() == [shared[row] for row in hits.rows_BK[0]]
    assert hits.rows_BK[0].tolist() == sorted(range(90), key=lambda row: (-shared[row], row))


def test_scores_of_any_rows(tmp_path: Path) -> None:
    corpus = corpus_of(60)
    index = open_bag_of_tokens(corpus, NumberedWords(), tmp_path)
    vectors_BV = vectors_of(4)
    rows_BN = np.random.default_rng(0).integers(0, 60, (4, 11))
    expected = [
        [sum(vector[word] for word in words_of(corpus[int(row)].contents)) for row in rows]
        for vector, rows in zip(vectors_BV, rows_BN, strict=True)
    ]
    np.testing.assert_array_equal(index.scores(vectors_BV, rows_BN), np.array(expected))
    np.testing.assert_array_equal(index.scores(csr_array(vectors_BV), rows_BN), np.array(expected))


def test_no_questions_and_too_many_hits(tmp_path: Path) -> None:
    index = open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path)
    assert len(index) == 20
    empty = np.zeros((0, NUM_WORDS), dtype=np.float32)
    assert index.search_vectors(empty, 5).rows_BK.shape == (0, 5)
    with pytest.raises(
        ConfigError, match="21 candidates were requested from a corpus of 20 passages"
    ):
        index.search_vectors(vectors_of(1), 21)


def test_rows_with_values_are_searched_alike(blocks: str) -> None:
    rows = csr_array(vectors_of(50, seed=3))
    found = SparseRows(rows.indptr[1:].astype(np.int64), rows.indices, rows.data, NUM_WORDS)
    vectors_BV = vectors_of(7)
    scores_BP = vectors_BV.astype(np.float64) @ rows.toarray().T.astype(np.float64)
    hits = found.search_vectors(vectors_BV, 20)
    np.testing.assert_array_equal(
        hits.rows_BK, np.argsort(-scores_BP, axis=1, kind="stable")[:, :20]
    )
    np.testing.assert_array_equal(hits.scores_BK, -np.sort(-scores_BP, axis=1)[:, :20])


def test_it_is_made_once_and_anew_for_other_tokens_or_passages(tmp_path: Path) -> None:
    open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path)
    again = NumberedWords()
    open_bag_of_tokens(corpus_of(20), again, tmp_path)
    assert again.num_texts == 0
    others = [(corpus_of(20), NumberedWords("others")), (corpus_of(20, seed=9), NumberedWords())]
    for corpus, words in others:
        open_bag_of_tokens(corpus, words, tmp_path)
        assert words.num_texts == 20
    assert len(list(tmp_path.iterdir())) == 3


def test_an_index_of_another_corpus_in_its_place_is_refused(tmp_path: Path) -> None:
    open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path / "ours")
    open_bag_of_tokens(corpus_of(20, seed=9), NumberedWords(), tmp_path / "theirs")
    (ours,), (theirs,) = ((tmp_path / each).iterdir() for each in ("ours", "theirs"))
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(
        IndexMismatchError, match=f"index {ours} was built from something else.*corpus_hash is"
    ):
        open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("columns.bin", None, "columns.bin is damaged: it has"),
        ("row_ends.bin", None, "row_ends.bin is damaged: it has"),
        ("columns.bin", b"\xff", "columns.bin is damaged: its bytes are others"),
        (
            "row_ends.bin",
            b"\xff",
            "row_ends.bin is damaged: its bytes are others",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path)
    (file,) = tmp_path.glob(f"*/{name}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] if content is None else content * 16 + whole[16:])
    with pytest.raises(IndexMismatchError, match=message):
        open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path)
    shutil.rmtree(file.parent)
    open_bag_of_tokens(corpus_of(20), NumberedWords(), tmp_path)


def test_a_corpus_without_tokens_and_a_full_disk_leave_nothing(tmp_path: Path) -> None:
    empty = MemoryCorpus([Passage("p0", "", "-"), Passage("p1", "", "?")])
    with pytest.raises(DataError, match="none of the 2 passages contains a token"):
        open_bag_of_tokens(empty, NumberedWords(), tmp_path)
    with pytest.raises(SetupError, match=r"cannot write .*No space left on device"):
        open_bag_of_tokens(corpus_of(20), NumberedWords(full_at=5), tmp_path)
    assert list(tmp_path.iterdir()) == []
