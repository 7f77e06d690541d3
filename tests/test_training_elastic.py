"""A run goes on with fewer or more workers, or elsewhere, with the same batches."""

from __future__ import annotations

import json

import pytest
import torch
from loop_runs import StopAfter, changed, start, steps_of, weights

from rlrag.config import RunConfig
from rlrag.errors import RunDirectoryError
from rlrag.runs.directory import RunDirectory
from rlrag.testing.thread_workers import make_group, run_together


def on_workers(config, data, directory, size: int, stop_at: int | None = None):
    """Run the loop on a group of so many workers, until all of them stop; rank 0's loop."""
    config = changed(config, training={"launcher": "ray", "num_workers": size})
    RunDirectory(directory).claim(config)
    # One after the other, as the threads of this process share PyTorch's random numbers.
    loops = [start(config, data, directory, stop_at, workers=w) for w in make_group(size)]

    def run(loop):
        if stop_at is None:
            loop.run()
        else:
            with pytest.raises(StopAfter):
                loop.run()

    run_together([lambda loop=loop: run(loop) for loop in loops])
    return loops[0]


def test_a_run_goes_on_with_fewer_and_with_more_workers(small_config, training_data, tmp_path):
    """Of 8 questions a step three workers take 3, 3 and 2; two take 4 each."""
    whole = start(small_config, training_data, tmp_path / "whole")
    whole.run()
    changing = tmp_path / "changing"
    on_workers(small_config, training_data, changing, 3, stop_at=5)
    on_workers(small_config, training_data, changing, 1, stop_at=9)
    last = on_workers(small_config, training_data, changing, 2)
    # Sums of floats in another order differ in their last bits.
    found, expected = weights(last), weights(whole)
    for name, tensor in expected.items():
        assert torch.allclose(tensor, found[name], atol=1e-5), name
    counted = {"generator_tokens_spent", "generator_tokens_saved", "generator_tokens_total"}
    for one, other in zip(steps_of(tmp_path / "whole"), steps_of(changing), strict=True):
        for key in one.keys() - counted:
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), (one["step"], key)


def test_a_directory_takes_other_machines_and_no_other_run(small_config, tmp_path):
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.claim(small_config)
    elsewhere = changed(
        small_config,
        training={"launcher": "ray", "num_workers": 4, "max_failures": 9},
        generator={"num_actors": 7, "request_timeout_s": 5},
    )
    run_dir.claim(elsewhere)
    assert json.loads(run_dir.config.read_text())["training"]["num_workers"] == 4
    other = changed(elsewhere, training={"batch_size": 4, "num_workers": 2})
    with pytest.raises(RunDirectoryError, match=r"\(training\.batch_size: 8 there, 4 given\)"):
        run_dir.claim(other)


def test_what_is_done_with_the_weights_may_change_and_what_they_become_may_not(
    small_config, tmp_path
):
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.claim(small_config)
    around = changed(
        small_config,
        data={"eval_questions": "test.jsonl", "max_eval_questions": 7},
        evaluation={"systems": ("trained",)},
        mirror={"uri": "s3://bucket/run", "wait_s": 1},
        training={"loggers": (), "metrics_port": 1, "profile_steps": "1:2", "keep_every": 9},
    )
    run_dir.claim(around)
    assert RunConfig.from_json(run_dir.config.read_text()) == around
    for section, value in (
        ("data", {"train_questions": "other.jsonl"}),
        ("data", {"max_train_questions": 5}),
        ("training", {"validate_every": 7}),
        ("reward", {"functions": ("f1",)}),
    ):
        (name,) = value
        with pytest.raises(RunDirectoryError, match=rf"\({section}\.{name}: [^;]* given\)"):
            run_dir.claim(changed(around, **{section: value}))
