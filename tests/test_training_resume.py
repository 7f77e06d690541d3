"""A run that was killed at any moment continues to the same weights as one that never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_runs import StopAfter, changed, co_training, start, steps_of, weights
from stand_ins import ReadingGenerator

from rlrag.config import RunConfig
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.pipeline import TrainingData
from rlrag.runs.checkpoints import CheckpointStore

OFF_POLICY = {"refresh_every": 2, "passes": 2, "baseline": "none"}


def assert_same_run(whole_loop, whole: Path, continued_loop, stopped: Path) -> None:
    assert steps_of(whole) == steps_of(stopped)
    found, expected = weights(continued_loop), weights(whole_loop)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    stores = [CheckpointStore(path / "checkpoints") for path in (whole, stopped)]
    assert stores[0].steps() == stores[1].steps()
    last = stores[0].steps()[-1]
    files = [store.load(last) for store in stores]
    assert files[0][1] == files[1][1]
    for file, tensors in files[0][0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, files[1][0][file][name]), (file, name)


def check(config: RunConfig, data: TrainingData, directory: Path, stop_at: int, make=None) -> None:
    """Compare a run that a stop disturbs with one that nothing does."""
    make = make or ReadingGenerator
    whole = start(config, data, directory / "whole", generator=make())
    whole.run()
    with pytest.raises(StopAfter):
        start(config, data, directory / "stopped", stop_at, make()).run()
    continued = start(config, data, directory / "stopped", generator=make())
    continued.run()
    assert_same_run(whole, directory / "whole", continued, directory / "stopped")


@pytest.mark.parametrize("stop_at", [0, 1, 3, 7, 12])
def test_the_selector_alone(small_config, training_data, tmp_path, stop_at):
    check(small_config, training_data, tmp_path, stop_at)


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_in_the_middle_of_an_estep_of_several_passes(
    small_config, training_data, tmp_path, stop_at
):
    """E-steps of two batches and two passes: steps 1 to 4, 5 to 8, and so on."""
    config = changed(small_config, algorithm=OFF_POLICY, training={"num_epochs": 2})
    check(config, training_data, tmp_path, stop_at)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_with_batches_that_run_ahead(small_config, training_data, tmp_path, stop_at):
    config = changed(small_config, algorithm={"baseline": "none", "overlap": True})
    check(config, training_data, tmp_path, stop_at)
    staleness = [line["staleness"] for line in steps_of(tmp_path / "whole")[1:]]
    pauses = [step for step in range(1, 12) if step % 2 == 0 or step % 3 == 0]
    assert staleness == [0.0 if step == 0 or step in pauses else 1.0 for step in range(12)]


def test_with_an_estep_a_pass_and_draws_without_replacement(small_config, training_data, tmp_path):
    config = changed(
        small_config,
        algorithm={
            "refresh_every": None,
            "clip_ratio": 0.2,
            "replacement": False,
            "num_samples": 4,
            "proposal_temperature": 2.0,
            "entropy_weight": 0.01,
            "kl_weight": 0.01,
        },
    )
    check(config, training_data, tmp_path, stop_at=8)


@pytest.mark.parametrize(
    ("stop_at", "dro", "num_epochs"),
    [
        (1, {}, 2),  # before any checkpoint but the first
        (3, {}, 2),
        (3, OFF_POLICY, 1),
        (5, {"baseline": "none", "overlap": True}, 2),
    ],
)
def test_selector_and_generator(
    small_config, few_data, model_dir, tmp_path, stop_at, dro, num_epochs
):
    """The engine is a real one: it answers with the weights that it was given last."""
    config = co_training(
        small_config,
        model_dir,
        dro,
        batch_size=4,
        num_epochs=num_epochs,
        validate_every=3,
        checkpoint_every=2,
    )
    check(
        config,
        few_data,
        tmp_path,
        stop_at,
        lambda: TransformersGenerator(model_dir, "float32", "cpu"),
    )
    records = steps_of(tmp_path / "whole")
    assert {"loss", "generator/loss", "reward"} <= records[-1].keys()
    assert records[1]["generator/loss"] != records[-1]["generator/loss"]


def test_a_generator_that_outlived_its_worker_is_taken_back(
    small_config, few_data, model_dir, tmp_path
):
    """Engines may hold weights of a step that is undone, also where the run begins again at 0."""
    config = co_training(
        small_config, model_dir, batch_size=4, num_epochs=2, validate_every=9, checkpoint_every=9
    )
    whole = start(
        config, few_data, tmp_path / "whole", generator=TransformersGenerator(model_dir, "float32")
    )
    whole.run()
    survivor = TransformersGenerator(model_dir, "float32")
    with pytest.raises(StopAfter):
        start(config, few_data, tmp_path / "stopped", 4, survivor).run()
    assert survivor.version == 3
    continued = start(config, few_data, tmp_path / "stopped", generator=survivor)
    continued.run()
    assert_same_run(whole, tmp_path / "whole", continued, tmp_path / "stopped")


def test_a_finished_run_is_not_continued(small_config, training_data, tmp_path):
    first = start(small_config, training_data, tmp_path / "run").run().parts.tensors()["policy"]
    records = steps_of(tmp_path / "run")
    generator = ReadingGenerator()
    again = start(small_config, training_data, tmp_path / "run", generator=generator).run().parts
    assert generator.num_calls == 0
    assert steps_of(tmp_path / "run") == records
    assert all(torch.equal(first[name], t) for name, t in again.tensors()["policy"].items())


def test_what_kl_is_measured_against_stays_after_a_resume(small_config, training_data, tmp_path):
    """The first policy comes from the first checkpoint, whatever the configuration would build."""
    with pytest.raises(StopAfter):
        start(small_config, training_data, tmp_path / "run", 5).run()
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    files, state = store.load(0)
    warm = {name: tensor + 0.25 for name, tensor in files["policy"].items()}
    store.save(0, {**files, "policy": warm}, state)
    continued = start(small_config, training_data, tmp_path / "run")
    continued.run()
    for name, tensor in continued.trainer.parts.initial.state_dict().items():
        assert torch.equal(tensor, warm[name]), name


def test_without_held_back_questions_the_last_step_is_the_best(
    small_config, training_data, tmp_path
):
    check(small_config, replace(training_data, validation=None), tmp_path, stop_at=5)
    state = CheckpointStore(tmp_path / "stopped" / "checkpoints").load(12)[1]
    assert (state["step"], state["best_step"], state["finished"]) == (12, 12, True)
