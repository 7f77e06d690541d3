"""A mistake in what a run reads is told before anything is built, started or kept."""

from __future__ import annotations

import json

import gymnasium
import pytest
from gymnasium import spaces

from rlrag.cli import train
from rlrag.config import (
    DataConfig,
    EvaluationConfig,
    GeneratorConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.errors import ConfigError, DataError, EpisodeError
from rlrag.runs.directory import RunDirectory


def _no_room():
    raise MemoryError("no room")


class NoMask(gymnasium.Env):
    """Shows no action_mask."""

    observation_space = action_space = spaces.Discrete(2)


gymnasium.register("tests/NoRoom-v0", entry_point=_no_room)
gymnasium.register("tests/NoMask-v0", entry_point=NoMask)


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Of a run over five passages, whose generator is never asked."""
    (tmp_path / "model").mkdir()
    corpus = [{"id": f"p{i}", "contents": f"Title {i}\nthe value is v{i}"} for i in range(5)]
    questions = [
        {"id": f"q{i}", "question": f"what is value {i}?", "golden_answers": [f"v{i}"]}
        for i in range(5)
    ]
    for name, records in (("corpus", corpus), ("questions", questions)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    values = {
        "run-dir": tmp_path / "run",
        "cache-dir": tmp_path / "cache",
        "data.corpus": tmp_path / "corpus.jsonl",
        "data.train-questions": tmp_path / "questions.jsonl",
        "data.eval-questions": tmp_path / "questions.jsonl",
        "data.num-validation-questions": 0,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "retrieval.num-candidates": 3,
        "generator.model": tmp_path / "model",
        "training.launcher": "local",
        "training.batch-size": 2,
    }
    return ["factbook", *(w for name, value in values.items() for w in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("flag", "value", "kind", "said"),
    [
        ("data.eval-questions", "tset.jsonl", DataError, "tset.jsonl does not exist"),
        ("data.train-questions", "tset.jsonl", DataError, "tset.jsonl does not exist"),
        ("reward.functions", "answr_logp", ConfigError, "answr_logp"),
        (
            "environment.id",
            "mine/Reeding-v0",
            ConfigError,
            "environment.id 'mine/Reeding-v0' is not",
        ),
    ],
)
def test_a_typo_costs_nothing(flags, tmp_path, flag, value, kind, said):
    with pytest.raises(kind, match=said):
        train.main([*flags, f"--{flag}", value])
    assert not (tmp_path / "cache").exists()
    assert not RunDirectory(tmp_path / "run").config.exists()


@pytest.mark.parametrize(
    ("environment", "kind", "said"),
    [
        ("tests/NoRoom-v0", ConfigError, "cannot be created: MemoryError: no room"),
        ("tests/NoMask-v0", EpisodeError, "it needs Discrete actions from 0 on"),
        ("mine/Reeding-v0", ConfigError, "is not a registered environment"),
    ],
)
def test_an_environment_that_breaks_its_contract_is_named_first_and_by_a_dry_run(
    flags, environment, kind, said
):
    """The folder of the generator is empty: to start it would be another error."""
    for last in ("--dry-run", "--no-dry-run"):
        with pytest.raises(kind, match=f"environment.id '{environment}'.* {said}"):
            train.main([*flags, "--environment.id", environment, last])


def test_a_dry_run_names_a_reward_that_is_missing(flags):
    with pytest.raises(ConfigError, match="answr_logp"):
        train.main([*flags, "--reward.functions", "answr_logp", "--dry-run"])


def test_candidates_of_the_comparison_are_found_before_the_generator_starts(
    tmp_path, flags, capsys
):
    from rlrag.cli.single_run import open_all

    config = RunConfig(
        cache_dir=str(tmp_path / "cache"),
        data=DataConfig(
            corpus=str(tmp_path / "corpus.jsonl"),
            train_questions=str(tmp_path / "questions.jsonl"),
            eval_questions=str(tmp_path / "questions.jsonl"),
            num_validation_questions=0,
        ),
        training=TrainingConfig(batch_size=2),
        retrieval=RetrievalConfig(kind="bm25", encoder=None, num_candidates=3),
        generator=GeneratorConfig(model=str(tmp_path / "model")),
        evaluation=EvaluationConfig(systems=("bm25", "trained")),
    )
    open_all(config, evaluate=False)
    tables = tmp_path / "cache" / "candidates"
    assert not tables.exists()
    open_all(config, evaluate=True)
    assert len(list(tables.iterdir())) == 1
    captured = capsys.readouterr()
    assert "warning: 5 of 5 evaluation questions are training" in captured.out + captured.err
    too_many = config.model_copy(
        update={"retrieval": config.retrieval.model_copy(update={"num_candidates": 6})}
    )
    with pytest.raises(ConfigError, match="6"):
        open_all(too_many, evaluate=True)
