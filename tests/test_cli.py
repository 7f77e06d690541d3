"""The command `rlrag` and the doors of the checkout, which open the same programs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from rlrag import __version__, cli
from rlrag.cli.command_line import program_name, run_program

ROOT = Path(__file__).resolve().parents[1]


def ended(argv: list[str], capsys) -> tuple[int, str, str]:
    """Exit code and output of `rlrag` with these words."""
    try:
        run_program(cli._run, argv)
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_program_and_the_checkout_a_door_to_it(name):
    program = importlib.import_module(f"rlrag.cli.{cli.COMMANDS[name][0]}")
    if name != "serve":  # whose door is the application that `serve run` starts
        assert importlib.import_module(f"jobs.{name}").main is program.main


def test_the_checkout_has_no_other_programs():
    doors = {path.stem for path in (ROOT / "jobs").rglob("*.py")} - {"__init__"}
    assert doors == set(cli.COMMANDS) - {"serve"}
    for path in [*(ROOT / "jobs").glob("*.py"), *(ROOT / "serve").glob("*.py")]:
        assert len(path.read_text().splitlines()) < 10, f"{path} is more than a door"


def test_the_application_has_a_door_too():
    assert (
        importlib.import_module("serve.app").build
        is importlib.import_module("rlrag.serving.app").build
    )


def test_it_lists_its_commands(capsys):
    code, said, _ = ended(["--help"], capsys)
    assert code == 0
    for name in cli.COMMANDS:
        assert f"\n  {name} " in said
    assert ended(["--version"], capsys)[:2] == (0, f"rlrag {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "no command was given; choose from: train, "),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["xyz"], "unknown command 'xyz'; there are: train, "),
        (["serve"], "no bundle was given; usage: rlrag serve BUNDLE"),
        (["serve", "bundle=runs/b"], "no bundle was given; usage: rlrag serve BUNDLE"),
        (["serve", "runs/b", "--port"], "'--port' is not a setting; usage: rlrag serve BUNDLE"),
    ],
)
def test_a_wrong_word_is_one_error(argv, error, capsys):
    code, _, said = ended(argv, capsys)
    assert code == 2
    assert said.startswith(f"error: {error}")
    assert said.count("\n") == 1


def test_a_command_reads_the_words_after_it(capsys):
    code, said, _ = ended(["train", "--help"], capsys)
    assert code == 0
    assert "quickstart" in said


def test_programs_are_named_as_they_were_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlrag", "train"])
    assert program_name("train") == "rlrag train"
    monkeypatch.setattr(sys, "argv", ["/somewhere/jobs/train.py"])
    assert program_name("train") == "python -m jobs.train"


def test_the_package_installs_the_command():
    found = [point for point in entry_points(group="console_scripts") if point.name == "rlrag"]
    if not found:
        pytest.skip("rlrag is not installed, only on the path; `make setup` installs it")
    assert found[0].load() is cli.main


def test_nothing_heavy_is_imported_with_the_package_or_its_command():
    code = (
        "import sys, rlrag, rlrag.cli; print({'torch', 'ray', 'vllm', 'faiss'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert said.stdout.strip() == "set()", said.stderr
