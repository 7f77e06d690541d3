"""A retriever learns what helps the generator; stopped, split up or repeated it learns the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import (
    NUM_VALIDATION,
    Task,
    make_task,
    openrag_config,
    prepare,
    start,
    weights,
)
from stand_ins import CutPrompts, ReadingGenerator
from tiny_models import save_tiny_encoder, save_tiny_masked_lm

from rlrag.config import RunConfig
from rlrag.errors import GenerationError
from rlrag.records import Generation, Score
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.loop import TrainingLoop

# 24 of 28 questions have both pools: three steps a pass, two passes a stage.
NUM_STEPS, NUM_OFFLINE = 12, 6
OF_EVERY_STEP = {
    *("step", "epoch", "stage", "collect_s", "learn_s", "validate_s"),
    *("generator_tokens_spent", "generator_tokens_saved", "generator_tokens_total"),
    *("retriever/loss", "retriever/accuracy", "retriever/grad_norm", "retriever/learning_rate"),
}
OF_PAIRS = {"retriever/score_gap"}
OF_PROMPTS = {"prompt_cut_share", "dropped_passage_share"}
OF_WALKS = {"num_walked", "num_failed", "online_positives", "online_negatives"}
OF_VALIDATION = {
    f"validation/{name}" for name in ("accuracy", "em", "f1", "answer_words", "recall")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Untrained encoders, and what all runs share on disk."""
    directory = tmp_path_factory.mktemp("openrag")
    save_tiny_encoder(directory / "encoder")
    save_tiny_masked_lm(directory / "masked_lm")
    return directory


@pytest.fixture(scope="module")
def config(models) -> RunConfig:
    return openrag_config(models / "cache", models / "encoder")


@pytest.fixture(scope="module")
def task(config) -> Task:
    return make_task(config)


def finished(config: RunConfig, task: Task, directory: Path, generator=None) -> TrainingLoop:
    loop = start(config, task, directory, generator=generator)
    loop.run()
    return loop


def series(directory: Path, name: str) -> list[float]:
    """A metric of every step that has it."""
    return [line[name] for line in steps_of(directory) if name in line]


@pytest.mark.parametrize(
    "openrag",
    [
        {},
        {"online_epochs": 0, "offline_epochs": 4},
        {"offline_epochs": 0, "online_epochs": 4},
        {"first_stage": "frozen", "num_online": 20, "online_epochs": 4},
        {"labels": "gold"},
        {"micro_batch_texts": 3},
    ],
    ids=["both", "offline", "online", "frozen", "gold", "pieces"],
)
def test_training_finds_the_passages_that_help_with_unseen_subjects(
    config, task, tmp_path, openrag
):
    finished(changed(config, algorithm=openrag), task, tmp_path / "run")
    for name in ("validation/accuracy", "validation/recall"):
        found = series(tmp_path / "run", name)
        assert found[0] < 0.5 < 0.8 <= max(found)
    loss = series(tmp_path / "run", "retriever/loss")
    assert np.mean(loss[-3:]) < np.mean(loss[:3]) / 2


@pytest.mark.parametrize("stage", ["offline", "online"])
def test_distilling_likelihoods_lowers_the_divergence(config, task, tmp_path, stage):
    kl = changed(
        config,
        algorithm={
            "loss": "kl",
            "num_online": 12,
            "offline_epochs": 5 * (stage == "offline"),
            "online_epochs": 5 * (stage == "online"),
        },
    )
    finished(kl, task, tmp_path / "run")
    loss = series(tmp_path / "run", "retriever/loss")
    assert np.mean(loss[-3:]) < 0.6 * np.mean(loss[:3])
    accuracy = series(tmp_path / "run", "retriever/accuracy")
    assert np.mean(accuracy[-3:]) > np.mean(accuracy[:3])


@pytest.mark.parametrize(
    ("openrag", "num_offline", "num_online"),
    [
        ({}, 6, 6),
        ({"offline_epochs": 1, "online_epochs": 3}, 3, 9),
        ({"online_epochs": 0}, 6, 0),
        ({"offline_epochs": 0}, 0, 6),
        ({"loss": "kl"}, 6, 6),
    ],
)
def test_the_stages_follow_each_other(config, task, tmp_path, openrag, num_offline, num_online):
    """Offline steps ask the generator for nothing but what the pools could not say."""
    loop = finished(changed(config, algorithm=openrag), task, tmp_path / "run")
    assert loop.trainer.num_steps == num_offline + num_online
    records = steps_of(tmp_path / "run")[1:]
    assert [line["stage"] for line in records] == [0.0] * num_offline + [1.0] * num_online
    assert [line["step"] for line in records] == list(range(1, num_offline + num_online + 1))
    assert [line["epoch"] for line in records] == pytest.approx(
        [step / 3 for step in range(1, num_offline + num_online + 1)]
    )
    assert all(line["generator_tokens_spent"] == 0 for line in records[:num_offline])
    asked = sum(line["generator_tokens_spent"] for line in records[num_offline:])
    assert (asked > 0) == (num_online > 0)


class Fearful(ReadingGenerator):
    """Gives no answer where a passage speaks of one subject."""

    def generate(self, prompts, sampling):
        found = super().generate(prompts, sampling)
        return [
            GenerationError("every engine died of it") if "candle" in p.text else each
            for p, each in zip(prompts, found, strict=True)
        ]


def test_likelihoods_that_the_pools_do_not_hold_are_asked_for_offline_too(config, task, tmp_path):
    """A limit of tokens ends such steps; of those that ask for nothing it ends none."""
    kl = changed(config, algorithm={"loss": "kl"}, training={"max_failed_share": 0.9})
    whole = start(kl, task, tmp_path / "whole").trainer
    assert [whole.asks_generator(step) for step in (0, 5, 6)] == [False, False, True]
    holes = start(kl, task, tmp_path / "holes", generator=Fearful()).trainer
    assert holes.asks_generator(0)


class Unscored(ReadingGenerator):
    """Cannot score what is asked of some questions, from when it is told to."""

    def __init__(self, word: str, fails: bool = True) -> None:
        super().__init__()
        self.word, self.fails = word, fails

    def score(self, prompts, answers):
        return [
            Score(math.nan, 1, 1) if self.fails and self.word in p.text.split(" | ")[-1] else found
            for p, found in zip(prompts, super().score(prompts, answers), strict=True)
        ]


def test_a_question_that_is_not_trained_on_needs_no_likelihood(config, task, tmp_path):
    """None of the passages of two questions has one, so that these are in no batch."""
    kl = changed(config, algorithm={"loss": "kl"}, training={"max_failed_share": 0.9})
    trainer = start(kl, task, tmp_path / "run", generator=Unscored("candle")).trainer
    assert trainer.before.failures
    assert not trainer.asks_generator(0)


def few_judged(config: RunConfig, task: Task, loss: str) -> tuple[RunConfig, Task]:
    """One online pass in which much is found that the pools do not know."""
    online = changed(
        config,
        algorithm={"loss": loss, "offline_epochs": 0, "online_epochs": 1, "num_offline": 4},
        retrieval={"num_candidates": 4},
        training={"max_failed_share": 0.9},
    )
    return online, replace(task, data=replace(make_task(online).data, validation=None))


@pytest.mark.parametrize("loss", ["contrastive", "kl"])
def test_what_fails_online_is_counted_and_named(config, task, tmp_path, loss):
    online, few = few_judged(config, task, loss)
    generator = Unscored("what does", fails=False)
    loop = start(online, few, tmp_path / "run", generator=generator)
    generator.fails = True
    loop.run()
    records = steps_of(tmp_path / "run")[1:]
    failed = [record for record in records if record["num_failed"]]
    assert failed
    assert all(("failures" in record) == (record in failed) for record in records)
    assert "the generator scored a golden answer as nan" in failed[0]["failures"][0]


def test_a_walk_ends_where_what_was_found_does(config, task, tmp_path):
    online, few = few_judged(config, task, "contrastive")
    finished(changed(online, algorithm={"num_online": 2}), few, tmp_path / "run")
    assert max(series(tmp_path / "run", "num_walked")) == 2 * 8


def test_two_workers_tell_of_their_prompts_and_failures_together(
    config, task, tmp_path, monkeypatch
):
    """One of them cuts as much of its prompts as it shows, the other shows them whole."""
    online, few = few_judged(config, task, "kl")
    generators = [Unscored("what does", fails=False) for _ in range(2)]
    alone = start(online, few, tmp_path / "alone", generator=generators[0])
    prepare(online, few, tmp_path / "two", generators[1])
    first, second = make_group(2)
    whole = start(online, few, tmp_path / "two", None, generators[1], second)
    monkeypatch.setattr("openrag_runs.WordPrompts", CutPrompts)
    cut = start(online, few, tmp_path / "two", None, generators[1], first)
    for generator in generators:
        generator.fails = True
    alone.run()
    run_together([cut.run, whole.run])
    one, two = (steps_of(tmp_path / name)[1] for name in ("alone", "two"))
    assert two["num_failed"] == one["num_failed"] > 0
    assert 0.2 < two["prompt_cut_share"] < 0.45


def test_what_the_offline_stage_left_out_is_named_in_the_first_record(
    config, task, tmp_path, monkeypatch
):
    monkeypatch.setattr("openrag_runs.WordPrompts", CutPrompts)
    careless = changed(config, training={"max_failed_share": 0.9})
    finished(careless, task, tmp_path / "run", generator=Fearful())
    first, second = steps_of(tmp_path / "run")[:2]
    assert "question 'candle-0': every engine died of it" in first["failures"]
    assert len(set(first["failures"])) == len(first["failures"])
    assert "failures" not in second
    assert "for 50.0 % of their tokens" in first["alarms"]["cut_prompts"]
    for record in steps_of(tmp_path / "run"):
        asked = {0.5} if record.get("stage") or not record["step"] else {None}
        assert {record.get("prompt_cut_share")} == asked


@pytest.mark.parametrize("loss", ["contrastive", "kl"])
def test_the_records_have_the_documented_keys_and_finite_numbers(config, task, tmp_path, loss):
    finished(changed(config, algorithm={"loss": loss}), task, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    before = {"step", "epoch", "generator_tokens_total", "judge_s"}
    assert records[0].keys() == before | OF_PROMPTS | OF_VALIDATION
    for record in records[1:]:
        expected = OF_EVERY_STEP | (OF_PAIRS if loss == "contrastive" else {"num_failed"})
        if record["stage"]:
            expected = expected | OF_PROMPTS
        if record["stage"] and loss == "contrastive":
            expected = expected | OF_WALKS
        if record["step"] in (4, 8, 12):
            expected = expected | OF_VALIDATION
        assert record.keys() == expected, record["step"]
        assert record.get("retriever/score_gap") != 0  # a pair has two passages
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_walks_are_counted_over_the_batch(config, task, tmp_path):
    finished(config, task, tmp_path / "run")
    for record in steps_of(tmp_path / "run")[1 + NUM_OFFLINE :]:
        assert 8 <= record["num_walked"] <= 8 * 6
        assert 0 <= record["online_positives"] <= 8
        assert record["online_negatives"] <= 8
        assert record["num_failed"] == 0


def test_step_0_is_the_retriever_as_it_came(config, task, tmp_path):
    """With the whole corpus proposed, late-parametric retrieval is a search of the index."""
    whole = changed(config, algorithm={"first_stage": "frozen", "num_online": 60})
    for shown in (1, 3):
        shows = changed(whole, environment={"num_selected": shown})
        loop = start(shows, task, tmp_path / f"run{shown}", stop_at=0)
        with pytest.raises(StopAfter):
            loop.run()
        (record,) = steps_of(tmp_path / f"run{shown}")
        validation = task.data.validation
        found = [
            {passage.id for passage in validation.passages(row)[:shown]}
            for row in range(NUM_VALIDATION)
        ]
        recall = np.mean(
            [q.gold_ids[0] in ids for q, ids in zip(validation.questions, found, strict=True)]
        )
        assert record["validation/recall"] == pytest.approx(recall)


@pytest.mark.parametrize("stop_at", [0, 2, 5, 6, 7, 10, 12])
def test_a_run_that_was_stopped_ends_as_one_that_never_was(config, task, tmp_path, stop_at):
    """In the offline stage, at its end, and in the online stage; checkpoints come every third."""
    check_resume(config, task, tmp_path, stop_at)


@pytest.mark.parametrize(
    ("openrag", "stop_at"),
    [
        ({"loss": "kl"}, 4),
        ({"loss": "kl"}, 8),
        ({"labels": "gold"}, 7),
        ({"first_stage": "frozen"}, 8),
    ],
)
def test_so_does_every_kind_of_it(config, task, tmp_path, openrag, stop_at):
    check_resume(changed(config, algorithm=openrag), task, tmp_path, stop_at)


def check_resume(config: RunConfig, task: Task, directory: Path, stop_at: int) -> None:
    """Compare a run that a stop disturbs with one that nothing does."""
    whole = finished(config, task, directory / "whole")
    with pytest.raises(StopAfter):
        start(config, task, directory / "stopped", stop_at).run()
    continued = finished(config, task, directory / "stopped")
    assert steps_of(directory / "whole") == steps_of(directory / "stopped")
    expected, found = weights(whole), weights(continued)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    stores = [CheckpointStore(directory / name / "checkpoints") for name in ("whole", "stopped")]
    assert stores[0].steps() == stores[1].steps()
    files = [store.load(stores[0].steps()[-1]) for store in stores]
    assert files[0][1] == files[1][1]
    assert sorted(files[0][0]) == sorted(files[1][0]) == ["retriever", "retriever_optimizer"]
    for file, tensors in files[0][0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files[1][0][file][name]), (file, name)


def test_one_seed_repeats_and_two_differ(config, task, tmp_path):
    runs = [
        weights(finished(config.model_copy(update={"seed": seed}), task, tmp_path / name))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("loss", ["contrastive", "kl"])
def test_two_workers_do_what_one_does(config, task, tmp_path, loss):
    """Workers are threads that share a generator, so that its tokens are counted twice."""
    config = changed(config, algorithm={"loss": loss, "learning_rate": 5e-4})
    alone = finished(config, task, tmp_path / "alone")
    shared = ReadingGenerator()
    prepare(config, task, tmp_path / "two", shared)
    loops = [start(config, task, tmp_path / "two", None, shared, w) for w in make_group(2)]
    run_together([loop.run for loop in loops])
    expected, first, second = weights(alone), weights(loops[0]), weights(loops[1])
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(tensor, first[name], rtol=1e-2, atol=1e-3), name
    one, two = steps_of(tmp_path / "alone"), steps_of(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"generator_tokens_spent", "generator_tokens_total"}:
            assert left[key] == pytest.approx(right[key], rel=1e-2, abs=1e-3), key


class Listening(ReadingGenerator):
    """Counts what it was asked to score and to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_scored = self.num_answered = 0

    def generate(self, prompts, sampling):
        self.num_answered += len(prompts)
        return super().generate(prompts, sampling)

    def score(self, prompts, answers):
        self.num_scored += len(prompts)
        return super().score(prompts, answers)


def test_gold_labels_ask_the_generator_for_validations_alone(config, task, tmp_path):
    generator = Listening()
    finished(changed(config, algorithm={"labels": "gold"}), task, tmp_path / "run", generator)
    records = steps_of(tmp_path / "run")
    num_validations = sum("validation/accuracy" in line for line in records)
    assert generator.num_scored == 0
    assert generator.num_answered == num_validations * NUM_VALIDATION > 0
    assert all(line["generator_tokens_spent"] == 0 for line in records[1:])
    assert all(line["generator_tokens_total"] == 0 for line in records)


def test_the_tokens_of_the_pools_count_as_the_runs(config, task, tmp_path):
    generator = Listening()
    loop = start(config, task, tmp_path / "run", generator=generator)
    before = generator.tokens.spent
    assert generator.num_answered == generator.num_scored == 28 * 16
    loop.run()
    records = steps_of(tmp_path / "run")
    assert records[0]["generator_tokens_total"] == before > 0
    spent = sum(line["generator_tokens_spent"] for line in records[1:])
    assert records[-1]["generator_tokens_total"] == before + spent
    assert spent > 0


class Wordy(ReadingGenerator):
    """Says the answer among other words where it is right, and nothing else where it is not."""

    def generate(self, prompts, sampling):
        return [
            Generation(f"it is {g.text} " + "indeed " * 20, -1.0, 1, 1) if "answer" in g.text else g
            for g in super().generate(prompts, sampling)
        ]


def test_the_best_checkpoint_is_that_of_the_highest_accuracy(config, task, tmp_path):
    """No answer is an exact match here, and F1 hardly moves."""
    loop = finished(config, task, tmp_path / "run", Wordy())
    validated = [line for line in steps_of(tmp_path / "run") if "validation/em" in line]
    assert {line["validation/em"] for line in validated} == {0.0}
    accuracy = [line["validation/accuracy"] for line in validated]
    best = validated[int(np.argmax(accuracy))]  # the first of equals
    assert max(accuracy) > accuracy[0]
    assert (loop.progress.best_step, loop.progress.best_score) == (best["step"], max(accuracy))
    kept = CheckpointStore(tmp_path / "run" / "checkpoints").load(best["step"])[0]["retriever"]
    found = loop.trainer.encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_without_held_back_questions_the_last_weights_stay(config, task, tmp_path):
    data = replace(task.data, validation=None)
    loop = finished(config, replace(task, data=data), tmp_path / "run")
    assert loop.progress.best_step == NUM_STEPS
    assert not any("validation/accuracy" in line for line in steps_of(tmp_path / "run"))


class Failing(ReadingGenerator):
    """Cannot score anything once the pools are filled."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def score(self, prompts, answers):
        found = super().score(prompts, answers)
        return [Score(math.nan, 1, 1) for _ in found] if self.broken else found


@pytest.mark.parametrize("loss", ["contrastive", "kl"])
def test_too_many_failures_online_end_the_run_with_their_reason(config, task, tmp_path, loss):
    generator = Failing()
    loop = start(
        changed(config, algorithm={"loss": loss}), task, tmp_path / "run", generator=generator
    )
    generator.broken = True
    with pytest.raises(GenerationError, match=r"could not be scored.*max_failed_share.*nan"):
        loop.run()
    assert steps_of(tmp_path / "run")[-1]["step"] == NUM_OFFLINE


def test_the_token_budget_ends_the_run(config, task, tmp_path):
    finished(config, task, tmp_path / "whole")
    tokens = series(tmp_path / "whole", "generator_tokens_total")
    limits = {
        "training": {"max_generator_tokens": int(tokens[8])},
        "algorithm": {"offline_token_share": 1.0},
    }
    limited = changed(config, **limits)
    for name in ("first", "second"):
        finished(limited, task, tmp_path / name)
    first = steps_of(tmp_path / "first")
    assert first == steps_of(tmp_path / "second")
    assert first[-1]["step"] > NUM_OFFLINE
    assert first[-1]["generator_tokens_total"] >= tokens[8]
    assert first[-2]["generator_tokens_total"] < tokens[8]


@pytest.mark.parametrize("online_epochs", [0, 2])
def test_a_spent_budget_ends_no_step_that_asks_for_nothing(config, task, tmp_path, online_epochs):
    """Judgements take all of it: the offline stage trains to its end, and no step comes after."""
    finished(config, task, tmp_path / "whole")
    judged = int(series(tmp_path / "whole", "generator_tokens_total")[0])
    limited = changed(
        config,
        training={"max_generator_tokens": judged},
        algorithm={"offline_token_share": 1.0, "online_epochs": online_epochs},
    )
    finished(limited, task, tmp_path / "run")
    records = steps_of(tmp_path / "run")
    assert records[0]["generator_tokens_total"] == judged
    assert records[-1]["step"] == NUM_OFFLINE


@pytest.mark.parametrize(
    ("first_stage", "tied"), [("bag_of_tokens", True), ("bag_of_tokens", False), ("frozen", True)]
)
def test_an_encoder_into_the_vocabulary_is_trained_alike(
    config, models, tmp_path, first_stage, tied
):
    semi = changed(
        config,
        retrieval={
            "kind": "semi_parametric",
            "vocabulary_encoder": str(models / "masked_lm"),
        },
        algorithm={
            "first_stage": first_stage,
            "num_offline": 60,
            "temperature": 10.0,
            "tied": tied,
        },
    )
    check_resume(semi, make_task(semi), tmp_path, stop_at=8)
    records = steps_of(tmp_path / "whole")
    assert {line["stage"] for line in records[1:]} == {0.0, 1.0}
    loss = series(tmp_path / "whole", "retriever/loss")
    assert np.mean(loss[-4:]) < 0.8 * np.mean(loss[:3])
