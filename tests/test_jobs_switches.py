"""Words of a command line: switches take no value, and a reader may stop reading."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlrag.cli import export, train
from rlrag.cli.command_line import parse, run_program
from rlrag.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]


def arguments(*words: str) -> train.TrainArguments:
    default = train.TrainArguments(RECIPES["nq"](), Path("runs/nq"))
    return parse(train.TrainArguments, default, words, "python -m jobs.train nq")


@pytest.mark.parametrize(
    ("words", "dry_run", "bm25_scores"),
    [
        (["--dry-run"], True, True),
        (["--dry-run", "--retrieval.no-bm25-scores"], True, False),
        (["--no-dry-run", "--retrieval.bm25-scores", "--seed", "3"], False, True),
        (["--dry_run", "True", "--retrieval.bm25-scores", "False"], True, False),
        (["--dry-run=True", "--retrieval.bm25-scores=False"], True, False),
        (["--dry-run", "False", "--config.retrieval.bm25-scores", "False"], None, None),
        (["--dry-run=yes"], None, None),
        (["--dry-run", "yes"], None, None),
    ],
)
def test_switches_take_no_value_and_old_commands_stay_valid(words, dry_run, bm25_scores, capsys):
    if dry_run is None:
        with pytest.raises(SystemExit, match="2"):
            arguments(*words)
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
        return
    found = arguments(*words)
    assert found.dry_run is dry_run
    assert found.config.retrieval.bm25_scores is bm25_scores


def test_a_text_that_reads_as_true_stays_a_text():
    assert arguments("--generator.prompt.instruction", "True").config.generator.prompt == (
        RECIPES["nq"]().generator.prompt.model_copy(update={"instruction": "True"})
    )


def test_switches_of_programs_without_defaults(tmp_path):
    words = ["--run-dir", str(tmp_path), "--output", str(tmp_path / "o"), "--index"]
    found = parse(export.ExportArguments, None, [*words, "--hub", "True"], "export")
    assert (found.index, found.hub) == (True, True)
    assert parse(export.ExportArguments, None, [*words, "--no-hub"], "export").hub is False


@pytest.mark.parametrize("words", [["jobs.train", "--help"], ["jobs.report", "--help"]])
def test_output_that_nobody_reads_any_more_is_no_error(words):
    """As in `--help | head`: the reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        [sys.executable, "-m", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(capfd):
    def main(argv: Sequence[str]) -> None:
        raise BrokenPipeError("a socket")

    with pytest.raises(SystemExit, match="1"):
        run_program(main)
    assert "BrokenPipeError: a socket (unexpected" in capfd.readouterr().err
