"""The documentation builds without a warning, fetches nothing, and the code in it runs.

Code blocks of a page run in their order, in a folder of their own:

- `python` is executed; one with a title is written to that file instead, for later blocks.
- `text title="output"` is what the block before it printed.
- `bash` commands of this project are run in the tutorial, on models as small as can be. On all
  other pages they are parsed by the program's own parser, so that a flag that is gone is found;
  requests of `curl` are sent to the application in this process.
- Commands of other programs (`FOREIGN`) are only known by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import re
import runpy
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from serve_stand_ins import Served
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.bundle_files import read_bundle
from rlrag.cli import train
from rlrag.cli.command_line import parse, pick_recipe
from rlrag.errors import ConfigError
from rlrag.recipes import RECIPES
from rlrag.serving.settings import parse_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
)
TUTORIAL = "docs/tutorial.md"
LANGUAGES = {"python", "bash", "text", "json", ""}
TOP_LEVEL = ("rlrag", "envs", "jobs", "serve")
FOREIGN = {"export", "jq", "ls", "pip", "python3", "ray", "source", "uv"}
ARGUMENTS = {
    "jobs.data": "DataArguments",
    "jobs.evaluate": "EvaluateArguments",
    "jobs.export": "ExportArguments",
    "jobs.judge": "JudgeArguments",
    "jobs.report": "ReportArguments",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title and its text."""

    language: str
    title: str
    text: str


def blocks_of(page: str) -> list[Block]:
    found = re.findall(
        r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', (ROOT / page).read_text(), re.M | re.S
    )
    return [Block(*parts) for parts in found]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command, without variables that are set for it alone."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines]
    return [[w for w in words if not re.match(r"[A-Z_]+=", w)] for words in commands if words]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a page's code runs; what it writes can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_python(block: Block, names: dict[str, object], folder: Path) -> str:
    """What the block printed."""
    if block.title:
        (folder / block.title).write_text(block.text)
        return ""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, "a page", "exec"), names)
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, folder):
    names: dict[str, object] = {"__name__": "page"}
    printed = ""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{page}: {block.language}"
        if block.language == "python":
            printed = run_python(block, names, folder)
        elif block.title == "output":
            assert printed == block.text, page
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "bash":
            for words in commands_of(block):
                check_command(words)


def check_command(words: Sequence[str]) -> None:
    """Refuse a command that this project would refuse, without running it."""
    if "--" in words:
        check_command(words[words.index("--") + 1 :])
    elif words[0] == "env":
        check_command([word for word in words[1:] if "=" not in word])
    elif words[:2] == ["python", "-m"]:
        check_program(words[2], words[3:])
    elif words[:2] == ["rlrag", "serve"]:
        parse_settings({"bundle": words[2]} | dict(word.split("=", 1) for word in words[3:]))
    elif words[0] == "rlrag":
        check_program(f"jobs.{words[1]}", words[2:])
    elif words[0] == "python":
        assert words[1].endswith(".py")  # a page's own; the tutorial's test runs it
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    elif words[:3] == ["serve", "run", "serve.app:build"]:
        parse_settings(dict(word.split("=", 1) for word in words[3:]))
    elif words[0] == "curl":
        asyncio.run(post(words))
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file()
        check_program("jobs.train", words[2:])
    else:
        assert words[0] in FOREIGN, f"nothing checks {words}"


def check_program(module: str, words: Sequence[str]) -> None:
    if module in ("jobs.train", "jobs.doctor"):
        recipe, flags = pick_recipe(words, RECIPES, module)
        kind = train.TrainArguments
        if module == "jobs.doctor":
            kind = importlib.import_module("rlrag.cli.doctor.program").DoctorArguments
        if not {"--help", "--help-all"} & set(flags):
            train.config_of(parse(kind, kind(recipe, Path("run")), flags, module))
    elif module in ARGUMENTS:
        program = importlib.import_module(module.replace("jobs.", "rlrag.cli."))
        parse(getattr(program, ARGUMENTS[module]), None, words, module)
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def accepts(recipe: str, flags: Sequence[str]) -> bool:
    try:
        check_program("jobs.train", [recipe, *flags])
    except (ConfigError, SystemExit):  # the second: it is a flag of another algorithm
        return False
    return True


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_flags_in_running_text_are_accepted_by_a_recipe(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    before: list[list[str]] = [[]]
    for span in re.findall(r"`(--[a-z-]+\.[^`]+ [^`]+)`", text):
        flags = ["8" if word == "N" else word for word in span.split()]
        # Alone, or with what the page has named before.
        choices = ([*earlier, *flags] for earlier in before)
        assert any(accepts(recipe, words) for words in choices for recipe in RECIPES), span
        before.append(flags)


def test_commands_of_the_readme_are_accepted():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:rlrag|make|ray) .*$", text, re.M)
    assert len(commands) > 6
    for command in commands:
        check_command(shlex.split(command, comments=True))


async def post(words: Sequence[str]) -> None:
    """Send a request to the application, which must take it."""
    served = Served()
    path = "/" + next(word for word in words if "localhost" in word).split("/", 1)[1]
    reply = await served.client.post(path, json=json.loads(words[words.index("-d") + 1]))
    assert reply.status_code == 200, reply.text


@pytest.mark.slow
def test_the_tutorial_works_from_its_first_block_to_its_last(folder, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    sizes = {
        "cache-dir": folder / "cache",
        "data.max-train-questions": 24,
        "data.num-validation-questions": 8,
        "data.max-eval-questions": 8,
        "retrieval.encoder": save_tiny_encoder(models / "encoder"),
        "generator.model": save_tiny_llama(models / "generator"),
        "generator.backend": "transformers",
        "training.batch-size": 8,
        "training.num-epochs": 1,
    }
    tiny = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for block in blocks_of(TUTORIAL):
        if block.language == "python":
            run_python(block, {}, folder)
        for words in commands_of(block) if block.language == "bash" else ():
            if words[0] == "python" and words[1] != "-m":
                runpy.run_path(words[1])
                for path in sorted(Path("runs/tutorial/texts").iterdir())[8:]:
                    path.unlink()  # fewer passages to encode, and questions enough
            elif words[:2] == ["python", "-m"]:
                takes_a_recipe = words[2] in ("jobs.train", "jobs.doctor")
                run_program(words[2], [*words[3:], *(tiny if takes_a_recipe else ())])
            elif words[0] == "serve":
                settings = parse_settings(dict(word.split("=", 1) for word in words[3:]))
                assert read_bundle(Path(settings.bundle)).index_dir is not None
                assert Path(str(settings.corpus)).is_file()
    found = json.loads(Path("runs/tutorial/run/evaluation.json").read_text())
    assert found["num_questions"] == 8
    assert {"retriever_order", "trained", "oracle"} <= found["systems"].keys()
    assert "trained" in Path("runs/tutorial/report.html").read_text()


def run_program(module: str, words: list[str]) -> None:
    """As `python -m` does; the doctor's tests are its own, as it judges this machine."""
    if module == "jobs.doctor":
        check_program(module, words)
    else:
        importlib.import_module(module).main(words)


class Warnings(logging.Handler):
    """What mkdocs and its plugins complained of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    warnings = Warnings()
    logging.getLogger("mkdocs").addHandler(warnings)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(warnings)
    assert warnings.found == []
    assert config.strict
    check_site(tmp_path / "site")


def check_site(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    for name, text in pages.items():
        fetched = re.findall(
            r'<(?:script|img|iframe|link)\b[^>]*?(?:src|href)="(https?:[^"]*)', text
        )
        assert [url for url in fetched if "canonical" not in url] == [], name
        assert "{{" not in text, f"{name}: a directive was not replaced"
        assert 'class="arithmatex">\\' not in text, f"{name}: TeX was left"
    assert "<math" in pages["concepts/dro.html"]
    assert "num_samples" in pages["reference/configuration.html"]
    for recipe in RECIPES:
        assert f"<code>{recipe}</code>" in pages["reference/recipes.html"]
    assert "rlrag evaluate" in pages["reference/programs.html"]
    assert "importance_weights" in pages["reference/algorithms.html"]
    assert not (site / "hooks.py").exists()


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert named == {
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
