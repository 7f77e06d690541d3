"""A program is refused the place that another one writes to, before it loads anything."""

from __future__ import annotations

import pytest

from rlrag.cli import evaluate, export, judge, probe, train
from rlrag.cli.opened_bundle import only_writer
from rlrag.config import RunConfig
from rlrag.errors import InUseError, RunDirectoryError
from rlrag.runs.directory import RunDirectory


def test_a_run_directory_in_use_is_refused_and_its_run_kept(tmp_path):
    """Also where the other process has not recorded a step yet."""
    run_dir = RunDirectory(tmp_path / "run")
    flags = ["factbook", "--run-dir", str(run_dir.path)]
    with run_dir.in_use(print):
        with pytest.raises(InUseError, match=rf"{run_dir.path} is in use by process \d+ on"):
            train.main(flags)
        assert not run_dir.config.exists()
        claimed = RunConfig(recipe="factbook")
        run_dir.claim(claimed)
        with pytest.raises(RunDirectoryError):
            train.main(flags)
        assert run_dir.config.read_text() == claimed.to_json()


@pytest.mark.parametrize("job", [evaluate, probe, judge, export])
def test_an_output_that_another_program_is_about_to_write_is_refused(job, tmp_path):
    output = tmp_path / "output"
    (tmp_path / "evaluation.questions.jsonl").write_text("")
    RunDirectory(tmp_path / "run").claim(RunConfig())
    flags = {
        evaluate: ["--bundle", "b", "--corpus", "c", "--questions", "q"],
        probe: ["--bundle", "b"],
        judge: ["--evaluation", str(tmp_path / "evaluation.json"), "--url", "u", "--model", "m"],
        export: ["--run-dir", str(tmp_path / "run")],
    }
    with only_writer(output), pytest.raises(InUseError, match=f"{output} is in use by process"):
        job.main([*flags[job], "--output", str(output)])
    assert not list(tmp_path.glob(".*"))
