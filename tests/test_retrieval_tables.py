from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, DataError, IndexMismatchError, SetupError
from rlrag.records import Passage, Question
from rlrag.retrieval import tables as tables_module
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.dense.encoder import EncoderIdentity
from rlrag.retrieval.tables import candidate_table
from rlrag.retrieval.trainable.protocol import Role


class WordEncoder:
    """Sums one fixed random vector a word; counts the texts that it encodes."""

    identity = EncoderIdentity("words", "float32", 99)
    size = 16

    def __init__(self) -> None:
        self.num_texts = 0

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        self.num_texts += len(texts)
        vectors_BD = np.zeros((len(texts), self.size))
        for row, text in enumerate(texts):
            for word in text.split():
                seed = zlib.crc32(word.encode())
                vectors_BD[row] += np.random.default_rng(seed).standard_normal(self.size)
        lengths = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        return (vectors_BD / lengths).astype(np.float32)


CORPUS = MemoryCorpus(
    Passage(f"p{i}", f"land{i}", f"capital town{i} river{i % 5}") for i in range(40)
)
QUESTIONS = tuple(
    Question(f"q{i}", f"capital town{3 * i} on river{3 * i % 5}", (f"town{3 * i}",))
    for i in range(9)
)


def table(
    cache_dir: Path,
    stand_in: WordEncoder | None = None,
    questions: tuple[Question, ...] = QUESTIONS,
    questions_hash: str = "file",
    **settings: Any,
) -> CandidateTable:
    config = RetrievalConfig.model_validate({"num_candidates": 5, **settings})
    retrievers = open_retrievers(
        CORPUS,
        config,
        cache_dir,
        encoder=None if config.encoder is None else stand_in or WordEncoder(),
    )
    return candidate_table(questions, questions_hash, CORPUS, retrievers, config, cache_dir)


def cached_files(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "candidates").iterdir())


def test_columns_are_the_ranking_and_its_components(tmp_path: Path) -> None:
    made = table(tmp_path, kind="hybrid")
    assert made.score_names == ("hybrid", "bm25", "dense")
    assert made.rows_QN.shape == (9, 5)
    assert made.scores_QNC.shape == (9, 5, 3)
    assert np.all(np.diff(made.scores_QNC[..., 0], axis=1) <= 0)
    assert [made.passages(row)[0].title for row in range(9)] == [f"land{3 * i}" for i in range(9)]
    questions_QD = WordEncoder().encode([question.question for question in QUESTIONS])
    np.testing.assert_array_equal(made.question_vectors_QD, questions_QD)
    dense_QN = np.einsum("qd,qnd->qn", questions_QD, made.passage_vectors_PD[made.rows_QN])
    np.testing.assert_allclose(made.scores_QNC[..., 2], dense_QN, atol=1e-6)
    batch = made.batch([4, 0])
    np.testing.assert_array_equal(batch.scores_BNC, made.scores_QNC[[4, 0]])
    assert batch.passage_vectors_BND.shape == (2, 5, 16)


@pytest.mark.parametrize(
    ("settings", "names", "size"),
    [
        ({"kind": "bm25"}, ("bm25", "dense"), 16),
        ({"kind": "dense"}, ("dense",), 16),
        ({"kind": "bm25", "encoder": None}, ("bm25",), 0),
    ],
)
def test_other_kinds(
    tmp_path: Path, settings: dict[str, Any], names: tuple[str, ...], size: int
) -> None:
    made = table(tmp_path, **settings)
    assert made.score_names == names
    assert made.scores_QNC.shape == (9, 5, len(names))
    assert made.vector_size == size
    assert made.batch([1]).passage_vectors_BND.shape == (1, 5, size)


def test_questions_that_match_no_passage_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = tuple(Question(text, text, ("",)) for text in ("xylophone", "東京", "town3"))
    for _ in range(2):  # computed, then read from the cache
        caplog.clear()
        table(tmp_path, kind="bm25", encoder=None, questions=strange)
        (warning,) = caplog.messages
        assert warning.startswith("2 of 3 questions match no passage: bm25 scores all passages 0")
    caplog.clear()
    table(tmp_path, kind="hybrid", questions=strange[:1])
    table(tmp_path, kind="bm25", encoder=None)
    assert caplog.messages == []


def test_questions_are_encoded_once_and_not_again_from_the_cache(tmp_path: Path) -> None:
    encoder = WordEncoder()
    first = table(tmp_path, encoder, kind="hybrid")
    assert encoder.num_texts == len(CORPUS) + len(QUESTIONS)
    second = table(tmp_path, encoder, kind="hybrid")
    assert encoder.num_texts == len(CORPUS) + len(QUESTIONS)
    np.testing.assert_array_equal(first.rows_QN, second.rows_QN)
    np.testing.assert_array_equal(first.scores_QNC, second.scores_QNC)
    np.testing.assert_array_equal(first.question_vectors_QD, second.question_vectors_QD)
    assert first.rows_QN.dtype == second.rows_QN.dtype == np.int64
    assert first.scores_QNC.dtype == second.scores_QNC.dtype == np.float32
    assert len(cached_files(tmp_path)) == 1


def test_chunks_of_questions_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = table(tmp_path / "whole", kind="hybrid")
    monkeypatch.setattr(tables_module, "_CHUNK_QUESTIONS", 2)
    parts = table(tmp_path / "parts", kind="hybrid")
    np.testing.assert_array_equal(whole.rows_QN, parts.rows_QN)
    np.testing.assert_array_equal(whole.scores_QNC, parts.scores_QNC)


def test_another_question_set_number_or_retriever_has_its_own_file(tmp_path: Path) -> None:
    table(tmp_path)
    table(tmp_path, questions_hash="another file")
    table(tmp_path, num_candidates=4)
    table(tmp_path, bm25_k1=1.2)
    table(tmp_path, questions=QUESTIONS[::-1])
    # The same number of questions sampled from the same file, but others.
    table(tmp_path, questions=QUESTIONS[:4])
    sample = table(tmp_path, questions=QUESTIONS[4:8])
    assert len(cached_files(tmp_path)) == 7
    assert sample.passages(0)[0].title == "land12"


def test_fewer_candidates_are_the_first_of_more(tmp_path: Path) -> None:
    five, three = table(tmp_path, kind="dense"), table(tmp_path, kind="dense", num_candidates=3)
    np.testing.assert_array_equal(five.rows_QN[:, :3], three.rows_QN)


def test_a_damaged_file_is_refused_with_a_way_out(tmp_path: Path) -> None:
    table(tmp_path)
    (file,) = cached_files(tmp_path)
    whole = file.read_bytes()
    for damage in (whole[:200], b"", b"text"):
        file.write_bytes(damage)
        with pytest.raises(IndexMismatchError, match=f"{file} is damaged.*delete it"):
            table(tmp_path)


def test_whoever_may_read_the_cache_may_read_the_candidates(tmp_path: Path) -> None:
    table(tmp_path)
    (tmp_path / "ordinary").touch()
    assert cached_files(tmp_path)[0].stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "candidates").touch()
    with pytest.raises(SetupError, match=r"cannot write .*choose another cache"):
        table(tmp_path)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="question set is empty"):
        table(tmp_path, questions=())
    with pytest.raises(ConfigError, match=r"41 candidates .* corpus of 40 passages"):
        table(tmp_path, num_candidates=41)
