"""Chosen steps leave a trace each, others none, and nothing that fails here ends a run."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import types

import pytest
import torch
from loop_runs import changed, start, weights

from rlrag.runs.directory import RunDirectory
from rlrag.runs.profiling import StepProfiler, save_ray_timeline


def events(path) -> set[str]:
    with gzip.open(path, "rt") as stream:
        return {event["name"] for event in json.load(stream)["traceEvents"]}


def test_a_run_profiles_the_chosen_steps_and_learns_the_same(small_config, training_data, tmp_path):
    config = changed(small_config, training={"num_epochs": 1, "profile_steps": "2:3"})
    profiled = start(config, training_data, tmp_path / "profiled")
    profiled.run()
    found = sorted((tmp_path / "profiled" / "profile").iterdir())
    assert [path.name for path in found] == ["step-000002.json.gz", "step-000003.json.gz"]
    assert "Optimizer.step#AdamW.step" in events(found[0])
    config = changed(small_config, training={"num_epochs": 1})
    plain = start(config, training_data, tmp_path / "plain")
    plain.run()
    assert not (tmp_path / "plain" / "profile").exists()
    one, other = weights(profiled), weights(plain)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_raises_leaves_no_trace(tmp_path):
    profiler = StepProfiler(range(1, 2), RunDirectory(tmp_path / "run"))
    with pytest.raises(ConnectionError), profiler.step(1):
        raise ConnectionError
    assert not (tmp_path / "run").exists()


def test_a_trace_that_cannot_be_written_is_named_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file in the way")
    with StepProfiler(range(1, 2), RunDirectory(tmp_path)).step(1):
        torch.ones(2).sum()
    assert "the profile of step 1 could not be written" in caplog.text


class Timeline(types.ModuleType):
    """The one function of Ray that is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("ray")
        self._error = error

    def timeline(self, filename: str) -> None:
        with open(filename, "w") as stream:
            stream.write("[]")
            if self._error:
                raise self._error


def test_rays_timeline_lies_beside_the_traces(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", Timeline())
    save_ray_timeline(RunDirectory(tmp_path))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["ray-timeline.json"]
    assert (tmp_path / "profile" / "ray-timeline.json").read_text() == "[]"


def test_a_timeline_that_ray_does_not_give_is_named_and_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "ray", Timeline(RuntimeError("no answer")))
    with caplog.at_level(logging.WARNING):
        save_ray_timeline(RunDirectory(tmp_path))
    assert "timeline could not be written" in caplog.text
    assert "RuntimeError: no answer" in caplog.text
    assert not (tmp_path / "profile" / "ray-timeline.json").exists()
