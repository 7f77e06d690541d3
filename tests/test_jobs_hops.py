"""A run whose episodes hop and search is trained, bundled, evaluated and asked alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_program import HOP_FLAGS, tiny_flags

from jobs import train
from rlrag import load_pipeline
from rlrag.config import RunConfig
from rlrag.environment.rollout import play_greedy
from rlrag.pipeline import open_evaluation_data, open_library


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hops")
    directory = folder / "run"
    words = [*tiny_flags(folder), *HOP_FLAGS, "--training.launcher", "local"]
    words += ["--training.num-epochs", "2", "--environment.num-selected", "3"]
    words += ["--run-dir", str(directory), "--cache-dir", str(folder / "cache")]
    train.main(["factbook", *words])
    return directory


def config_of(run: Path) -> RunConfig:
    return RunConfig.from_json((run / "config.json").read_text())


def test_its_records_count_what_its_paths_did(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    assert len(steps) > 3
    for line in steps:
        assert 0 <= line["reward/num_picks"] <= 3
        assert line["reward/num_turns"] == line["reward/num_picks"] + line["reward/num_queries"]
    assert any(line["reward/num_queries"] > 0 for line in steps)


def test_its_bundle_answers_from_the_paths_that_were_evaluated(run):
    config = config_of(run)
    with load_pipeline(run / "bundle") as pipeline:
        table, _ = open_evaluation_data(config, open_library(config))
        assert table.sources is not None
        assert table.sources.graph is not None
        played = play_greedy(config.environment, pipeline.bundle.policy, table)
        assert all(path is not None for path in played.paths)
        found = {p.passage_id for path in played.paths for t in path.turns()[1:] for p in t.found}
        assert found, "no path found more than its question's hits"
        for golden in pipeline.bundle.golden:
            row = next(i for i, q in enumerate(table.questions) if q.id == golden.id)
            assert tuple(p.id for p in played.evidence[row]) == golden.passage_ids
            answer = pipeline.answer(golden.question)
            assert tuple(p.id for p in answer.passages) == golden.passage_ids
            assert answer.text == golden.answer
