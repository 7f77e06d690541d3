"""Trainers of anybody's own and the built-in ones: one contract, and what breaks it."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from jsa_runs import jsa_config
from loop_runs import StopAfter, changed, steps_of
from openrag_runs import make_task
from stand_ins import ReadingGenerator, WordPrompts
from tiny_models import save_tiny_encoder

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, TrainerError
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
from rlrag.training.trainer import Trainer
from rlrag.training.distributed.workers import TorchWorkers

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


@pytest.mark.parametrize("objective", ["dro", SELF_CRITICAL])
def test_trainers_of_the_selector_keep_the_contract(objective, tmp_path):
    check_trainer(sample_context(tmp_path, objective))


def test_fine_tuning_keeps_it(model_dir, tmp_path):
    context = sample_context(tmp_path, "dro")
    config = changed(
        context.config,
        generator={"model": str(model_dir), "dtype": "float32", "max_new_tokens": 3},
        generator_training={"precision": "float32", "lora_rank": 2, "learning_rate": 1e-2},
        training={"objective": "sft", "parts": ["generator"]},
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
        check_trainer(sample_context(tmp_path, f"{module}:Counts", [f"what={what}"]))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Lacks", "made a Lacks, which has no method 'tensors'; rlrag.testing.check_trainer"),
        ("Alone", "made a Alone, which is no Trainer; let it be a subclass"),
        ("Endless", "has no number num_steps"),
        ("raises", "making it failed with OSError: no such server"),
    ],
)
def test_what_is_no_trainer_is_one_error(name, error, module, tmp_path):
    with pytest.raises(ConfigError, match=error) as raised:
        open_trainer(sample_context(tmp_path, f"{module}:{name}"))
    assert f"trainer '{module}:{name}'" in str(raised.value)


@pytest.mark.parametrize(
    ("what", "error", "kept"),
    [
        ("raises", "step 4 failed with KeyError: 'gone'; mend it and run the same", [0, 2]),
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
    context = often(sample_context(tmp_path, f"{module}:Counts", [f"what={what}"]))
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
    context = sample_context(tmp_path, f"{module}:Counts", ["what=sum"])
    with pytest.raises(ValueError, match="process group"):
        start(context).run()


def test_a_stopped_run_continues_to_the_same_weights(tmp_path):
    found = []
    for name, stop_at in (("whole", None), ("stopped", 5)):
        folder = tmp_path / name
        context = often(sample_context(folder, SELF_CRITICAL, ["num_samples=2"]))
        if stop_at is not None:
            with pytest.raises(StopAfter):
                start(context, stop_at).run()
        start(often(sample_context(folder, SELF_CRITICAL, ["num_samples=2"]))).run()
        store = CheckpointStore(context.run_dir.checkpoints)
        found.append((store.load(store.steps()[-1])[0], steps_of(context.run_dir.path)))
    (files, records), (other_files, other_records) = found
    assert records == other_records
    assert records[1]["generator_tokens_spent"] > 0
    assert files.keys() == other_files.keys() == {"policy", "optimizer"}
    for file, tensors in files.items():
        assert all(torch.equal(tensors[n], other_files[file][n]) for n in tensors), file


def test_the_example_learns(small_config, training_data, tmp_path):
    training = {"objective": SELF_CRITICAL, "options": ["num_samples=8"]}
    config = changed(small_config, training=training)
    run_dir, library = RunDirectory(tmp_path / "run"), sample_context(tmp_path, "dro").library
    context = TrainerContext(
        config, SingleWorker(), run_dir, library, training_data, ReadingGenerator(), WordPrompts()
    )
    start(context).run()
    found = [line["validation/em"] for line in steps_of(run_dir.path) if "validation/em" in line]
    assert found[0] < max(found)


def test_what_it_costs_is_not_guessed(tmp_path):
    context = sample_context(tmp_path, SELF_CRITICAL)
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
        describe_plan(changed(context.config, training={"options": ["samples=2"]}))


@pytest.mark.parametrize(
    ("training", "error"),
    [
        ({"experience": "log.sqlite"}, "learns from a log by inverse propensities"),
        ({"parts": ["retriever"]}, "retrieval.kind 'hybrid' has nothing to train"),
        ({"rounds": 2}, "training.rounds is 2, but only"),
    ],
)
def test_what_a_trainer_of_ones_own_does_not_combine_with(training, error):
    with pytest.raises(ConfigError, match=error):
        changed(RunConfig(), training={"objective": SELF_CRITICAL, **training})
