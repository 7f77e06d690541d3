"""What training and evaluation assemble: candidates to label, and those of other retrievers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_runs import changed
from openrag_runs import make_corpus, make_questions, openrag_config
from tiny_models import save_tiny_encoder

from rlrag.config import RunConfig
from rlrag.errors import ConfigError
from rlrag.pipeline import (
    open_evaluation_data,
    open_library,
    open_training_data,
    other_retrievers,
)
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def config(tmp_path, encoder_dir) -> RunConfig:
    """Ten questions to train on, two held back and four to evaluate, in files."""
    passages = [{"id": p.id, "contents": p.contents} for p in make_corpus()]
    questions = [
        {"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers)}
        for q in make_questions()
    ]
    files = {"corpus": passages, "train": questions[:12], "eval": questions[12:16]}
    for name, records in files.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = {
        "corpus": str(tmp_path / "corpus.jsonl"),
        "train_questions": str(tmp_path / "train.jsonl"),
        "eval_questions": str(tmp_path / "eval.jsonl"),
        "num_validation_questions": 2,
    }
    return openrag_config(tmp_path / "cache", encoder_dir, data=data)


def test_where_the_retriever_is_trained_its_first_candidates_are_those_to_label(config):
    library = open_library(config)
    data = open_training_data(config, library)
    assert data.train.rows_QN.shape == (10, 16)
    assert len(data.validation) == 2
    selecting = changed(config, algorithm={"name": "dro"})
    few = open_training_data(selecting, library)
    assert few.train.rows_QN.shape == (10, 5)
    assert np.array_equal(data.train.rows_QN[:, :5], few.train.rows_QN)
    assert open_evaluation_data(config, library)[0].rows_QN.shape == (4, 5)


def test_more_candidates_to_label_than_there_are_passages_are_refused(config):
    greedy = changed(config, algorithm={"num_offline": 61})
    with pytest.raises(ConfigError, match=r"algorithm.num_offline is 61, but .* only 60 passages"):
        open_training_data(greedy, open_library(config))


def indexes(config: RunConfig) -> set[str]:
    """Kinds of the parts that were built, with how many of each."""
    names = [path.name.split("-")[0] for path in (config.cache_path / "indexes").iterdir()]
    return {f"{name}:{names.count(name)}" for name in names if not name.startswith(".")}


def test_other_retrievers_are_opened_once_and_only_when_asked(config, encoder_dir, tmp_path):
    config = changed(config, retrieval={"bm25_scores": False}, algorithm={"first_stage": "frozen"})
    library = open_library(config)
    tuned = TrainableTextEncoder(encoder_dir, 32)
    torch.manual_seed(1)
    for parameter in tuned.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    found = other_retrievers(config, library, tmp_path / "tuned")
    assert list(found) == ["bm25", "dense", "hybrid", "original_retriever", "tuned_retriever"]
    assert indexes(config) == {"vectors:1"}
    assert found["bm25"]() is found["bm25"]()
    assert indexes(config) == {"vectors:1", "bm25:1"}
    assert found["tuned_retriever"]() is found["tuned_retriever"]()
    assert indexes(config) == {"vectors:2", "bm25:1"}
    own = open_evaluation_data(config, library)[0]
    assert np.array_equal(found["original_retriever"]().rows_QN, own.rows_QN)
    assert np.array_equal(found["dense"]().rows_QN, own.rows_QN)
    assert found["bm25"]().score_names[0] == "bm25"
    assert found["hybrid"]().score_names[0] == "hybrid"
    assert not np.array_equal(found["tuned_retriever"]().rows_QN, own.rows_QN)
    passages = [passage.contents for passage in library.corpus]
    with torch.no_grad():
        vectors = tuned.embed(passages, "passage").vectors_BD
        questions = tuned.embed([q.question for q in own.questions], "question").vectors_BD
    first = (questions @ vectors.T).argmax(dim=1)
    assert found["tuned_retriever"]().rows_QN[:, 0].tolist() == first.tolist()
    for table in (get() for get in found.values()):
        assert table.questions == own.questions
        assert table.rows_QN.shape == (4, 5)


def test_without_a_tuned_retriever_there_is_none_to_compare(config):
    found = other_retrievers(config, open_library(config), None)
    assert list(found) == ["bm25", "dense", "hybrid"]
    bare = config.model_copy(
        update={"retrieval": config.retrieval.model_copy(update={"kind": "bm25", "encoder": None})}
    )
    assert list(other_retrievers(bare, open_library(bare), None)) == ["bm25"]
