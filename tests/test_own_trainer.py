"""Trainers of anybody's own and the built-in ones: one contract, and what breaks it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from jsa_runs import jsa_config
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import make_task, openrag_config, prepare
from stand_ins import ReadingGenerator, WordPrompts
from tiny_models import save_tiny_encoder

import rlrag
from rlrag.bundle import load_bundle
from rlrag.bundle_files import read_bundle
from rlrag.cli import single_run, train
from rlrag.cli.command_line import run_program
from rlrag.config import DROConfig, OwnTrainerConfig, RunConfig
from rlrag.errors import ConfigError, TrainerError
from rlrag.pipeline import Pipeline, open_library
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.testing import check_trainer, sample_context
from rlrag.training.budget import estimate_budget
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.launch import open_trainer
from rlrag.training.loop import TrainingLoop
from rlrag.training.plan import describe_plan
from rlrag.training.trainer import TrainerContext

SELF_CRITICAL = "examples.own_trainer:SelfCritical"

SOURCE = """
import torch
from rlrag.pipeline import open_policy
from rlrag.retrieval.trainable.open import open_trainable_encoder
from rlrag.training.distributed.engines import hand_over
from rlrag.training.distributed.workers import TorchWorkers
from rlrag.training.learners.optimiser import Optimiser
from rlrag.training.parts import open_trainable_generator
from rlrag.training.trainer import Trainer

class Counts(Trainer):
    num_steps, best_by = 6, "validation/score"
    def __init__(self, context, what=""):
        self.context, self.what, self.weight = context, what, torch.zeros(1)
    def step(self, step, pauses_after):
        if self.what == "raises" and step == 3: raise KeyError("gone")
        if self.what == "sum": TorchWorkers.sum(None, self.weight)
        self.weight = self.weight + 1
        if self.what == "random": self.weight = self.weight + torch.rand(1)
        if self.what == "alone": self.weight = self.weight + self.context.workers.rank
        if self.what == "still": self.weight = torch.zeros(1)
        return {
            "tensor": {"loss": self.weight}, "nan": {"loss": float("nan")}, "list": [1.0],
        }.get(self.what, {"loss": 1.0})
    def validate(self, step):
        return {"validation/other": 1.0} if self.what == "best" else {}
    def tensors(self):
        file = {"weight": self.weight}
        return {"flat": file["weight"], "part": {"value": file}}.get(self.what, {"policy": file})
    def load(self, files):
        if self.what != "forgets": self.weight = files["policy"]["weight"]

class Lacks(Counts):
    tensors = None

class Alone:
    def __init__(self, context): pass
    def step(self, step, pauses_after): return {}
    def tensors(self): return {}
    def load(self, files): pass

class Endless(Counts):
    num_steps = None

class FineTunes(Trainer):
    '''The generator, on golden answers after the retriever's first passage.'''
    def __init__(self, context):
        self.context, self.num_steps = context, context.schedule.num_steps
        self.best_by = "validation/step"  # the last one
        self.generator = open_trainable_generator(context.config)
        self.optimiser = Optimiser(self.generator.trainable_parameters(), 0.05, 0,
            self.num_steps, context.workers, "lower it")
        self.policy = open_policy(context.config, context.data.train)
    def step(self, step, pauses_after):
        context, table = self.context, self.context.data.train
        rows, _ = context.schedule.share(step, context.workers)
        prompts, answers = [], []
        for row in rows.tolist():
            question = table.questions[row]
            prompts.append(context.prompts.build(question, table.passages(row)[:1]).token_ids)
            answers.append(context.prompts.encode_answer(question.golden_answers[0]))
        logp = self.generator.answer_logp(prompts, answers)
        loss = -logp.sum() / context.config.training.batch_size
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step(step)
        return {"loss": context.workers.sum(loss.detach()).item()}
    def publish(self, step):
        weights = self.generator.published_weights(step, torch.float32)
        hand_over(weights, self.context.generator, self.context.workers)
    def validate(self, step):
        self.publish(step)
        return {**self.context.validate(self.policy), "validation/step": float(step)}
    def tensors(self):
        trained = self.generator.trainable_tensors()
        return {"generator": trained, "optimizer": self.optimiser.tensors()}
    def load(self, files):
        self.generator.load_trainable(files["generator"])
        if "optimizer" in files:
            self.optimiser.load(files["optimizer"])

class Pulls(Trainer):
    '''The retriever's encoder, towards gold passages and away from those of other questions.'''
    best_by = "validation/none"
    def __init__(self, context):
        self.context, config = context, context.config
        self.num_steps = context.schedule.num_steps
        self.encoder = open_trainable_encoder(config.retrieval, config.openrag, config.cache_path)
        self.optimiser = Optimiser(dict(self.encoder.named_parameters()),
            3e-3, 0, self.num_steps, context.workers, "lower it")
    def step(self, step, pauses_after):
        table, workers = self.context.data.train, self.context.workers
        questions = [table.questions[row] for row in self.context.schedule.rows(step)]
        corpus = self.context.library.corpus
        gold = [corpus[corpus.row_of(question.gold_ids[0])].contents for question in questions]
        asked = self.encoder.embed([question.question for question in questions], "question")
        found = self.encoder.embed(gold, "passage")
        products = asked.vectors_BD @ found.vectors_BD.T / 0.1
        mine = slice(workers.rank, None, workers.size)
        places = torch.arange(len(questions))
        losses = torch.nn.functional.cross_entropy(products, places, reduction="none")
        loss = losses[mine].sum() / len(questions)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step(step)
        return {"loss": workers.sum(loss.detach()).item()}
    def tensors(self):
        return {"retriever": self.encoder.state_dict(), "optimizer": self.optimiser.tensors()}
    def load(self, files):
        self.encoder.load_state_dict(files["retriever"])
        if "optimizer" in files:
            self.optimiser.load(files["optimizer"])

def alone(context): return Alone(context)

def raises(context): raise OSError("no such server")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_trainers.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_trainers"
    sys.modules.pop("own_trainers", None)


def start(context: TrainerContext, stop_at: int | None = None) -> TrainingLoop:
    """A loop that begins or continues the context's run."""
    context.run_dir.claim(context.config)

    def on_step(metrics) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    return TrainingLoop(
        context.config, open_trainer(context), context.run_dir, context.workers, on_step
    )


def often(context: TrainerContext, **training: object) -> TrainerContext:
    """With many validations and checkpoints."""
    every = {"validate_every": 3, "checkpoint_every": 2, "keep_checkpoints": 9, "loggers": ()}
    return replace(context, config=changed(context.config, training={**every, **training}))


@pytest.mark.parametrize("algorithm", [DROConfig(), OwnTrainerConfig(name=SELF_CRITICAL)])
def test_trainers_of_the_selector_keep_the_contract(algorithm, tmp_path):
    check_trainer(sample_context(tmp_path, algorithm))


def test_fine_tuning_keeps_it(model_dir, tmp_path):
    context = sample_context(tmp_path, DROConfig())
    config = changed(
        context.config,
        generator={"model": str(model_dir), "dtype": "float32", "max_new_tokens": 3},
        generator_training={"precision": "float32", "lora_rank": 2, "learning_rate": 1e-2},
        algorithm={"name": "sft"},
    )
    check_trainer(replace(context, config=config))


@pytest.mark.slow
def test_joint_stochastic_approximation_keeps_it(tmp_path):
    save_tiny_encoder(tmp_path / "encoder")
    config = jsa_config(tmp_path)
    task = make_task(config)
    run_dir = RunDirectory(tmp_path / "run")
    generator = ReadingGenerator()
    check_trainer(
        TrainerContext(
            config, SingleWorker(), run_dir, task.library, task.data, generator, WordPrompts()
        )
    )


def test_training_the_retriever_on_pools_keeps_it(tmp_path):
    save_tiny_encoder(tmp_path / "encoder")
    config = openrag_config(tmp_path / "cache", tmp_path / "encoder")
    task, generator = make_task(config), ReadingGenerator()
    prepare(config, task, tmp_path / "run", generator)
    run_dir = RunDirectory(tmp_path / "run")
    check_trainer(
        TrainerContext(
            config, SingleWorker(), run_dir, task.library, task.data, generator, WordPrompts()
        )
    )


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("random", "a resumed run ends with another policy/weight"),
        ("alone", "two workers hold another policy/weight each"),
        ("still", "no step changes the weights of the selector"),
        ("forgets", "load did not take over policy/weight"),
    ],
)
def test_the_contract_can_be_broken(what, error, module, tmp_path):
    with pytest.raises(AssertionError, match=error):
        check_trainer(sample_context(tmp_path, own(f"{module}:Counts", f"what={what}")))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Lacks", "made a Lacks, which has no method 'tensors'; rlrag.testing.check_trainer"),
        ("Alone", "returned a Alone, which is not a Trainer; make it a subclass"),
        ("Endless", "has no integer num_steps"),
        ("raises", "creating it failed with OSError: no such server"),
        ("alone", "returned a Alone, which is not a Trainer; make it a subclass"),
    ],
)
def test_what_is_no_trainer_is_one_error(name, error, module, tmp_path):
    with pytest.raises(ConfigError, match=error) as raised:
        open_trainer(sample_context(tmp_path, own(f"{module}:{name}")))
    assert f"trainer '{module}:{name}'" in str(raised.value)


def own(name: str, *options: str) -> OwnTrainerConfig:
    return OwnTrainerConfig(name=name, options=options)


def flags(files, folder, name: str, **changes: object) -> list[str]:
    found = {
        "run-dir": folder / "run",
        "cache-dir": folder / "cache",
        "data.corpus": files / "corpus.jsonl",
        "data.train-questions": files / "train.jsonl",
        "data.eval-questions": files / "eval.jsonl",
        "data.max-train-questions": 20,
        "data.num-validation-questions": 4,
        "retrieval.kind": "dense",
        "retrieval.encoder": files / "encoder",
        "retrieval.encoder-max-tokens": 32,
        "environment.num-selected": 1,
        "generator.model": files / "generator",
        "generator.max-new-tokens": 3,
        "training.launcher": "local",
        "algorithm.name": name,
        "training.num-epochs": 2,
        "training.batch-size": 4,
        **changes,
    }
    return [word for flag, value in found.items() for word in (f"--{flag}", *str(value).split())]


@pytest.mark.parametrize("name", ["Alone", "Counts"])
def test_a_class_that_is_no_trainer_is_refused_before_anything_is_opened(
    name, module, openrag_files, tmp_path, monkeypatch, capsys
):
    source = SOURCE.replace("class Counts(Trainer)", "class Counts")
    (tmp_path / "own_trainers.py").write_text(source)
    opened = []
    monkeypatch.setattr(rlrag.pipeline, "open_library", lambda *_: opened.append("data"))
    monkeypatch.setattr(single_run, "open_generator", lambda *_: opened.append("generator"))
    words = flags(openrag_files, tmp_path, f"{module}:{name}")
    with pytest.raises(SystemExit) as ended:
        run_program(train.main, ["factbook", *words])
    assert ended.value.code == 2
    assert f"trainer '{module}:{name}' is not a Trainer; make it a subclass of rlrag.training" in (
        capsys.readouterr().err
    )
    assert not opened


@pytest.mark.slow
def test_a_generator_that_it_trains_answers_from_the_bundle(module, openrag_files, tmp_path):
    own = {"algorithm.parts": "generator", "evaluation.systems": "retriever_order trained"}
    train.main(["factbook", *flags(openrag_files, tmp_path, f"{module}:FineTunes", **own)])
    losses = [line["loss"] for line in steps_of(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    bundle = tmp_path / "run" / "bundle"
    golden = read_bundle(bundle).golden[0]
    with rlrag.load_pipeline(bundle) as pipeline:
        answer = pipeline.answer(golden.question)
    assert answer.text == golden.answer
    assert answer.logp == pytest.approx(golden.answer_logp, abs=1e-3)
    with Pipeline(load_bundle(bundle), tuned=False) as untrained:
        other = untrained.answer(golden.question)
    assert (other.text, other.logp) != (answer.text, answer.logp)


@pytest.mark.slow
def test_an_encoder_that_it_trains_searches_in_the_bundle(module, openrag_files, tmp_path):
    systems = "original_retriever tuned_retriever"
    own = {"algorithm.parts": "retriever", "evaluation.systems": systems}
    train.main(["factbook", *flags(openrag_files, tmp_path, f"{module}:Pulls", **own)])
    bundle = tmp_path / "run" / "bundle"
    golden = read_bundle(bundle).golden[0]
    with rlrag.load_pipeline(bundle) as pipeline:
        answer = pipeline.answer(golden.question)
        tuned = [found.score for found in pipeline.retrieve(golden.question)]
    assert tuple(passage.id for passage in answer.passages) == golden.passage_ids
    loaded = load_bundle(bundle)
    library = open_library(loaded.config)  # with the encoder that training started from
    before = library.search([golden.question], len(tuned)).scores_QNC[0, :, 0].tolist()
    assert tuned != pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize(
    ("what", "error", "kept"),
    [
        ("raises", "step 4 failed with KeyError: 'gone'; fix it and run the same", [0, 2]),
        ("tensor", r"step 1 gave 'loss' as a Tensor, no number; use float", [0]),
        ("nan", "step 1 gave 'loss' as nan, which is not finite", [0]),
        ("list", "step 1 gave a list, no dict of numbers", [0]),
        ("best", "validate gave no 'validation/score', which best_by names", []),
        ("flat", "tensors gave something else than tensors by file and name", []),
        ("part", "tensors gave no file 'policy', the weights of the selector", []),
    ],
)
def test_a_trainer_that_breaks_its_contract_is_named_and_its_checkpoints_stay(
    what, error, kept, module, tmp_path
):
    context = often(sample_context(tmp_path, own(f"{module}:Counts", f"what={what}")))
    with pytest.raises(TrainerError, match=error) as raised:
        start(context).run()
    assert str(raised.value).startswith(f"trainer '{module}:Counts': ")
    assert "\n" not in str(raised.value)
    store = CheckpointStore(context.run_dir.checkpoints)
    assert store.steps() == kept
    if what == "raises":
        (tmp_path / "own_trainers.py").write_text(SOURCE.replace("step == 3", "step == 9"))
        sys.modules.pop(module)
        start(context).run()
        assert store.load(store.steps()[-1])[0]["policy"]["weight"].item() == 6


def test_a_sum_that_fails_is_not_the_trainers_fault(module, tmp_path):
    """As where another worker died: Ray Train then starts the group again."""
    context = sample_context(tmp_path, own(f"{module}:Counts", "what=sum"))
    with pytest.raises(ValueError, match="process group"):
        start(context).run()


def test_a_stopped_run_continues_to_the_same_weights(tmp_path):
    found = []
    for name, stop_at in (("whole", None), ("stopped", 5)):
        folder = tmp_path / name
        context = often(sample_context(folder, own(SELF_CRITICAL, "num_samples=2")))
        if stop_at is not None:
            with pytest.raises(StopAfter):
                start(context, stop_at).run()
        start(often(sample_context(folder, own(SELF_CRITICAL, "num_samples=2")))).run()
        store = CheckpointStore(context.run_dir.checkpoints)
        found.append((store.load(store.steps()[-1])[0], steps_of(context.run_dir.path)))
    (files, records), (other_files, other_records) = found
    assert records == other_records
    assert records[1]["generator_tokens_spent"] > 0
    assert files.keys() == other_files.keys() == {"policy", "optimizer"}
    for file, tensors in files.items():
        assert all(torch.equal(tensors[n], other_files[file][n]) for n in tensors), file


def test_the_example_learns(small_config, training_data, tmp_path):
    algorithm = {"name": SELF_CRITICAL, "options": ["num_samples=8"]}
    config = changed(small_config, algorithm=algorithm)
    run_dir, library = RunDirectory(tmp_path / "run"), sample_context(tmp_path, DROConfig()).library
    context = TrainerContext(
        config, SingleWorker(), run_dir, library, training_data, ReadingGenerator(), WordPrompts()
    )
    start(context).run()
    found = [line["validation/em"] for line in steps_of(run_dir.path) if "validation/em" in line]
    assert found[0] < max(found)


def test_what_it_costs_is_not_guessed(tmp_path):
    context = sample_context(tmp_path, own(SELF_CRITICAL))
    budget = estimate_budget(context.config, context.data, WordPrompts())
    assert budget.num_steps is None
    assert budget.describe(50.0) == (
        "what a trainer of your own costs is not known before it runs; the generator does "
        "50 tokens/s"
    )
    assert f"trainer     {SELF_CRITICAL}; its steps and what they cost" in describe_plan(
        context.config
    )
    with pytest.raises(ConfigError, match="has no option 'samples'"):
        describe_plan(changed(context.config, algorithm={"options": ["samples=2"]}))


def test_a_trainer_of_the_retriever_needs_one_that_can_be_trained():
    with pytest.raises(ConfigError, match=r"retrieval\.kind 'hybrid' has nothing to train"):
        changed(RunConfig(), algorithm={"name": SELF_CRITICAL, "parts": ["retriever"]})
