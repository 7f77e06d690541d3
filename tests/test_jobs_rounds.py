"""Retriever, selector and generator in turns: what each turn starts from, and what comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from openrag_runs import gold_flags, small_flags

from rlrag.bundle import load_bundle
from rlrag.cli import train
from rlrag.cli.rounds import OTHERS, RETRIEVER, Trained, config_of_turn, join_metrics
from rlrag.config import (
    AlternatingConfig,
    DROConfig,
    RetrievalConfig,
    RunConfig,
    SelectorConfig,
)
from rlrag.runs.directory import RunDirectory

JOINT = RunConfig(
    recipe="joint",
    retrieval=RetrievalConfig(kind="dense"),
    algorithm=AlternatingConfig(rounds=2, selection=DROConfig(parts=("selector", "generator"))),
)
AFTER = Trained(Path("encoder"), Path("selector"), Path("generator"), Path("experience"))


def test_the_first_turns_start_from_nothing():
    retriever = config_of_turn(JOINT, RETRIEVER, Trained())
    assert retriever.algorithm.parts == ("retriever",)
    assert retriever.retrieval == JOINT.retrieval
    assert (retriever.recipe, retriever.algorithm.name) == ("joint/retriever", "openrag")
    others = config_of_turn(JOINT, OTHERS, Trained(retriever=Path("encoder")))
    assert others.algorithm.parts == ("selector", "generator")
    assert others.training.log_experience
    assert others.retrieval.encoder == "encoder"
    assert others.selector == JOINT.selector
    assert others.generator == JOINT.generator


def test_later_turns_start_from_what_the_others_became():
    retriever = config_of_turn(JOINT, RETRIEVER, AFTER)
    assert (retriever.retrieval.encoder, retriever.generator.model) == ("encoder", "generator")
    assert retriever.selector.weights is None
    others = config_of_turn(JOINT, OTHERS, AFTER)
    assert (others.retrieval.encoder, others.generator.model) == ("encoder", "generator")
    assert others.selector.weights == "selector"


def test_a_selector_imitates_an_order_before_its_first_turn_alone():
    selector = SelectorConfig(kind="listwise_lm", imitation_steps=20, imitation_run="order.trec")
    joint = JOINT.model_copy(update={"selector": selector})
    first = config_of_turn(joint, OTHERS, Trained(retriever=Path("encoder")))
    assert (first.selector.imitation_steps, first.selector.imitation_run) == (20, "order.trec")
    later = config_of_turn(joint, OTHERS, AFTER)
    assert (later.selector.imitation_steps, later.selector.imitation_run) == (0, None)


def test_turns_share_what_earlier_ones_left_of_the_budget():
    limited = JOINT.model_copy(
        update={"training": JOINT.training.model_copy(update={"max_generator_tokens": 900})}
    )
    before = ((0.0, 4), (600.0, 2), (600.0, 1), (2000.0, 1))
    turns = [config_of_turn(limited, OTHERS, AFTER, *each) for each in before]
    assert [turn.training.max_generator_tokens for turn in turns] == [225, 150, 300, 1]
    assert config_of_turn(JOINT, OTHERS, AFTER, 600.0, 2).training.max_generator_tokens is None


JUDGED = {
    "judge_s": 2.0,
    "failures": ["q7 ends engines"],
    "prompt_cut_share": 0.25,
    "dropped_passage_share": 0.5,
    "alarms": {"cut_prompts": "no room"},
}


def test_turns_are_joined_as_one_run(tmp_path):
    run = RunDirectory(tmp_path)
    taken = {
        "1-retriever": [(0, 0.0, 50, {"judge_s": 4.0}), (1, 0.5, 60, {}), (2, 1.0, 60, {})],
        "1-selection": [(0, 0.0, 0, {}), (1, 2.0, 30, {"judge_s": 1.0})],
        "2-retriever": [
            (0, 0.0, 5, JUDGED),
            (1, 0.5, 6, {"failures": ["q9 took too long"], "alarms": {"failures": "one"}}),
        ],
    }
    for turn, lines in taken.items():
        directory = run.rounds / turn
        directory.mkdir(parents=True)
        records = [
            {"step": step, "epoch": epoch, "generator_tokens_total": tokens} | others
            for step, epoch, tokens, others in lines
        ]
        RunDirectory(directory).replace_metrics(records)
    join_metrics(JOINT, run)
    names = ("step", "epoch", "generator_tokens_total", "round", "trains_retriever", "judge_s")
    assert [tuple(record.get(name) for name in names) for record in run.read_metrics()] == [
        (0, 0.0, 50, 1, 1.0, 4.0),
        (1, 0.5, 60, 1, 1.0, None),
        (2, 1.0, 60, 1, 1.0, None),
        (3, 3.0, 90, 1, 0.0, 1.0),
        (4, 3.5, 96, 2, 1.0, 2.0),
    ]
    failures = [record.get("failures") for record in run.read_metrics()]
    assert failures == [None] * 4 + [["q7 ends engines", "q9 took too long"]]
    last = run.read_metrics()[-1]
    assert last["alarms"] == {"cut_prompts": "no room", "failures": "one"}
    assert (last["prompt_cut_share"], last["dropped_passage_share"]) == (0.25, 0.5)


def words_of(files: Path, directory: Path, rounds: int, *systems: str) -> list[str]:
    """Of `jobs.train`, for a small run of all parts in turns."""
    whole = gold_flags(files, directory)
    small = small_flags(files, directory)
    of_retriever = [
        word.replace("--algorithm.", "--algorithm.retriever.") for word in whole[len(small) + 2 :]
    ]
    flags = [
        *small,
        *("--algorithm.name", "alternating", "--algorithm.rounds", str(rounds)),
        *of_retriever,
        *("--algorithm.selection.parts", "selector", "generator"),
        *("--algorithm.selection.num-samples", "2", "--training.num-epochs", "1"),
        *("--generator-training.lora-rank", "2", "--retrieval.num-candidates", "4"),
    ]
    return ["factbook", *flags, "--evaluation.systems", *systems]


@pytest.mark.slow
def test_turns_that_are_compared_with_nothing_end_with_their_bundle(openrag_files, tmp_path):
    train.main(words_of(openrag_files, tmp_path, 1))
    assert load_bundle(tmp_path / "run" / "bundle").evaluation is None
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow
def test_two_rounds_end_in_one_bundle_of_all_parts(openrag_files, tmp_path, capsys):
    systems = ["retriever_order", "original_retriever", "tuned_retriever", "trained"]
    words = words_of(openrag_files, tmp_path, 2, *systems)
    train.main(words)
    run = tmp_path / "run"
    turns = ["1-retriever", "1-selection", "2-retriever", "2-selection"]
    assert sorted(path.name for path in (run / "rounds").iterdir()) == turns
    configs = {
        turn: json.loads((run / "rounds" / turn / "config.json").read_text()) for turn in turns
    }
    bundles = {turn: run / "rounds" / turn / "bundle" for turn in turns}
    assert configs["2-retriever"]["retrieval"]["encoder"] == str(
        bundles["1-retriever"] / "retriever"
    )
    assert configs["2-retriever"]["generator"]["model"] == str(bundles["1-selection"] / "generator")
    assert configs["2-selection"]["selector"]["weights"] == str(
        bundles["1-selection"] / "selector.safetensors"
    )
    assert list((run / "rounds" / "1-selection" / "experience").iterdir())
    bundle = load_bundle(run / "bundle")
    for mine, last in (
        (bundle.retriever_dir, bundles["2-retriever"] / "retriever"),
        (bundle.generator_dir, bundles["2-selection"] / "generator"),
    ):
        assert mine is not None
        for path in last.rglob("*.safetensors"):
            assert (mine / path.relative_to(last)).read_bytes() == path.read_bytes()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == list(range(len(steps)))
    for added in ("generator_tokens_total", "epoch"):
        values = [record[added] for record in records]
        assert values == sorted(values)
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["systems"]) == systems
    # Stopped in the last turn: what is done stays as it is.
    kept = (bundles["2-retriever"] / "bundle.json").stat().st_mtime_ns
    shutil.rmtree(bundles["2-selection"])
    capsys.readouterr()
    train.main(words)
    said = capsys.readouterr().err
    assert said.count("done before") == 3
    assert (bundles["2-retriever"] / "bundle.json").stat().st_mtime_ns == kept
    again = json.loads((run / "evaluation.json").read_text())
    assert again["systems"] == found["systems"]
