"""Training on a service's log of feedback: from the log to a bundle, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrag.bundle import load_bundle
from rlrag.cli import report, train
from rlrag.cli.command_line import exit_code, parse, pick_recipe
from rlrag.config import RunConfig
from rlrag.data.feedback import FeedbackStore, SelectionEvent, read_feedback
from rlrag.data.load import load_questions
from rlrag.errors import ConfigError, DataError, RunDirectoryError
from rlrag.pipeline import candidates_of, open_library, open_policy
from rlrag.recipes import RECIPES
from rlrag.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]


def flags_of(files: Path, directory: Path, **changes: object) -> list[str]:
    """Words of `jobs.train` for a small selector on the files, which nothing is evaluated with."""
    values: dict[str, object] = {
        "run_dir": directory / "run",
        "cache_dir": directory / "cache",
        "data__corpus": files / "corpus.jsonl",
        "data__train_questions": files / "train.jsonl",
        "data__eval_questions": files / "eval.jsonl",
        "data__max_train_questions": None,
        "retrieval__encoder": files / "encoder",
        "retrieval__encoder_max_tokens": 32,
        "retrieval__num_candidates": 4,
        "environment__num_selected": 1,
        "generator__model": files / "generator",
        "generator__max_new_tokens": 3,
        "training__launcher": "local",
        "training__learning_rate": 1e-2,
        "training__validate_every": 5,
        "training__checkpoint_every": 5,
        "algorithm__name": "feedback",
        "algorithm__log": directory / "log.sqlite",
        "algorithm__num_epochs": 12,
    }
    flags = {name.replace("__", ".").replace("_", "-"): v for name, v in (values | changes).items()}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["factbook", *words, "--training.loggers", "--evaluation.systems"]


def config_of(flags: list[str]) -> RunConfig:
    recipe, words = pick_recipe(flags, RECIPES, "python -m jobs.train")
    default = train.TrainArguments(recipe, Path("runs"))
    return train.config_of(parse(train.TrainArguments, default, words, "python -m jobs.train"))


def write_log(path: Path, config: RunConfig, num_events: int, explored: bool = True) -> None:
    """What a service would have logged that draws evenly; the ledger holds the answer."""
    library = open_library(config)
    questions = load_questions(config.data.train_questions, config.cache_path)
    table = candidates_of(library, questions, config)
    store, rng = FeedbackStore(path), np.random.default_rng(0)
    for number in range(num_events):
        row, position = int(rng.integers(len(table))), int(rng.integers(4))
        ids = tuple(passage.id for passage in table.passages(row))
        golden = table.questions[row].golden_answers
        store.record_selection(
            SelectionEvent(
                request_id=f"request-{number}",
                time_s=time.time(),
                version="v1",
                question=table.questions[row].question,
                candidate_ids=ids,
                actions=(position,),
                propensity_logp=-float(np.log(4)) if explored else 0.0,
                explored=explored,
                answer=table.questions[row].golden_answers[0]
                if "ledger" in ids[position]
                else "no",
                answer_logp=-1.0,
            )
        )
        store.record_feedback(f"request-{number}", golden_answers=golden)
    store.close()


@pytest.fixture
def log(openrag_files, tmp_path) -> Path:
    path = tmp_path / "feedback.sqlite"
    write_log(path, config_of(flags_of(openrag_files, tmp_path)), 300)
    return path


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_log_becomes_a_bundle_that_is_compared_like_any_other(
    openrag_files, log, tmp_path, capsys
):
    words = [
        *flags_of(openrag_files, tmp_path),
        *("--algorithm.log", str(log)),
        *("--evaluation.systems", "retriever_order", "trained"),
    ]
    train.main(words)
    said = capsys.readouterr().err
    assert "logged selections to train on" in said
    assert "without generator tokens" in said
    assert "held-back reward before training:" in said
    assert "held-back reward of the bundle:" in said
    assert "ESS " in said
    run = tmp_path / "run"
    found = records(run)
    best = max(
        (record for record in found if "validation/score" in record),
        key=lambda record: record["validation/score"],
    )
    assert best["step"] > 0
    assert best["validation/value"] > found[0]["validation/value"]
    assert all(record["generator_tokens_total"] == 0 for record in found)
    bundle = load_bundle(run / "bundle")
    assert bundle.facts.step == best["step"]
    assert bundle.config.algorithm.log == str(log)
    assert {"corpus", "experience"} <= set(bundle.facts.hashes)
    library = open_library(bundle.config)
    questions = load_questions(bundle.config.data.eval_questions, bundle.config.cache_path)
    untrained = open_policy(bundle.config, candidates_of(library, questions, bundle.config))
    weights = untrained.state_dict()
    assert any(not torch.equal(t, weights[n]) for n, t in bundle.policy.state_dict().items())
    systems = json.loads((run / "evaluation.json").read_text())["systems"]
    assert list(systems) == ["retriever_order", "trained"]

    # The command of the page about serving, from the weights that were served.
    text = (ROOT / "docs/how-to/serving.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(
        r"^python -m jobs.train .* --algorithm.name feedback --algorithm.log .*$", text, re.M
    )
    for there, here in (
        ("runs/served", tmp_path / "served"),
        ("feedback.sqlite", log),
        ("runs/factbook/bundle", run / "bundle"),
    ):
        command = command.replace(there, str(here))
    rest = flags_of(openrag_files, tmp_path)[1:]
    for flag in ("--run-dir", "--algorithm.log"):
        del rest[rest.index(flag) : rest.index(flag) + 2]
    train.main([*command.split()[3:], *rest])
    served = records(tmp_path / "served")
    assert served[0]["validation/value"] == pytest.approx(best["validation/value"])

    # The service goes on; the run keeps to the log that it began with.
    store = FeedbackStore(log)
    store.record_feedback("request-0", reward=1e3)
    assert max(record.reward or 0 for record in read_feedback(log)) == 1e3
    train.main(words)
    assert records(run) == found
    assert load_bundle(run / "bundle").facts == bundle.facts

    report.main(["--run-dir", str(run), "--output", str(tmp_path / "report.html")])
    assert "validation" in (tmp_path / "report.html").read_text()


def test_no_generator_is_opened_where_nothing_is_compared(openrag_files, log, tmp_path):
    """Its weights are hashed for the bundle, and could not be loaded."""
    broken = tmp_path / "broken"
    shutil.copytree(openrag_files / "generator", broken)
    for path in broken.glob("*.safetensors"):
        path.write_bytes(b"nothing that can be loaded")
    train.main(
        [
            *flags_of(openrag_files, tmp_path, generator__model=broken),
            *("--algorithm.log", str(log)),
        ]
    )
    assert load_bundle(tmp_path / "run" / "bundle").facts.step > 0
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_refused_log_leaves_the_run_directory_to_a_corrected_command(
    openrag_files, log, tmp_path
):
    certain = tmp_path / "certain.sqlite"
    write_log(certain, config_of(flags_of(openrag_files, tmp_path)), 20, explored=False)
    words = flags_of(openrag_files, tmp_path)
    for name, message in (
        (certain, r"feedback\.explore_share above 0"),
        (tmp_path / "absent.sqlite", "does not exist"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            train.main([*words, "--algorithm.log", str(name)])
        assert exit_code(caught.value) == 3
    few = tmp_path / "few.sqlite"
    write_log(few, config_of(flags_of(openrag_files, tmp_path)), 20)
    with pytest.raises(
        DataError,
        match=r"effective sample size of the starting policy is .* held-out selections, below 10",
    ):
        train.main(
            [
                *words,
                "--algorithm.log",
                str(few),
                "--training.batch-size",
                "4",
            ]
        )
    train.main([*words, "--algorithm.log", str(log)])
    kept = RunDirectory(tmp_path / "run")
    assert len(read_feedback(kept.feedback)) == 300
    with pytest.raises(RunDirectoryError, match=r"algorithm\.log"):
        train.main([*words, "--algorithm.log", str(certain)])


def test_a_selector_that_imitates_first_cannot_learn_from_a_log(openrag_files, tmp_path):
    flags = flags_of(
        openrag_files, tmp_path, selector__kind="listwise_lm", selector__imitation_steps=3
    )
    with pytest.raises(ConfigError, match=r"selector\.imitation_steps is 3"):
        config_of([*flags, "--algorithm.log", "log.sqlite"])


def test_the_plan_names_the_log_and_no_generator(openrag_files, tmp_path, capsys):
    train.main(
        [
            *flags_of(openrag_files, tmp_path),
            "--algorithm.log",
            "log.sqlite",
            "--dry-run",
            "True",
        ]
    )
    said = capsys.readouterr().out
    assert "log         selections of log.sqlite, 30% of their questions held back" in said
    assert "12 passes" in said
    assert "generator   " not in said
    assert not (tmp_path / "run").exists()
