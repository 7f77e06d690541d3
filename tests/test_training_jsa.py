"""Retrievers learn what the generator finds likely; stopped or split up they learn the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jsa_runs import jsa_config, last_checkpoint, series, start
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import NUM_VALIDATION, Task, make_task, weights
from stand_ins import CutPrompts, ReadingGenerator, WordPrompts
from tiny_models import save_tiny_encoder, save_tiny_masked_lm

from rlrag.config import RunConfig
from rlrag.errors import DataError, GenerationError
from rlrag.records import Score
from rlrag.runs.directory import RunDirectory
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.budget import estimate_budget
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.jsa.generator import JSAGenerator
from rlrag.training.plan import describe_plan

# 28 questions in batches of 8, four passes.
NUM_STEPS = 14
OF_RETRIEVERS = {"posterior", "retriever", "retriever_optimizer"}
OF_EVERY_STEP = {
    *("step", "epoch", "collect_s", "learn_s", "validate_s", "num_failed"),
    *("prompt_cut_share", "dropped_passage_share"),
    *("generator_tokens_spent", "generator_tokens_saved", "generator_tokens_total"),
    *("retriever/loss", "retriever/grad_norm", "retriever/learning_rate"),
    *(f"jsa/{name}" for name in ("acceptance", "num_visited", "num_scored", "num_domain")),
    *(f"jsa/{name}" for name in ("ess", "kl", "answer_logp")),
}
OF_VALIDATION = {
    f"validation/{name}" for name in ("accuracy", "em", "f1", "answer_words", "recall")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Untrained encoders, and what all runs share on disk."""
    directory = tmp_path_factory.mktemp("jsa")
    save_tiny_encoder(directory / "encoder")
    save_tiny_masked_lm(directory / "masked_lm")
    return directory


@pytest.fixture(scope="module")
def config(models) -> RunConfig:
    return jsa_config(models)


@pytest.fixture(scope="module")
def task(config) -> Task:
    return make_task(config)


@pytest.fixture(scope="module")
def whole(config, task, tmp_path_factory) -> Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    start(config, task, directory).run()
    return directory


def test_training_finds_the_passages_that_help_also_with_unseen_subjects(config, task, tmp_path):
    learning = changed(
        config,
        algorithm={"num_prior": 20, "num_posterior": 20, "temperature": 0.02},
        training={"num_epochs": 8, "warmup_steps": 5},
    )
    loop = start(learning, task, tmp_path / "run")
    questions = task.data.train.questions

    def recall() -> float:
        rows_B1 = loop.trainer.retrievers.search([q.question for q in questions], 1)
        found = [task.library.corpus[int(row)].id for row in rows_B1[:, 0]]
        return float(np.mean([f in q.gold_ids for f, q in zip(found, questions, strict=True)]))

    assert recall() < 0.3
    loop.run()
    assert recall() > 0.6
    for name in ("validation/accuracy", "validation/recall"):
        found = series(tmp_path / "run", name)
        assert found[0] < 0.3
        assert max(found) >= 0.5
    logp = series(tmp_path / "run", "jsa/answer_logp")
    assert np.mean(logp[-3:]) > np.mean(logp[:3]) + 0.5


def test_the_records_have_the_documented_keys_and_finite_numbers(whole):
    records = steps_of(whole)
    clocks = {"collect_s", "learn_s", "validate_s"}
    assert records[0].keys() == {"step", "epoch", "generator_tokens_total"} | OF_VALIDATION
    assert len(records) == NUM_STEPS + 1
    for record in records[1:]:
        of_validation = OF_VALIDATION if record["step"] in (4, 8, 12, 14) else set()
        assert record.keys() == (OF_EVERY_STEP - clocks) | of_validation, record["step"]
        assert 0 <= record["jsa/acceptance"] <= 1
        assert 1 <= record["jsa/num_visited"] <= record["jsa/num_scored"]
        assert record["jsa/num_scored"] <= record["jsa/num_domain"] <= 12
        assert 1 <= record["jsa/ess"] <= 50
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert records[-1]["epoch"] == pytest.approx(NUM_STEPS * 8 / 28)


@pytest.mark.parametrize("shown", [1, 3])
def test_step_0_is_the_retriever_as_it_came(config, task, tmp_path, shown):
    shows = changed(config, environment={"num_selected": shown})
    with pytest.raises(StopAfter):
        start(shows, task, tmp_path / "run", 0).run()
    validation = task.data.validation
    first = [
        {passage.id for passage in validation.passages(row)[:shown]}
        for row in range(NUM_VALIDATION)
    ]
    recall = np.mean([q.gold_ids[0] in f for q, f in zip(validation.questions, first, strict=True)])
    assert steps_of(tmp_path / "run")[0]["validation/recall"] == pytest.approx(recall)


def check_continued(whole: Path, directory: Path, files: set[str]) -> None:
    """Records and the last checkpoint; the best one may be the first."""
    assert steps_of(whole) == steps_of(directory)
    expected, found = last_checkpoint(whole), last_checkpoint(directory)
    assert {name.split("/")[0] for name in found} == files
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("stop_at", [0, 5, 9])
def test_a_run_that_was_stopped_ends_as_one_that_never_was(config, task, whole, tmp_path, stop_at):
    with pytest.raises(StopAfter):
        start(config, task, tmp_path / "run", stop_at).run()
    start(config, task, tmp_path / "run").run()
    check_continued(whole, tmp_path / "run", OF_RETRIEVERS)


def test_two_workers_do_what_one_does(config, task, tmp_path):
    """Workers are threads that share a generator, so that its tokens are counted twice."""
    short = changed(config, training={"num_epochs": 1})
    task = replace(task, data=replace(task.data, validation=None))
    alone = start(short, task, tmp_path / "alone")
    alone.run()
    RunDirectory(tmp_path / "two").claim(short)
    shared = ReadingGenerator()
    loops = [start(short, task, tmp_path / "two", None, shared, w) for w in make_group(2)]
    run_together([loop.run for loop in loops])
    first, second = weights(loops[0]), weights(loops[1])
    for name, tensor in weights(alone).items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(tensor, first[name], rtol=1e-2, atol=1e-3), name
    one, two = steps_of(tmp_path / "alone"), steps_of(tmp_path / "two")
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"generator_tokens_spent", "generator_tokens_total"}:
            assert left[key] == pytest.approx(right[key], rel=1e-2, abs=1e-3), key


def test_an_encoder_into_the_vocabulary_learns_alike(models, tmp_path):
    semi = jsa_config(
        models,
        retrieval={
            "kind": "semi_parametric",
            "vocabulary_encoder": str(models / "masked_lm"),
        },
        algorithm={"temperature": 5.0, "learning_rate": 1e-3, "mis_steps": 8},
        training={"num_epochs": 1, "checkpoint_every": 2},
    )
    task = make_task(semi)
    start(semi, task, tmp_path / "whole").run()
    with pytest.raises(StopAfter):
        start(semi, task, tmp_path / "stopped", 3).run()
    start(semi, task, tmp_path / "stopped").run()
    check_continued(tmp_path / "whole", tmp_path / "stopped", OF_RETRIEVERS)
    assert len(steps_of(tmp_path / "whole")) == 4
    assert {line["jsa/num_scored"] <= 8 for line in steps_of(tmp_path / "whole")[1:]} == {True}


def joint_config(config: RunConfig, model_dir: Path, **sections) -> RunConfig:
    """Retriever and a tiny generator together, for three steps."""
    config = changed(
        config,
        generator={"model": str(model_dir), "dtype": "float32", "max_new_tokens": 3},
        generator_training={
            "precision": "float32",
            "lora_rank": 2,
            "learning_rate": 1e-2,
            "sequences_per_question": 1,
        },
        training={"num_epochs": 1, "checkpoint_every": 1, "validate_every": 2},
        algorithm={"train_generator": True},
    )
    return changed(config, **sections)


def test_the_generator_learns_beside_the_retriever(config, task, model_dir, tmp_path):
    """Engines answer with the weights of each step; a stopped run ends with the same ones."""
    joint = joint_config(config, model_dir)
    engines = ReadingGenerator()
    start(joint, task, tmp_path / "whole", generator=engines).run()
    assert engines.version == 3
    records = steps_of(tmp_path / "whole")
    assert [line["generator/num_sequences"] for line in records[1:]] == [8, 8, 8]
    before, after = (last_checkpoint(tmp_path / "whole", step) for step in (0, 3))
    changing = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changing == {"retriever", "posterior", "generator"}
    with pytest.raises(StopAfter):
        start(joint, task, tmp_path / "stopped", 2).run()
    surviving = ReadingGenerator()
    start(joint, task, tmp_path / "stopped", generator=surviving).run()
    of_both = {*OF_RETRIEVERS, "generator", "generator_optimizer"}
    check_continued(tmp_path / "whole", tmp_path / "stopped", of_both)
    assert surviving.identity == engines.identity


def test_the_mean_likelihood_weighs_the_generators_loss_by_the_tokens_too(
    config, task, model_dir, tmp_path
):
    """A single proposal has the whole weight under both; all targets have 9 tokens."""
    losses = []
    for likelihood in ("product", "mean"):
        joint = joint_config(
            config, model_dir, algorithm={"likelihood": likelihood, "mis_steps": 1}
        )
        with pytest.raises(StopAfter):
            start(joint, task, tmp_path / likelihood, 1).run()
        record = steps_of(tmp_path / likelihood)[1]
        assert "jsa/acceptance" not in record
        losses.append(record["generator/loss"])
    assert losses[0] == pytest.approx(9 * losses[1], rel=1e-4)


def test_retrievers_and_generator_learn_from_the_weights_that_are_set(
    config, task, model_dir, tmp_path
):
    """The posterior tells all that was scored apart; a chain of 3 steps knows thirds alone."""
    for weights_kind in ("posterior", "visits"):
        joint = joint_config(config, model_dir, algorithm={"weights": weights_kind, "mis_steps": 3})
        joint = changed(joint, generator_training={"sequences_per_question": None})
        loop = start(joint, task, tmp_path / weights_kind, 1)
        seen: dict[str, torch.Tensor] = {}
        trainer = loop.trainer
        for name, learner in (("both", trainer.retrievers), ("one", trainer._trained_generator)):
            learner.update = recorded(learner.update, seen, name)
        with pytest.raises(StopAfter):
            loop.run()
        assert torch.equal(seen["both"], seen["one"])
        assert torch.allclose(seen["both"].sum(dim=1), torch.ones(8, dtype=torch.float64))
        thirds = torch.allclose(3 * seen["both"], (3 * seen["both"]).round(), atol=1e-9)
        assert thirds == (weights_kind == "visits")
        record = steps_of(tmp_path / weights_kind)[1]
        assert 0 <= record["jsa/acceptance"] <= 1
        assert 1 <= record["jsa/num_visited"] <= record["jsa/num_scored"]


class Noting(ReadingGenerator):
    """Notes which weights were asked, for what, and what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []
        self.answered_with: list[int] = []
        self.scored: list[tuple[int, str, float]] = []

    def load_weights(self, weights):
        super().load_weights(weights)
        self.given.append(weights.version)

    def generate(self, prompts, sampling):
        self.answered_with.append(self.version)
        return super().generate(prompts, sampling)

    def score(self, prompts, answers):
        found = super().score(prompts, answers)
        self.scored += [(self.version, p.text, s.logp) for p, s in zip(prompts, found, strict=True)]
        return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_engines_answer_and_score_with_the_weights_of_the_step(
    config, task, model_dir, tmp_path, method
):
    """Each set is sent once; validations come before the first step, after the second and last."""
    joint = joint_config(config, model_dir, generator_training={"method": method})
    engines = Noting()
    loop = start(joint, task, tmp_path / "run", generator=engines)
    loop.run()
    assert engines.given == [1, 2, 3]
    assert list(dict.fromkeys(engines.answered_with)) == [0, 2, 3]
    assert list(dict.fromkeys(version for version, _, _ in engines.scored)) == [0, 1, 2]
    total = steps_of(tmp_path / "run")[-1]["generator_tokens_total"]
    assert 0 < total <= engines.tokens.spent  # that of validations is no step's


def test_engines_that_outlived_a_worker_go_back_to_the_weights_of_the_checkpoint(
    config, task, model_dir, tmp_path
):
    joint = joint_config(config, model_dir, training={"checkpoint_every": 9})
    engines = Noting()
    with pytest.raises(StopAfter):
        start(joint, task, tmp_path / "run", 2, engines).run()
    start(joint, task, tmp_path / "run", None, engines).run()
    assert engines.given == [1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_weights_are_sent_in_the_format_of_the_engines(
    config, task, model_dir, tmp_path, dtype
):
    joint = joint_config(
        config, model_dir, generator={"dtype": dtype}, generator_training={"method": "full"}
    )
    formats: set[torch.dtype] = set()

    class Receiving(ReadingGenerator):
        """Notes the format of what it is sent."""

        def load_weights(self, weights):
            formats.update(tensor.dtype for tensor in weights.tensors.values())
            super().load_weights(weights)

    with pytest.raises(StopAfter):
        start(joint, task, tmp_path / "run", 2, Receiving()).run()
    assert formats == {getattr(torch, dtype)}


def test_the_tokens_of_the_steps_are_those_that_they_spent(config, task, tmp_path):
    engines = ReadingGenerator()
    alone = replace(task, data=replace(task.data, validation=None))
    start(changed(config, training={"num_epochs": 1}), alone, tmp_path / "run", None, engines).run()
    spent = [line["generator_tokens_spent"] for line in steps_of(tmp_path / "run")[1:]]
    assert sum(spent) == engines.tokens.spent > 0


def read_in(loop, read: list[set[tuple[int, ...]]]) -> None:
    """Run a loop that trains a generator; note which prompts it reads in each step."""
    answer_logp, step = loop.trainer.generator.answer_logp, loop.trainer.step

    def reading(prompts, answers):
        read[-1].update(prompts)
        return answer_logp(prompts, answers)

    def stepping(*arguments):
        read.append(set())
        return step(*arguments)

    loop.trainer.generator.answer_logp, loop.trainer.step = reading, stepping
    loop.run()


def test_proposals_and_the_generators_passages_are_drawn_anew_in_each_step_and_by_each_seed(
    config, task, model_dir, tmp_path
):
    """Steps of all 28 questions that hardly change a weight: all else would be the same."""
    still = joint_config(
        changed(config, algorithm={"learning_rate": 1e-12, "mis_steps": 200}),
        model_dir,
        generator_training={"learning_rate": 1e-12},
        training={"batch_size": 28, "num_epochs": 2},
    )
    short = changed(config, algorithm={"mis_steps": 1, "learning_rate": 1e-12})
    short = changed(short, training={"batch_size": 28, "num_epochs": 2})
    alone = replace(task, data=replace(task.data, validation=None))
    read, scored = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        read.append([])
        seeded = still.model_copy(update={"seed": seed})
        read_in(start(seeded, alone, tmp_path / f"read-{name}"), read[-1])
        engines = Noting()
        seeded = short.model_copy(update={"seed": seed})
        start(seeded, alone, tmp_path / f"scored-{name}", None, engines).run()
        texts = [text for _, text, _ in engines.scored]
        scored.append([set(texts[:28]), set(texts[28:])])
    for first, again, other in (read, scored):
        assert first == again
        assert first[0] != first[1]
        assert first[0] != other[0]


def test_of_the_passages_of_a_question_the_likely_ones_are_read(config, task, model_dir, tmp_path):
    """With the ledger among many the posterior has nearly all of its weight on it."""
    joint = joint_config(
        config,
        model_dir,
        algorithm={"num_prior": 20, "num_posterior": 20, "temperature": 5.0, "mis_steps": 400},
        training={"batch_size": 28},
    )
    alone = replace(task, data=replace(task.data, validation=None))
    prompts: list[set[tuple[int, ...]]] = []
    read_in(start(joint, alone, tmp_path / "run"), prompts)
    texts = [bytes(prompt).decode() for prompt in prompts[0]]
    right = [
        any(answer in text for q in task.data.train.questions for answer in q.golden_answers)
        for text in texts
    ]
    assert np.mean(right) > 0.7


def test_questions_without_an_answer_are_passed_over(config, task, tmp_path):
    """Those at even places have none: the 14 others fill a step of 14."""
    table = task.data.train
    asked = tuple(
        replace(q, golden_answers=(" ",)) if n % 2 == 0 else q
        for n, q in enumerate(table.questions)
    )
    half = replace(task, data=replace(task.data, train=replace(table, questions=asked)))
    engines = Noting()
    loop = start(
        changed(config, training={"batch_size": 14, "num_epochs": 1}),
        replace(half, data=replace(half.data, validation=None)),
        tmp_path / "run",
        generator=engines,
    )
    loop.run()
    assert loop.trainer.num_steps == 1
    assert {text.split(" | ")[1] for _, text, _ in engines.scored} == {
        q.question for q in asked[1::2]
    }


def test_means_are_over_the_questions_that_have_weights(config, task, tmp_path):
    """One proposal a question, which has the whole weight; those about candles cannot be scored."""

    class Lacking(Noting):
        """Cannot score what is asked of some questions."""

        def score(self, prompts, answers):
            return [
                Score(math.nan, 1, 1) if "candle" in p.text.split(" | ")[1] else found
                for p, found in zip(prompts, super().score(prompts, answers), strict=True)
            ]

    engines = Lacking()
    lenient = changed(
        config,
        algorithm={"mis_steps": 1},
        training={"batch_size": 28, "num_epochs": 1, "max_failed_share": 0.9},
    )
    alone = replace(task, data=replace(task.data, validation=None))
    start(lenient, alone, tmp_path / "run", generator=engines).run()
    record = steps_of(tmp_path / "run")[1]
    found = [logp for _, text, logp in engines.scored if "candle" not in text.split(" | ")[1]]
    assert (record["num_failed"], len(found)) == (2, 26)
    assert record["jsa/num_scored"] == 1
    assert record["jsa/answer_logp"] == pytest.approx(np.mean(found))


def test_two_workers_tell_of_their_prompts_together(config, task, tmp_path, monkeypatch):
    """One of them cuts as much of its prompts as it shows, the other shows them whole."""
    short = changed(config, training={"num_epochs": 1})
    alone = replace(task, data=replace(task.data, validation=None))
    RunDirectory(tmp_path / "run").claim(short)
    first, second = make_group(2)
    whole = start(short, alone, tmp_path / "run", None, ReadingGenerator(), second)
    monkeypatch.setattr("jsa_runs.WordPrompts", CutPrompts)
    cut = start(short, alone, tmp_path / "run", None, ReadingGenerator(), first)
    run_together([cut.run, whole.run])
    shares = series(tmp_path / "run", "prompt_cut_share")
    assert len(shares) == 3
    assert all(0.25 < share < 0.42 for share in shares)


@pytest.mark.parametrize("likelihood", ["product", "mean"])
def test_the_generators_loss_is_the_weighed_likelihood_of_the_answers(
    config, task, model_dir, likelihood
):
    """By hand, one passage and one answer at a time; a passage without weight is not read."""
    joint = joint_config(config, model_dir, algorithm={"likelihood": likelihood})
    joint = changed(joint, generator_training={"sequences_per_question": None})
    corpus, prompts = task.library.corpus, WordPrompts()
    trained = JSAGenerator(joint, corpus, prompts, ReadingGenerator(), 10, SingleWorker())
    questions = task.data.train.questions[:2]
    rows_BN, weights_BN = np.array([[4, 9, 30], [7, 8, -1]]), [[0.7, 0.3, 0.0], [0.1, 0.9, 0.0]]
    expected = 0.0
    for question, rows, given in zip(questions, rows_BN.tolist(), weights_BN, strict=True):
        target = prompts.encode_target(question.golden_answers[0])
        for row, weight in zip(rows, given, strict=True):
            if weight:
                prompt = prompts.build(question, [corpus[row]]).token_ids
                logp = trained.model.answer_logp([prompt], [target]).item()
                expected -= weight * logp / (len(target) if likelihood == "mean" else 1) / 8
    metrics = trained.update(
        questions, rows_BN, torch.tensor(weights_BN, dtype=torch.float64), 0, [[0], [1]]
    )
    assert metrics["generator/num_sequences"] == 4
    assert metrics["generator/loss"] == pytest.approx(expected, rel=1e-4)


def test_two_workers_train_the_generator_as_one_does(config, task, model_dir, tmp_path):
    joint = joint_config(config, model_dir, generator_training={"sequences_per_question": None})
    alone = replace(task, data=replace(task.data, validation=None))
    start(joint, alone, tmp_path / "alone").run()
    RunDirectory(tmp_path / "two").claim(joint)
    loops = [start(joint, alone, tmp_path / "two", None, Noting(), w) for w in make_group(2)]
    run_together([loop.run for loop in loops])
    for one, two in zip(steps_of(tmp_path / "alone"), steps_of(tmp_path / "two"), strict=True):
        for name in one.keys() & {"generator/loss", "generator/grad_norm", "retriever/loss"}:
            assert two[name] == pytest.approx(one[name], rel=2e-2), name


def recorded(update, seen, name):
    """An update that keeps the weights that it was given."""

    def recording(*args):
        seen[name] = next(each for each in args if isinstance(each, torch.Tensor))
        return update(*args)

    return recording


class Failing(ReadingGenerator):
    """Cannot score what is asked of some passages."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self.word = word

    def score(self, prompts, answers):
        return [
            Score(math.nan, 1, 1) if self.word in p.text else found
            for p, found in zip(prompts, super().score(prompts, answers), strict=True)
        ]


def test_too_many_failures_end_the_run_with_their_reason(config, task, tmp_path):
    loop = start(config, task, tmp_path / "run", generator=Failing("holds"))
    with pytest.raises(GenerationError, match=r"could not be scored.*max_failed_share.*nan"):
        loop.run()


def test_passages_that_fail_are_left_out_and_named(config, task, tmp_path, monkeypatch):
    monkeypatch.setattr("jsa_runs.WordPrompts", CutPrompts)
    lenient = changed(config, training={"max_failed_share": 0.9, "num_epochs": 1})
    start(lenient, task, tmp_path / "run", generator=Failing("rumour")).run()
    records = [line for line in steps_of(tmp_path / "run")[1:] if line["num_failed"]]
    assert records
    assert "the generator scored a golden answer as nan" in records[0]["failures"][0]
    assert {*series(tmp_path / "run", "prompt_cut_share")} == {0.5}
    assert "for 50.0 % of their tokens" in steps_of(tmp_path / "run")[1]["alarms"]["cut_prompts"]


def test_questions_without_an_answer_are_not_trained_on(config, task, tmp_path):
    table = task.data.train
    silent = replace(table.questions[0], golden_answers=(" ",))
    few = replace(table, questions=(*table.questions[:7], *([silent] * 21)))
    with pytest.raises(DataError, match=r"7 questions have a golden answer, fewer than .*size 8"):
        start(config, replace(task, data=replace(task.data, train=few)), tmp_path / "run")


def test_the_budget_counts_each_domain_once_while_the_generator_is_frozen(config, task):
    """28 questions, 6 + 6 passages each, four validations and the first of 12 questions."""
    budget = estimate_budget(config, task.data, WordPrompts())
    assert budget.num_steps == NUM_STEPS
    assert budget.num_requests == 28 * 12 + (1 + NUM_STEPS // 4) * NUM_VALIDATION
    joint = changed(config, algorithm={"train_generator": True})
    trained = estimate_budget(joint, task.data, WordPrompts())
    assert trained.num_requests == NUM_STEPS * 8 * 12 + (1 + NUM_STEPS // 4) * NUM_VALIDATION
    assert budget.num_rollouts == trained.num_rollouts == NUM_STEPS * 8 * 50
    short = estimate_budget(changed(config, algorithm={"mis_steps": 3}), task.data, WordPrompts())
    assert short.num_requests == 28 * 3 + (1 + NUM_STEPS // 4) * NUM_VALIDATION
    assert short.num_rollouts == NUM_STEPS * 8 * 3
    assert "50 proposals a question from the first 6 passages" in describe_plan(
        changed(config, generator={"model": "some-1B"})
    )
