"""A bundle loaded in one process answers as it was evaluated."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from serve_bundles import NUM_CANDIDATES, NUM_SELECTED, make_bundle

import rlrag
from rlrag.errors import CheckpointError, ConfigError, PromptTooLongError, RequestError
from rlrag.pipeline import Answer
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder

QUESTION = "what does the lamp hold?"


@pytest.fixture
def tiny(openrag_files) -> Path:
    return openrag_files


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, openrag_files) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return make_bundle(folder / "bundle", openrag_files, folder / "cache", seed=1)


def test_it_answers_as_the_evaluation_does(bundle, tiny, tmp_path):
    corpus, questions = str(tiny / "corpus.jsonl"), str(tiny / "eval.jsonl")
    record = rlrag.evaluate(
        bundle, corpus, questions, tmp_path / "e.json", systems=("retriever_order", "trained")
    )
    assert json.loads((tmp_path / "e.json").read_text()) == record
    lines = (tmp_path / "e.questions.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "question" in row]
    assert len(rows) == record["num_questions"] > 3
    with rlrag.load_pipeline(bundle) as pipeline:
        answers = pipeline.answer_many([row["question"] for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert isinstance(answer, Answer)
        of_run = row["systems"]["trained"]
        assert answer.text == of_run["answer"]
        assert [passage.id for passage in answer.passages] == of_run["picked"]


def test_each_part_can_be_asked_alone_and_waits_for_no_other(bundle):
    with rlrag.load_pipeline(bundle) as pipeline:
        found = pipeline.retrieve(QUESTION)
        assert len(found) == NUM_CANDIDATES
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True)
        picked = pipeline.select(QUESTION)
        assert len(picked) == NUM_SELECTED
        assert set(picked) <= {one.passage for one in found}
        assert pipeline._opened is None  # no language model was loaded
        answer = pipeline.answer(QUESTION)
        assert (answer.question, answer.passages) == (QUESTION, picked)
        assert answer.logp < 0
        together = pipeline.answer_many([QUESTION, "and the whistle?"])
        assert (together[0].text, together[0].passages) == (answer.text, picked)
        assert together[1].question == "and the whistle?"
        assert pipeline.answer_many([]) == []
        assert asyncio.run(pipeline.answer_async(QUESTION)) == answer


def test_threads_share_one_generator(bundle):
    with rlrag.load_pipeline(bundle) as pipeline:
        found: list[Answer] = []
        threads = [
            threading.Thread(target=lambda: found.append(pipeline.answer(QUESTION)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [pipeline.answer(QUESTION)] * 4


def test_it_searches_with_the_encoder_that_was_trained(tiny, tmp_path):
    tuned = TrainableTextEncoder(tiny / "encoder", 32)
    torch.manual_seed(3)
    for parameter in tuned.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "tuned")
    plain = make_bundle(tmp_path / "plain", tiny, tmp_path / "cache", seed=1)
    trained = make_bundle(
        tmp_path / "trained",
        tiny,
        tmp_path / "cache",
        seed=1,
        retriever=tmp_path / "tuned",
    )
    ids = [
        [one.passage.id for one in rlrag.load_pipeline(path).retrieve(QUESTION)]
        for path in (plain, trained)
    ]
    assert ids[0] != ids[1]


def test_what_cannot_be_answered_says_why_and_keeps_the_others(bundle):
    long = f"{QUESTION} " * 100
    with rlrag.load_pipeline(bundle) as pipeline:
        right, wrong = pipeline.answer_many([QUESTION, long])
        assert isinstance(right, Answer)
        assert isinstance(wrong, PromptTooLongError)
        with pytest.raises(PromptTooLongError, match="max_prompt_tokens"):
            pipeline.answer(long)
        for ask in (pipeline.answer, pipeline.retrieve, pipeline.select):
            with pytest.raises(RequestError, match="question 0 is empty; give a question"):
                ask("  ")


def test_a_wrong_argument_is_one_error(bundle, tiny, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        rlrag.load_pipeline(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"generator.backend.*'vlm'"):
        rlrag.load_pipeline(bundle, backend="vlm")
    with pytest.raises(ConfigError, match=r"no option 'limits'; did you mean 'limit'\?"):
        rlrag.evaluate(bundle, "c.jsonl", "q.jsonl", limits=3)
    with pytest.raises(AttributeError, match="no attribute 'trainn'"):
        rlrag.trainn  # noqa: B018


def test_another_corpus_takes_the_place_of_the_one_that_was_trained_on(bundle, tiny, tmp_path):
    shutil.copy(tiny / "corpus.jsonl", tmp_path / "other.jsonl")
    with (tmp_path / "other.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"id": "new", "contents": "Lamp\n" + QUESTION}) + "\n")
    found = rlrag.load_pipeline(bundle, corpus=str(tmp_path / "other.jsonl")).retrieve(QUESTION)
    assert "new" in [one.passage.id for one in found]
