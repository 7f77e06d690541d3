"""The report program: what it reads, what it writes and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluation_report import evaluation

from rlrag.cli import report
from rlrag.config import DROConfig, RunConfig
from rlrag.errors import ConfigError, DataError
from rlrag.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]


def make_run(path: Path, num_samples: int = 8, num_steps: int = 12) -> RunDirectory:
    """A run whose weights collapse from the first step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run_dir = RunDirectory(path)
    run_dir.claim(RunConfig(recipe="tiny", algorithm=DROConfig(num_samples=num_samples)))
    run_dir.append_metrics({"step": 0, "epoch": 0.0, "validation/em": 0.1, "validation/f1": 0.2})
    for step in range(1, num_steps + 1):
        run_dir.append_metrics({"step": step, "epoch": step / 12, "ess": 1.0, "reward": -step})
    return run_dir


def words(*run_dirs: RunDirectory, output: Path) -> list[str]:
    flags = [word for run_dir in run_dirs for word in ("--run-dir", str(run_dir.path))]
    return [*flags, "--output", str(output)]


def test_a_run_becomes_a_page_and_json_with_its_alarms(tmp_path):
    run_dir, page, numbers = make_run(tmp_path / "run"), tmp_path / "r.html", tmp_path / "r.json"
    report.main([*words(run_dir, output=page), "--json", str(numbers)])
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "Unfinished, without a final evaluation: run (at step 12)." in text
    (one,) = json.loads(numbers.read_text())["runs"]
    assert [(alarm["name"], alarm["step"]) for alarm in one["alarms"]] == [("collapse", 10)]
    assert one["alarms"][0]["text"].split(":")[0] in text
    assert one["metrics"]["reward"][-1] == [12, -12]


def test_a_run_that_compares_nothing_is_not_called_unfinished(tmp_path):
    """Such as one turn of a run in turns: it ends with its bundle."""
    run_dir, page = make_run(tmp_path / "1-retriever"), tmp_path / "r.html"
    run_dir.bundle.mkdir()
    report.main(words(run_dir, output=page))
    assert "Trained, but not evaluated: 1-retriever (at step 12)." in page.read_text()
    assert "nfinished" not in page.read_text()


def test_several_runs_are_compared_and_named_apart(tmp_path):
    runs = [make_run(tmp_path / "a" / "run", 8), make_run(tmp_path / "b" / "run", 2)]
    runs.append(make_run(tmp_path / "c", 4))
    report.main(words(*runs, output=tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "Training report: 3 runs" in text
    for name in ("a/run", "b/run", "c"):
        assert f'<th scope="row">{name}</th>' in text


def test_a_last_line_cut_short_is_left_out(tmp_path):
    run_dir = make_run(tmp_path / "run")
    with run_dir.metrics.open("a") as stream:
        stream.write('{"step": 13, "rew')
    report.main(words(run_dir, output=tmp_path / "r.html"))
    assert "(at step 12)" in (tmp_path / "r.html").read_text()


def test_what_is_no_run_is_refused_with_what_was_found(tmp_path, monkeypatch):
    output = tmp_path / "r.html"
    with pytest.raises(ConfigError, match=r"nothing is not a run, it does not exist; give"):
        report.main(words(RunDirectory(tmp_path / "nothing"), output=output))
    for number in range(6):
        (tmp_path / "files" / f"f{number}").mkdir(parents=True)
        make_run(tmp_path / "runs" / f"run-{number}")
    for name, said in (
        ("files", "it holds no run, but f0, f1, f2, f3, f4 and 1 more; give"),
        ("files/f0", "it is empty; give"),
        ("runs", "it holds the runs run-0, run-1, run-2, run-3, run-4 and 1 more; give"),
    ):
        with pytest.raises(ConfigError, match=rf"{name} is not a run, {said}"):
            report.main(words(RunDirectory(tmp_path / name), output=output))
    trained = make_run(tmp_path / "trained")
    trained.bundle.mkdir()
    shutil.copy(trained.config, trained.bundle)
    (trained.bundle / "bundle.json").touch()
    with pytest.raises(ConfigError, match=r"bundle is a bundle; give .* such as .*/trained$"):
        report.main(words(RunDirectory(trained.bundle), output=output))
    started = RunDirectory(tmp_path / "started")
    started.claim(RunConfig())
    with pytest.raises(ConfigError, match="started has no metrics yet; wait"):
        report.main(words(started, output=output))
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--output", str(output)]):
        with pytest.raises(ConfigError, match=r"no run .* give --run-dir .* the runs run-0, run-1"):
            report.main(arguments)
    run_dir = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="run is given more than once"):
        report.main(words(run_dir, run_dir, output=output))
    assert not output.exists()


def test_places_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path):
    nothing = RunDirectory(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"--output .* the directory .*no does not exist"):
        report.main(words(nothing, output=tmp_path / "no" / "r.html"))
    with pytest.raises(ConfigError, match=r"--output .* is a directory"):
        report.main(words(nothing, output=tmp_path))
    with pytest.raises(ConfigError, match=r"--json .* does not exist"):
        report.main([*words(nothing, output=tmp_path / "r"), "--json", str(tmp_path / "x" / "y")])
    with pytest.raises(ConfigError, match=r"--output and --json are both"):
        report.main([*words(nothing, output=tmp_path / "r"), "--json", str(tmp_path / "r")])


def test_questions_are_shown_where_they_are_of_the_same_evaluation(tmp_path):
    run_dir, page = make_run(tmp_path / "run"), tmp_path / "r.html"
    run_dir.evaluation.write_text(json.dumps(evaluation()))
    report.main(words(run_dir, output=page))
    assert "no single questions to look through for run" in page.read_text()
    header = {"kind": "header", "format": 1, "hashes": {"questions": "abc"}, "bundle_step": 4}
    asked = {"id": "q", "question": "why", "golden_answers": [], "gold_ids": [], "type": None}
    said = {"trained": {"answer": "so", "em": 0, "f1": 0, "contained": 0}}
    lines = [header, {"kind": "question", **asked, "retrieved": {}, "systems": said}]
    run_dir.questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main(words(run_dir, output=page))
    assert 'id="question-data"' in page.read_text()
    header["bundle_step"] = 3
    run_dir.questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main(words(run_dir, output=page))
    assert 'id="question-data"' not in page.read_text()
    run_dir.questions.write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.questions\.jsonl, line 1 is damaged"):
        report.main(words(run_dir, output=page))


@pytest.mark.parametrize("text", ['{"num_quest', "[]", '{"systems": {}}'])
def test_a_damaged_evaluation_is_named(tmp_path, text):
    run_dir = make_run(tmp_path / "run")
    run_dir.evaluation.write_text(text)
    with pytest.raises(DataError, match=r"evaluation\.json is damaged: .*delete it"):
        report.main(words(run_dir, output=tmp_path / "r.html"))


def test_damaged_metrics_are_named(tmp_path):
    run_dir = make_run(tmp_path / "run")
    run_dir.metrics.write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2 is damaged"):
        report.main(words(run_dir, output=tmp_path / "r.html"))


def test_the_program_ends_with_one_sentence_and_the_right_code(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.report", "--run-dir", "no", "--output", "r.html"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --run-dir ")
    assert len(ended.stderr.splitlines()) == 1


def test_drawing_needs_no_torch():
    code = "import sys, rlrag.cli.report; print({'torch', 'ray', 'vllm'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.stdout == "set()\n"
