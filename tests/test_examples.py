"""The examples do what they say, on models as small as can be."""

from __future__ import annotations

import json

import pytest
from serve_bundles import make_bundle

from examples import ask_bundle, custom_reward, dro_by_hand
from rlrag import load_pipeline

QUESTION = "what does the lamp hold?"


def test_a_policy_of_ones_own_learns_in_the_environment():
    before, after = dro_by_hand.train(num_steps=40)
    assert after > before + 0.1


def test_a_bundle_answers_in_one_process(openrag_files, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", openrag_files, tmp_path / "cache", seed=1)
    ask_bundle.main(["--bundle", str(bundle), QUESTION, f"{QUESTION} " * 100])
    said = capsys.readouterr().out.splitlines()
    with load_pipeline(bundle) as pipeline:
        answer = pipeline.answer(QUESTION)
    assert said[:2] == [QUESTION, f"  {answer.text}"]
    for number, passage in enumerate(answer.passages, start=1):
        assert said[1 + number].strip().startswith(f"[{number}] {passage.title}")
    assert said[-1].startswith("  not answered: question '1'")


@pytest.mark.slow
def test_a_run_is_rewarded_by_the_examples_function(openrag_files, tmp_path):
    flags = {
        "run-dir": tmp_path / "run",
        "cache-dir": tmp_path / "cache",
        "data.corpus": openrag_files / "corpus.jsonl",
        "data.train-questions": openrag_files / "train.jsonl",
        "data.eval-questions": openrag_files / "eval.jsonl",
        "data.max-train-questions": 16,
        "data.num-validation-questions": 4,
        "retrieval.encoder": openrag_files / "encoder",
        "generator.model": openrag_files / "generator",
        "training.num-epochs": 1,
        "training.batch-size": 4,
        "evaluation.systems": "trained",
    }
    custom_reward.main(
        [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    terms = {name for name in records[-1] if name.startswith("reward/")}
    function = "examples.custom_reward:short_and_right"
    assert terms == {f"reward/{function}/right", f"reward/{function}/price"}
    assert records[-1][f"reward/{function}/price"] <= 0
