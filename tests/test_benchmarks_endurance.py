"""A short form of the run of `benchmarks.faults.endurance` and `benchmarks.faults.kill_points`."""

from __future__ import annotations

from benchmarks.faults.endurance import endurance_config, growth, report, train


def test_a_short_run_is_sampled_and_reported(tmp_path):
    config = endurance_config(tmp_path, 30)
    samples = train(tmp_path, config, 10)
    assert [sample.step for sample in samples] == [10, 20, 30]
    assert samples[-1].files > 0
    assert len((tmp_path / "run" / "experience" / "worker-0.jsonl").read_text().splitlines()) == 240
    assert growth(samples, lambda sample: sample.step) == 0.5
    assert "# Endurance: 30 steps in one process" in report(samples)
