"""All families on all sets: the questions that are drawn, the flags of each run, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import evidence
from rlrag.cli.command_line import parse_config
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES


@pytest.fixture
def sources(tmp_path) -> Path:
    """One set with two files, and one with a single one; every fourth question has no answer."""
    folder = tmp_path / "questions"
    folder.mkdir()
    sizes = {"two.train": 280, "two.dev": 360, "one.train": 300, "few.train": 240}
    for name, size in sizes.items():
        records = [
            {
                "id": f"{name}-{i}",
                "question": f"who has {i}" + "?" * (i % 2),
                "golden_answers": ["somebody"] if i % 4 else [],
            }
            for i in range(size)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def drawn(name: str, sources: Path, folder: Path) -> list[list[dict]]:
    folder.mkdir(exist_ok=True)
    files = evidence.draw_questions(name, sources, folder)
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(("name", "num_test"), [("two", 200), ("one", 25)])
def test_questions_are_drawn_once_and_apart(name, num_test, sources, tmp_path):
    train_set, test_set = drawn(name, sources, tmp_path / "a")
    assert (len(train_set), len(test_set)) == (200, num_test)
    ids = [record["id"] for record in (*train_set, *test_set)]
    assert len(set(ids)) == len(ids)
    assert all(r["golden_answers"] for r in (*train_set, *test_set))
    assert not any(r["question"].endswith("?") for r in (*train_set, *test_set))
    assert ids != sorted(ids)
    assert drawn(name, sources, tmp_path / "b") == [train_set, test_set]


def test_too_few_questions_are_named(sources, tmp_path):
    with pytest.raises(ConfigError, match="180 questions of few for training and 0 for testing"):
        drawn("few", sources, tmp_path / "a")


@pytest.mark.parametrize("family", evidence.FAMILIES)
def test_every_family_has_a_valid_run_with_the_same_budget(family, tmp_path, monkeypatch):
    monkeypatch.setenv("RLRAG_DATA_DIR", str(tmp_path))
    recipe, flags = evidence.FAMILIES[family]
    common = evidence.run_flags(tmp_path / "corpus", tmp_path / "train", tmp_path / "test")
    config = parse_config(RECIPES[recipe](), [*common, *flags], "evidence")
    assert config.training.max_generator_tokens == evidence.TOKEN_BUDGET
    assert config.environment.num_selected == evidence.NUM_PASSAGES
    assert config.retrieval.kind == "dense"
    assert config.generator.prompt.passage_order == "best_last"
    assert config.data.eval_questions == str(tmp_path / "test")
    assert {"trained", "tuned_retriever"} & set(config.systems)


def part(name: str, *peers: str) -> dict[str, Any]:
    counts = {"num_test": 9, "num_passages": 1234, "minutes": 90.0}
    return {"name": name, "peers": list(peers), "lines": ["| x |"], **counts}


def test_the_page_has_every_set():
    text = evidence.page([part("nq", *evidence.PEERS), part("musique", *evidence.PEERS)])
    assert "took 3.0 hours" in text
    assert "## nq: 9 test questions, 1,234 passages\n\n| x |\n\n## musique" in text
    assert "Left out" not in text


def test_the_page_names_peers_that_are_missing():
    first, *others = evidence.PEERS
    text = evidence.page([part("nq", *evidence.PEERS), part("musique", *others)])
    assert f"Left out of some sets: {first}." in text


def test_a_set_that_is_finished_with_at_least_these_peers_is_taken(tmp_path, monkeypatch):
    first, second, third, *_ = evidence.PEERS
    (tmp_path / "summary.json").write_text(json.dumps(part("nq", first, second)))

    def drawn_again(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(evidence, "draw_questions", drawn_again)
    taken = [
        evidence.compared("nq", tmp_path, tmp_path, tmp_path, peers)
        for peers in ([first], [second, first])
    ]
    assert [found["peers"] for found in taken] == [[first, second]] * 2
    with pytest.raises(InterruptedError):
        evidence.compared("nq", tmp_path, tmp_path, tmp_path, [first, third])


def test_quality_within_a_share_of_the_budget_is_the_best_until_then(tmp_path):
    records = [(0, 0.2), (200_000, 0.1), (300_000, 0.3), (900_000, 0.9)]
    lines = [
        json.dumps({"generator_tokens_total": tokens, "validation/f1": f1})
        for tokens, f1 in records
    ]
    lines.insert(2, json.dumps({"generator_tokens_total": 250_000}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert evidence.TOKEN_BUDGET == 800_000
    *_, row = evidence.curve_lines({"some": tmp_path})
    assert row == "| some | 0.200 | 0.300 | 0.300 | 0.900 |"
