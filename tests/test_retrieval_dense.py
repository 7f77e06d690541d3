from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlrag.config import BUILTIN_ENCODER, RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, DataError, IndexMismatchError, SetupError
from rlrag.models.directories import resolve_model
from rlrag.records import Passage
from rlrag.retrieval.chunked_build import PROGRESS_FILE
from rlrag.retrieval.dense import index as vector_index_module
from rlrag.retrieval.dense import vectors as vectors_module
from rlrag.retrieval.dense.encoder import EncoderIdentity, TextEncoder
from rlrag.retrieval.dense.index import ivfpq_parameters, open_index
from rlrag.retrieval.dense.search import DenseRetriever
from rlrag.retrieval.dense.vectors import VECTORS_FILE, open_vectors
from rlrag.retrieval.manifest import Manifest
from rlrag.retrieval.protocol import Retriever
from rlrag.retrieval.trainable.protocol import Role


class WordEncoder:
    """Sums one fixed random vector a word; counts its calls and can break at one of them."""

    identity = EncoderIdentity("words", "float32", 99)
    size = 16

    def __init__(self, break_at_call: int | None = None) -> None:
        self.num_calls = 0
        self._break_at_call = break_at_call

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        self.num_calls += 1
        if self.num_calls == self._break_at_call:
            raise KeyboardInterrupt
        sums = [
            sum(
                (
                    np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.size)
                    for word in text.split()
                ),
                start=np.full(self.size, 1e-3),
            )
            for text in texts
        ]
        vectors_BD = np.array(sums, dtype=np.float32).reshape(len(texts), self.size)
        return vectors_BD / np.linalg.norm(vectors_BD, axis=1, keepdims=True)


def unit_vectors(num: int, size: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def dense(vectors_PD: np.ndarray, index: object = None, **settings: object) -> DenseRetriever:
    config = RetrievalConfig.model_validate({"kind": "dense", **settings})
    return DenseRetriever(WordEncoder(), vectors_PD, config, index)


def brute_force(vectors_BD: np.ndarray, vectors_PD: np.ndarray, k: int) -> np.ndarray:
    scores_BP = vectors_BD.astype(np.float64) @ vectors_PD.astype(np.float64).T
    return np.argsort(-scores_BP, axis=1, kind="stable")[:, :k]


def recall(found_BK: np.ndarray, expected_BK: np.ndarray) -> float:
    pairs = zip(found_BK, expected_BK, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def open_built(vectors_PD: np.ndarray, directory: Path, **settings: object) -> DenseRetriever:
    config = RetrievalConfig.model_validate({"kind": "dense", **settings})
    parameters = ivfpq_parameters(*vectors_PD.shape) if config.index == "ivfpq" else {}
    manifest = Manifest(
        config.index,  # type: ignore[arg-type]
        "corpus",
        len(vectors_PD),
        parameters=parameters,
    )
    index = open_index(vectors_PD, config, directory / "index", manifest)
    return DenseRetriever(WordEncoder(), vectors_PD, config, index)


def test_flat_equals_brute_force() -> None:
    vectors_PD, vectors_BD = unit_vectors(3000, 24, 0), unit_vectors(50, 24, 1)
    hits = dense(vectors_PD).search_vectors(vectors_BD, 10)
    expected_BK = brute_force(vectors_BD, vectors_PD, 10)
    np.testing.assert_array_equal(hits.rows_BK, expected_BK)
    expected_scores = np.einsum("bd,bkd->bk", vectors_BD, vectors_PD[expected_BK])
    np.testing.assert_allclose(hits.scores_BK, expected_scores, atol=1e-6)
    assert (hits.rows_BK.dtype, hits.scores_BK.dtype) == (np.int64, np.float32)


def test_a_batch_equals_its_questions_one_by_one() -> None:
    vectors_PD, vectors_BD = unit_vectors(500, 24, 2), unit_vectors(40, 24, 3)
    retriever = dense(vectors_PD)
    batch = retriever.search_vectors(vectors_BD, 7)
    for row in range(len(vectors_BD)):
        alone = retriever.search_vectors(vectors_BD[row : row + 1], 7)
        np.testing.assert_array_equal(alone.rows_BK[0], batch.rows_BK[row])
        np.testing.assert_array_equal(alone.scores_BK[0], batch.scores_BK[row])


def test_ties_go_to_the_lower_row_however_many_there_are() -> None:
    few = unit_vectors(5, 24, 4)
    vectors_PD = np.repeat(few, 200, axis=0)[np.random.default_rng(0).permutation(1000)]
    vectors_BD = unit_vectors(30, 24, 5)
    hits = dense(vectors_PD).search_vectors(vectors_BD, 12)
    scores_BF = vectors_BD @ few.T
    for row, best in enumerate(few[scores_BF.argmax(axis=1)]):
        equal = np.flatnonzero((vectors_PD == best).all(axis=1))
        assert hits.rows_BK[row].tolist() == equal[:12].tolist()


def test_scores_of_the_hits_equal_the_search() -> None:
    corpus = MemoryCorpus(Passage(f"p{i}", "", f"word{i % 7} word{i}") for i in range(30))
    encoder = WordEncoder()
    retriever = DenseRetriever(
        encoder,
        encoder.encode([passage.contents for passage in corpus]),
        RetrievalConfig(kind="dense"),
    )
    assert isinstance(retriever, Retriever)
    encoder.num_calls = 0
    hits = retriever.search(["word3", "word11 word4"], 5)
    scores_BN = retriever.scores(["word3", "word11 word4"], hits.rows_BK)
    np.testing.assert_array_equal(scores_BN, hits.scores_BK)
    assert retriever.question_vectors(["word3", "word11 word4"]).shape == (2, encoder.size)
    assert encoder.num_calls == 1
    assert hits.rows_BK[1, 0] == 11
    assert retriever.search([], 5).rows_BK.shape == (0, 5)


def test_hnsw_finds_nearly_all_and_reads_back(tmp_path: Path) -> None:
    vectors_PD, vectors_BD = unit_vectors(2000, 16, 6), unit_vectors(40, 16, 7)
    built = open_built(vectors_PD, tmp_path, index="hnsw").search_vectors(vectors_BD, 10)
    assert recall(built.rows_BK, brute_force(vectors_BD, vectors_PD, 10)) > 0.95
    loaded = open_built(vectors_PD, tmp_path, index="hnsw").search_vectors(vectors_BD, 10)
    np.testing.assert_array_equal(built.rows_BK, loaded.rows_BK)
    np.testing.assert_array_equal(built.scores_BK, loaded.scores_BK)


def test_ivfpq_finds_most_with_exact_scores(tmp_path: Path) -> None:
    vectors_PD, vectors_BD = unit_vectors(2000, 16, 8), unit_vectors(40, 16, 9)
    hits = open_built(vectors_PD, tmp_path, index="ivfpq").search_vectors(vectors_BD, 10)
    assert recall(hits.rows_BK, brute_force(vectors_BD, vectors_PD, 10)) > 0.7
    exact = np.einsum("bd,bkd->bk", vectors_BD, vectors_PD[hits.rows_BK])
    np.testing.assert_allclose(hits.scores_BK, exact, atol=1e-6)
    assert np.all(np.diff(hits.scores_BK, axis=1) <= 0)


def test_an_index_that_finds_too_few_is_completed_exactly(tmp_path: Path) -> None:
    vectors_PD, vectors_BD = unit_vectors(2000, 16, 8), unit_vectors(3, 16, 9)
    retriever = open_built(vectors_PD, tmp_path, index="ivfpq")  # 32 of 51 lists are searched
    hits = retriever.search_vectors(vectors_BD, 1900)
    np.testing.assert_array_equal(hits.rows_BK, brute_force(vectors_BD, vectors_PD, 1900))


def test_ivfpq_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 256 vectors, but there are 255"):
        open_built(unit_vectors(255, 16, 8), tmp_path, index="ivfpq")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_passages", "size", "lists", "num_bytes"),
    [(256 * 39, 384, 256, 48), (256 * 39 - 1, 768, 255, 48), (256, 1024, 6, 32), (38, 7, 1, 7)],
)
def test_an_ivfpq_index_has_lists_and_bytes_that_fit(
    num_passages: int, size: int, lists: int, num_bytes: int
) -> None:
    assert ivfpq_parameters(num_passages, size) == {"lists": lists, "bytes": num_bytes}


def test_an_index_for_which_the_disk_has_no_room_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_index_module, "INDEX_FILE", "/dev/full")
    with pytest.raises(SetupError, match=r"cannot write .*No space left on device.*free space"):
        open_built(unit_vectors(300, 16, 0), tmp_path, index="hnsw")
    assert list(tmp_path.iterdir()) == []


def test_an_index_of_other_vectors_is_refused(tmp_path: Path) -> None:
    open_built(unit_vectors(300, 16, 0), tmp_path, index="hnsw")
    config = RetrievalConfig(kind="dense", index="hnsw")
    with pytest.raises(IndexMismatchError, match="holds 300 vectors of length 16"):
        open_index(
            unit_vectors(300, 8, 0), config, tmp_path / "index", Manifest("hnsw", "corpus", 300)
        )


def corpus_of(num_passages: int) -> MemoryCorpus:
    return MemoryCorpus(
        Passage(f"p{i}", f"title{i}", " ".join(f"w{i * j % 50}" for j in range(i % 9)))
        for i in range(num_passages)
    )


def encoded(corpus: MemoryCorpus, encoder: WordEncoder, directory: Path) -> np.ndarray:
    manifest = Manifest("vectors", corpus.content_hash, len(corpus))
    return open_vectors(corpus, encoder, directory, manifest)


def test_vectors_are_a_memory_map_of_every_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "CHUNK_PASSAGES", 10)
    corpus, encoder = corpus_of(35), WordEncoder()
    vectors_PD = encoded(corpus, encoder, tmp_path / "v")
    assert isinstance(vectors_PD, np.memmap)
    assert vectors_PD.dtype == np.float32
    expected = WordEncoder().encode([passage.contents for passage in corpus])
    np.testing.assert_array_equal(vectors_PD, expected)
    assert encoder.num_calls == 4
    encoded(corpus, encoder, tmp_path / "v")
    assert encoder.num_calls == 4


def test_encoding_resumed_after_a_stop_is_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors_module, "CHUNK_PASSAGES", 10)
    corpus = corpus_of(35)
    encoded(corpus, WordEncoder(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encoded(corpus, WordEncoder(break_at_call=3), tmp_path / "stopped")
    resumed = WordEncoder()
    encoded(corpus, resumed, tmp_path / "stopped")
    assert resumed.num_calls == 2
    for name in (VECTORS_FILE, PROGRESS_FILE, "manifest.json"):
        whole, stopped = tmp_path / "whole" / name, tmp_path / "stopped" / name
        assert whole.read_bytes() == stopped.read_bytes()
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        VECTORS_FILE,
        PROGRESS_FILE,
        "manifest.json",
    }


def test_what_a_kill_leaves_of_the_progress_lies_beside_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, seen = os.fsync, set()

    def flush_and_look(descriptor: int) -> None:
        seen.update(path.name for path in (tmp_path / "v").glob("*"))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", flush_and_look)
    encoded(corpus_of(35), WordEncoder(), tmp_path / "v")
    assert seen == {VECTORS_FILE, "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


@pytest.mark.parametrize("text", ["", "{}", '{"num_encoded": 36}', '{"num_encoded": null}'])
def test_an_unreadable_progress_file_is_refused(tmp_path: Path, text: str) -> None:
    corpus = corpus_of(35)
    encoded(corpus, WordEncoder(), tmp_path / "v")
    (tmp_path / "v" / PROGRESS_FILE).write_text(text)
    with pytest.raises(IndexMismatchError, match=r"progress\.json is damaged.*delete"):
        encoded(corpus, WordEncoder(), tmp_path / "v")


def test_vectors_with_changed_bytes_of_equal_length_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(35)
    encoded(corpus, WordEncoder(), tmp_path / "v")
    with (tmp_path / "v" / VECTORS_FILE).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\0")
    with pytest.raises(IndexMismatchError, match=r"vectors\.npy is damaged: its bytes are others"):
        encoded(corpus, WordEncoder(), tmp_path / "v")


def test_an_encoder_that_makes_no_numbers_is_refused(tmp_path: Path) -> None:
    class BrokenEncoder(WordEncoder):
        def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
            return super().encode(texts, role) * np.nan

    with pytest.raises(DataError, match="passages 0 to 35"):
        encoded(corpus_of(35), BrokenEncoder(), tmp_path / "v")


@pytest.mark.slow
def test_the_built_in_encoder(tmp_path: Path) -> None:
    model_dir = resolve_model(BUILTIN_ENCODER, cache_dir=tmp_path)
    texts = ["Niamey", "The capital of Niger is Niamey. " * 8, "A recipe for pancakes", ""]
    encoder = TextEncoder(model_dir, "float32", max_tokens=64, batch_size=4)
    vectors_BD = encoder.encode(texts)
    assert vectors_BD.shape == (4, encoder.size) == (4, 384)
    assert vectors_BD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors_BD, axis=1), 1.0, atol=1e-6)
    assert vectors_BD[0] @ vectors_BD[1] > vectors_BD[0] @ vectors_BD[2]
    one_by_one = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(one_by_one, vectors_BD, atol=1e-5)
    small_batches = TextEncoder(model_dir, "float32", max_tokens=64, batch_size=1)
    np.testing.assert_allclose(small_batches.encode(texts), vectors_BD, atol=1e-5)
    assert small_batches.identity == encoder.identity
    coarse = TextEncoder(model_dir, "bfloat16", max_tokens=64, batch_size=4)
    assert coarse.identity.dtype == "bfloat16"
    coarse_BD = coarse.encode(texts)
    assert coarse_BD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(coarse_BD, axis=1), 1.0, atol=1e-6)
    assert np.min(np.sum(coarse_BD * vectors_BD, axis=1)) > 0.99
    assert encoder.encode([]).shape == (0, 384)
    with pytest.raises(ConfigError, match="encoder_max_tokens is 4096"):
        TextEncoder(model_dir, "float32", max_tokens=4096, batch_size=4).encode(["text"])
