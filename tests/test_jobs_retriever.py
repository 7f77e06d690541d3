"""The programs with a retriever to train: from files to a bundle and its comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openrag_runs import make_corpus, make_questions
from stand_ins import make_table
from tiny_models import save_tiny_encoder, save_tiny_llama

from jobs import evaluate, train
from rlrag.bundle import load_bundle, save_bundle
from rlrag.config import GeneratorConfig, RunConfig
from rlrag.errors import ConfigError
from rlrag.pipeline import open_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, questions that name their gold passages, and the models."""
    folder = tmp_path_factory.mktemp("files")
    passages = [{"id": p.id, "contents": p.contents} for p in make_corpus()]
    questions = [
        {
            "id": q.id,
            "question": q.question,
            "golden_answers": list(q.golden_answers),
            "metadata": {"gold_ids": list(q.gold_ids)},
        }
        for q in make_questions()
    ]
    files = {"corpus": passages, "train": questions[:30], "eval": questions[30:]}
    for name, records in files.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    save_tiny_encoder(folder / "encoder")
    save_tiny_llama(folder / "generator")
    return folder


def evaluate_words(folder: Path, bundle: Path, output: Path, *extra: str) -> list[str]:
    words = {
        "bundle": bundle,
        "corpus": folder / "corpus.jsonl",
        "questions": folder / "eval.jsonl",
        "output": output,
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return [*flags, *extra]


def test_a_selector_shows_as_many_passages_as_it_was_trained_to_pick(folder, tmp_path):
    """Said before the generator is started."""
    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        generator=GeneratorConfig(model=str(folder / "generator")),
    )
    table = make_table(4)
    save_bundle(tmp_path / "bundle", config, open_policy(config, table), table, {}, 1)
    words = evaluate_words(
        folder, tmp_path / "bundle", tmp_path / "out.json", "--docs-in-context", "3"
    )
    with pytest.raises(ConfigError, match=r"--docs-in-context is 3, .*to pick 1; leave the flag"):
        evaluate.main(words)
    assert not (tmp_path / "out.json").exists()


def test_a_retriever_is_trained_bundled_and_compared(folder, tmp_path, capsys):
    """By relevance, for to a generator of random weights no passage is of use."""
    flags = {
        "run-dir": tmp_path / "run",
        "cache-dir": tmp_path / "cache",
        "data.corpus": folder / "corpus.jsonl",
        "data.train-questions": folder / "train.jsonl",
        "data.eval-questions": folder / "eval.jsonl",
        "data.num-validation-questions": 0,
        "data.max-train-questions": None,
        "retrieval.kind": "dense",
        "retrieval.encoder": folder / "encoder",
        "retrieval.encoder-max-tokens": 32,
        "retrieval.bm25-scores": True,
        "environment.num-selected": 1,
        "generator.model": folder / "generator",
        "generator.max-new-tokens": 3,
        "openrag.labels": "gold",
        "openrag.num-offline": 16,
        "openrag.num-online": 6,
        "openrag.first-stage": "bm25",
        "openrag.offline-epochs": 2,
        "openrag.online-epochs": 2,
        "openrag.temperature": 0.1,
        "openrag.learning-rate": 2e-3,
        "training.launcher": "local",
        "training.parts": "retriever",
        "training.batch-size": 8,
        "training.loggers": "",
    }
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value)) if w]
    systems = ["bm25", "original_retriever", "tuned_retriever", "trained"]
    train.main(["quickstart", *words, "--evaluation.systems", *systems])
    run_dir = tmp_path / "run"
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert list(found["systems"]) == systems
    assert found["systems"]["trained"] == found["systems"]["tuned_retriever"]
    recall = {name: of["recall@1"] for name, of in found["systems"].items()}
    assert recall["tuned_retriever"] > recall["original_retriever"]
    assert "tuned_retriever_vs_original_retriever" in found["paired"]
    assert load_bundle(run_dir / "bundle").retriever_dir == run_dir / "bundle" / "retriever"
    assert json.loads((run_dir / "pools" / "summary.json").read_text())["all"]["auc"] is None
    output = tmp_path / "three.json"
    evaluate.main(evaluate_words(folder, run_dir / "bundle", output, "--docs-in-context", "3"))
    three = json.loads(output.read_text())
    assert list(three["systems"]) == systems
    assert three["systems"]["trained"] == three["systems"]["tuned_retriever"]
    for name, of in three["systems"].items():
        assert of["recall@3"] >= recall[name]
    assert "tuned_retriever" in capsys.readouterr().out
