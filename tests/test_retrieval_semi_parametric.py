"""Full and late-parametric search in vocabulary space, the vectors on disk, and opening it all."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from tiny_models import save_tiny_masked_lm

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.data.sample import sample_corpus, sample_questions
from rlrag.errors import ConfigError, IndexMismatchError
from rlrag.retrieval.build import RetrieverSet, open_retrievers, open_vocabulary_encoder
from rlrag.retrieval.chunked_build import PROGRESS_FILE
from rlrag.retrieval.dense.encoder import EncoderIdentity
from rlrag.retrieval.protocol import Retriever
from rlrag.retrieval.trainable.late_parametric import FrozenIndex, LateParametricRetriever
from rlrag.retrieval.trainable.protocol import Role
from rlrag.retrieval.vocabulary import semi_parametric
from rlrag.retrieval.vocabulary.bag_of_tokens import open_bag_of_tokens
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.retrieval.vocabulary.semi_parametric import (
    SemiParametricRetriever,
    open_vocabulary_vectors,
    vocabulary_manifest,
)
from rlrag.retrieval.vocabulary.sparse_rows import SparseRows

QUESTIONS = [question.question for question in sample_questions()][:6]
CORPUS = MemoryCorpus(sample_corpus())


class LengthEncoder:
    """A vector of length 1 whose direction follows the number of letters."""

    identity = EncoderIdentity("lengths", "float32", 99)
    size = 2

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        angles_B = np.array([len(text) / 100 for text in texts], dtype=np.float32)
        return np.stack([np.cos(angles_B), np.sin(angles_B)], axis=1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_masked_lm(tmp_path_factory.mktemp("masked_lm"))


def encoder_of(model_dir: Path) -> VocabularyEncoder:
    return VocabularyEncoder(model_dir, 64, 30, "masked_lm")


def step(encoder: VocabularyEncoder) -> VocabularyEncoder:
    """Changes the weights as an optimiser does."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder.embed(QUESTIONS, "question").vectors_BD.square().mean().backward()
    optimizer.step()
    return encoder


def encoded(encoder: VocabularyEncoder, directory: Path) -> SparseRows:
    manifest = vocabulary_manifest(CORPUS, encoder)
    return open_vocabulary_vectors(CORPUS, encoder, directory, manifest)


def opened(
    model_dir: Path, cache_dir: Path, encoder: VocabularyEncoder | None = None, **settings: Any
) -> RetrieverSet:
    config = RetrievalConfig.model_validate(
        {
            "kind": "semi_parametric",
            "vocabulary_encoder": str(model_dir),
            "encoder_max_tokens": 64,
            **settings,
        }
    )
    return open_retrievers(
        CORPUS, config, cache_dir, encoder=LengthEncoder(), vocabulary_encoder=encoder
    )


def test_search_equals_all_inner_products(model_dir: Path, tmp_path: Path) -> None:
    encoder = encoder_of(model_dir)
    retriever = SemiParametricRetriever(encoder, encoded(encoder, tmp_path / "index"))
    assert isinstance(retriever, Retriever)
    questions_BV = encoder.encode(QUESTIONS, "question").toarray().astype(np.float64)
    passages_PV = encoder.encode([each.contents for each in CORPUS], "passage").toarray()
    scores_BP = questions_BV @ passages_PV.T
    hits = retriever.search(QUESTIONS, 10)
    np.testing.assert_array_equal(
        hits.rows_BK, np.argsort(-scores_BP, axis=1, kind="stable")[:, :10]
    )
    np.testing.assert_allclose(hits.scores_BK, -np.sort(-scores_BP, axis=1)[:, :10], rtol=1e-5)
    np.testing.assert_allclose(retriever.scores(QUESTIONS, hits.rows_BK), hits.scores_BK, rtol=1e-6)
    assert retriever.search([], 3).rows_BK.shape == (0, 3)


class BreakingEncoder(VocabularyEncoder):
    """Counts its calls and breaks at one of them."""

    num_calls = 0
    break_at_call: int | None = None

    def encode(self, texts: Sequence[str], role: Role) -> csr_array:
        self.num_calls += 1
        if self.num_calls == self.break_at_call:
            raise KeyboardInterrupt
        return super().encode(texts, role)


def test_encoding_resumed_after_a_stop_is_byte_identical(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semi_parametric, "CHUNK_PASSAGES", 7)
    encoded(encoder_of(model_dir), tmp_path / "whole")
    encoder = BreakingEncoder(model_dir, 64, 30, "masked_lm")
    encoder.break_at_call = 3
    with pytest.raises(KeyboardInterrupt):
        encoded(encoder, tmp_path / "stopped")
    encoded(encoder, tmp_path / "stopped")
    assert encoder.num_calls == 5  # three, then the two chunks that were left
    encoded(encoder, tmp_path / "stopped")
    assert encoder.num_calls == 5
    names = {"row_ends.bin", "columns.bin", "values.bin", PROGRESS_FILE, "manifest.json"}
    for directory in (tmp_path / "whole", tmp_path / "stopped"):
        assert {path.name for path in directory.iterdir()} == names
    for name in names:
        whole, stopped = tmp_path / "whole" / name, tmp_path / "stopped" / name
        assert whole.read_bytes() == stopped.read_bytes()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"num_rows": 36, "num_entries": 9}', '{"num_rows": 9, "num_entries": -1}']
)
def test_an_unreadable_progress_file_is_refused(model_dir: Path, tmp_path: Path, text: str) -> None:
    encoded(encoder_of(model_dir), tmp_path / "index")
    (tmp_path / "index" / PROGRESS_FILE).write_text(text)
    with pytest.raises(IndexMismatchError, match=r"progress\.json is damaged.*delete"):
        encoded(encoder_of(model_dir), tmp_path / "index")


def test_a_truncated_file_is_refused(model_dir: Path, tmp_path: Path) -> None:
    encoded(encoder_of(model_dir), tmp_path / "index")
    for name in ("row_ends.bin", "columns.bin", "values.bin"):
        whole = (tmp_path / "index" / name).read_bytes()
        (tmp_path / "index" / name).write_bytes(whole[:-1])
        with pytest.raises(IndexMismatchError, match=f"{name} is damaged: it has"):
            encoded(encoder_of(model_dir), tmp_path / "index")
        (tmp_path / "index" / name).write_bytes(whole)


def test_an_index_of_other_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    encoder = encoder_of(model_dir)
    encoded(encoder, tmp_path / "index")
    with pytest.raises(
        IndexMismatchError, match="was built from something else: encoder_weights_hash is"
    ):
        encoded(step(encoder), tmp_path / "index")


def late_parametric(
    encoder: VocabularyEncoder, cache_dir: Path, num_first: int
) -> LateParametricRetriever:
    first_stage = FrozenIndex(open_bag_of_tokens(CORPUS, encoder, cache_dir))
    return LateParametricRetriever(encoder, first_stage, CORPUS, num_first)


def test_late_parametric_equals_the_full_search_when_m_is_the_corpus(
    model_dir: Path, tmp_path: Path
) -> None:
    open_bag_of_tokens(CORPUS, encoder_of(model_dir), tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    encoder = step(encoder_of(model_dir))
    late = late_parametric(encoder, tmp_path, len(CORPUS)).search(QUESTIONS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    retriever = SemiParametricRetriever(encoder, encoded(encoder, tmp_path / "index"))
    full = retriever.search(QUESTIONS, len(CORPUS))
    np.testing.assert_array_equal(late.rows_BK, full.rows_BK)
    np.testing.assert_allclose(late.scores_BK, full.scores_BK, rtol=1e-5)


def test_late_parametric_ranks_the_best_of_the_bags_alone(model_dir: Path, tmp_path: Path) -> None:
    encoder = encoder_of(model_dir)
    late = late_parametric(encoder, tmp_path, 8).search(QUESTIONS, 5)
    vectors_BV = encoder.encode(QUESTIONS, "question")
    first = open_bag_of_tokens(CORPUS, encoder, tmp_path).search_vectors(vectors_BV, 8)
    passages = encoded(encoder, tmp_path / "index")
    for row, rows_M in enumerate(first.rows_BK):
        scores_M = passages.scores(vectors_BV[[row]], rows_M[np.newaxis])[0]
        expected = rows_M[np.argsort(-scores_M, kind="stable")][:5]
        assert late.rows_BK[row].tolist() == expected.tolist()


def test_opening_makes_it_the_primary_beside_the_features(model_dir: Path, tmp_path: Path) -> None:
    retrievers = opened(model_dir, tmp_path)
    assert retrievers.score_names == ("semi_parametric", "dense")
    assert retrievers.primary is retrievers.components["semi_parametric"]
    assert retrievers.passage_vectors.shape == (24, 2)
    assert retrievers.question_vectors(["a", "b"]).shape == (2, 2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = opened(model_dir, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert again.manifest_hash == retrievers.manifest_hash
    hits = [each.primary.search(QUESTIONS, 5) for each in (retrievers, again)]
    np.testing.assert_array_equal(hits[0].rows_BK, hits[1].rows_BK)
    with_words = opened(model_dir, tmp_path, bm25_scores=True)
    assert with_words.score_names == ("semi_parametric", "bm25", "dense")


def test_an_encoder_that_is_given_takes_the_place_of_the_configured_one(
    model_dir: Path, tmp_path: Path
) -> None:
    trained = step(VocabularyEncoder(model_dir, 64))
    given = opened(model_dir, tmp_path, encoder=trained)
    configured = opened(model_dir, tmp_path)
    assert given.manifest_hash != configured.manifest_hash
    trained.save_pretrained(tmp_path / "saved")
    loaded = opened(tmp_path / "saved", tmp_path)
    assert loaded.manifest_hash == given.manifest_hash
    assert len(list((tmp_path / "indexes").glob("vocabulary_vectors-*"))) == 2
    with pytest.raises(ConfigError, match=r"retrieval\.kind is 'dense'; set it to semi_parametric"):
        opened(model_dir, tmp_path, encoder=trained, kind="dense")


def test_an_encoder_each_is_loaded_as_it_was_saved(model_dir: Path, tmp_path: Path) -> None:
    config = RetrievalConfig(
        kind="semi_parametric", vocabulary_encoder=str(model_dir), encoder_max_tokens=64
    )
    untied = open_vocabulary_encoder(config, tmp_path, tied=False)
    untied.save_pretrained(tmp_path / "saved")
    saved = config.model_copy(update={"vocabulary_encoder": str(tmp_path / "saved")})
    assert open_vocabulary_encoder(saved, tmp_path).identity == untied.identity
    assert open_vocabulary_encoder(config, tmp_path).identity != untied.identity
    assert copy.deepcopy(untied).identity == untied.identity


def test_an_index_in_the_place_of_another_is_refused(model_dir: Path, tmp_path: Path) -> None:
    opened(model_dir, tmp_path)
    (configured,) = (tmp_path / "indexes").glob("vocabulary_vectors-*")
    trained = step(encoder_of(model_dir))
    wanted = vocabulary_manifest(CORPUS, trained)
    shutil.copytree(configured, tmp_path / "indexes" / wanted.directory_name)
    with pytest.raises(IndexMismatchError, match="encoder_weights_hash is"):
        opened(model_dir, tmp_path, encoder=trained)
