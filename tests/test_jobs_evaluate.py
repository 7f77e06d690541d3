"""The program that evaluates a bundle: whose policy answers, what is refused, where results go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from openrag_runs import write_files

from rlrag.bundle import save_bundle
from rlrag.cli import evaluate
from rlrag.config import (
    EnvironmentConfig,
    EvaluationConfig,
    GeneratorConfig,
    RetrievalConfig,
    RunConfig,
    System,
    TrainingConfig,
)
from rlrag.errors import ConfigError
from rlrag.evaluation.question_records import questions_path, read_questions
from rlrag.pipeline import open_evaluation_data, open_library, open_policy


def trained_bundle(folder: Path, model_dir: Path, *systems: System) -> Path:
    """Of a selector with other weights than at first, which picks two of four passages."""
    write_files(folder)
    config = RunConfig(
        cache_dir=str(folder / "cache"),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=4),
        environment=EnvironmentConfig(num_selected=2),
        generator=GeneratorConfig(model=str(model_dir), max_new_tokens=3),
        training=TrainingConfig(launcher="local"),
        evaluation=EvaluationConfig(systems=systems),
    )
    data = {name: str(folder / f"{name}.jsonl") for name in ("corpus", "eval")}
    of_files = {"corpus": data["corpus"], "eval_questions": data["eval"]}
    config = config.model_copy(update={"data": config.data.model_copy(update=of_files)})
    table, _ = open_evaluation_data(config, open_library(config))
    policy = open_policy(config, table)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(3 * torch.randn_like(parameter))
    save_bundle(folder / "bundle", config, policy, table, {}, 1)
    return folder / "bundle"


def words(bundle: Path, output: Path, *extra: str) -> list[str]:
    files = [bundle.parent / f"{name}.jsonl" for name in ("corpus", "eval")]
    flags = ("--bundle", bundle, "--corpus", files[0], "--questions", files[1], "--output", output)
    return [*map(str, flags), "--limit", "6", *extra]


def picks(output: Path, system: str) -> list[tuple[str, ...]]:
    return [q.systems[system].picked for q in read_questions(questions_path(output)).questions]


def test_the_trained_selector_picks_where_its_own_number_of_passages_is_asked_for(
    model_dir, tmp_path
):
    bundle = trained_bundle(tmp_path, model_dir, "retriever_order", "trained")
    plain, named = tmp_path / "plain.json", tmp_path / "named.json"
    evaluate.main(words(bundle, plain))
    evaluate.main(words(bundle, named, "--docs-in-context", "2"))
    assert picks(plain, "trained") != picks(plain, "retriever_order")
    assert picks(named, "trained") == picks(plain, "trained")
    assert json.loads(named.read_text()) == json.loads(plain.read_text())


def test_a_bundle_without_systems_is_refused_before_its_generator_is_opened(model_dir, tmp_path):
    bundle = trained_bundle(tmp_path, model_dir)
    with pytest.raises(ConfigError, match=r"evaluation\.systems is empty, .* nothing to compare"):
        evaluate.main(words(bundle, tmp_path / "out.json", "--generator", "/no/such/model"))


def test_systems_that_the_run_did_not_compare_can_be_named(model_dir, tmp_path):
    bundle = trained_bundle(tmp_path, model_dir)
    evaluate.main(words(bundle, tmp_path / "out.json", "--systems", "bm25", "trained"))
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record["systems"]) == {"bm25", "trained"}
    assert record["prompts"] == {"prompt_cut_share": 0.0, "dropped_passage_share": 0.0}
    with pytest.raises(ConfigError, match="asks for tuned_retriever, but algorithm"):
        evaluate.main(words(bundle, tmp_path / "out.json", "--systems", "tuned_retriever"))


def test_a_pipe_gets_the_comparison_and_nothing_lies_beside_it(model_dir, tmp_path):
    bundle = trained_bundle(tmp_path, model_dir, "retriever_order")
    (tmp_path / "beside").mkdir()
    pipe = tmp_path / "beside" / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    evaluate.main(words(bundle, pipe))
    assert json.loads(os.read(end, 2**16))["num_questions"] == 6
    os.close(end)
    assert list(pipe.parent.iterdir()) == [pipe]
