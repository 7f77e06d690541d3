"""The programs with a retriever to train: from files to a bundle and its comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openrag_runs import gold_flags
from stand_ins import make_table
from tiny_models import save_tiny_llama

from rlrag.bundle import load_bundle, save_bundle
from rlrag.cli import evaluate, train
from rlrag.cli.single_run import say_next
from rlrag.config import DROConfig, EnvironmentConfig, GeneratorConfig, RunConfig
from rlrag.errors import ConfigError
from rlrag.evaluation.question_records import questions_path, read_questions
from rlrag.pipeline import open_policy
from rlrag.runs.directory import RunDirectory
from rlrag.runs.reporting import LEGEND


def evaluate_words(folder: Path, bundle: Path, output: Path, *extra: str) -> list[str]:
    words = {
        "bundle": bundle,
        "corpus": folder / "corpus.jsonl",
        "questions": folder / "eval.jsonl",
        "output": output,
    }
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return [*flags, *extra]


def untrained_bundle(folder: Path, directory: Path, **sections) -> Path:
    """A bundle of a selector as it is at first, for whatever sections of a configuration."""
    config = RunConfig(
        cache_dir=str(directory / "cache"),
        generator=GeneratorConfig(model=str(folder / "generator")),
        **sections,
    )
    table = make_table(4)
    save_bundle(directory / "bundle", config, open_policy(config, table), table, {}, 1)
    return directory / "bundle"


def test_a_selector_shows_as_many_passages_as_it_was_trained_to_pick(openrag_files, tmp_path):
    """Said before the generator is started."""
    bundle = untrained_bundle(openrag_files, tmp_path)
    words = evaluate_words(openrag_files, bundle, tmp_path / "out.json", "--docs-in-context", "3")
    with pytest.raises(ConfigError, match=r"--docs-in-context is 3, .*to pick 1; leave the flag"):
        evaluate.main(words)
    assert not (tmp_path / "out.json").exists()


def test_a_retriever_is_trained_bundled_and_compared(openrag_files, tmp_path, capsys):
    """By relevance, for to a generator of random weights no passage is of use."""
    words = gold_flags(openrag_files, tmp_path)
    systems = ["bm25", "original_retriever", "tuned_retriever", "trained"]
    train.main(["factbook", *words, "--evaluation.systems", *systems])
    run_dir = tmp_path / "run"
    said = capsys.readouterr().err.splitlines()
    assert said.count(LEGEND) == 1
    assert said[said.index(LEGEND) + 1].startswith("step 0/")
    began = said.index("evaluating 4 systems on 10 questions")
    assert said[began + 1 : began + 5] == [
        f"  system {number} of 4: {name}" for number, name in enumerate(systems, 1)
    ]
    assert said[-3:] == [
        f"written to {run_dir / 'evaluation.json'}",
        f"see the report by: rlrag report --run-dir {run_dir} --output {run_dir / 'report.html'}",
        f"serve it by: rlrag serve {run_dir / 'bundle'}",
    ]
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert list(found["systems"]) == systems
    assert found["systems"]["trained"] == found["systems"]["tuned_retriever"]
    recall = {name: of["recall@1"] for name, of in found["systems"].items()}
    assert recall["tuned_retriever"] > recall["original_retriever"]
    assert "tuned_retriever_vs_original_retriever" in found["paired"]
    assert load_bundle(run_dir / "bundle").retriever_dir == run_dir / "bundle" / "retriever"
    assert json.loads((run_dir / "pools" / "summary.json").read_text())["all"]["auc"] is None
    output = tmp_path / "three.json"
    evaluate.main(
        evaluate_words(openrag_files, run_dir / "bundle", output, "--docs-in-context", "3")
    )
    three = json.loads(output.read_text())
    assert list(three["systems"]) == systems
    assert three["systems"]["trained"] == three["systems"]["tuned_retriever"]
    for name, of in three["systems"].items():
        assert of["recall@3"] >= recall[name]
    assert "tuned_retriever" in capsys.readouterr().out

    other = save_tiny_llama(tmp_path / "other", seed=1)
    words = evaluate_words(openrag_files, run_dir / "bundle", output, "--generator", str(other))
    evaluate.main(words)
    transferred = json.loads(output.read_text())
    assert transferred["generator"] == str(other)
    assert {n: of["recall@1"] for n, of in transferred["systems"].items()} == recall
    assert answers_of(output) != answers_of(run_dir / "evaluation.json")


def answers_of(evaluation: Path) -> list[str | None]:
    questions = read_questions(questions_path(evaluation)).questions
    return [question.systems["trained"].answer for question in questions]


def test_a_trained_generator_is_not_replaced(openrag_files, tmp_path):
    both = DROConfig(parts=("selector", "generator"))
    bundle = untrained_bundle(openrag_files, tmp_path, algorithm=both)
    words = evaluate_words(openrag_files, bundle, tmp_path / "out.json", "--generator", "other")
    with pytest.raises(ConfigError, match=r"--generator is 'other', but .* trained weights of"):
        evaluate.main(words)


def test_a_run_ends_with_the_commands_that_follow(tmp_path, capsys):
    run_dir = RunDirectory(tmp_path / "my run")
    environment = EnvironmentConfig(id="mine:mine/Reading-v0")
    report_by = (
        f"see the report by: rlrag report --run-dir '{run_dir.path}' "
        f"--output '{run_dir.path}/report.html'"
    )
    say_next(RunConfig(), run_dir)
    assert capsys.readouterr().err.splitlines() == [report_by]
    run_dir.bundle.mkdir(parents=True)
    serve_by = f"serve it by: rlrag serve '{run_dir.bundle}'"
    for config, allowed in (
        (RunConfig(), ""),
        (RunConfig(environment=environment), " allow_code=mine:mine/Reading-v0"),
    ):
        say_next(config, run_dir)
        assert capsys.readouterr().err.splitlines() == [report_by, serve_by + allowed]
