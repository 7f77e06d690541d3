"""What holds for the whole project: one checkout, one version, pinned packages."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rlrag", "envs", "jobs", "serve")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    texts = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    return [Requirement(text) for text in texts if not text.startswith("rlrag[")]


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_come_from_this_checkout(name):
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


def test_the_version_has_one_home():
    import rlrag

    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "rlrag/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", rlrag.__version__)
    try:
        installed = importlib.metadata.version("rlrag")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rlrag is not installed, only on the path; `make setup` installs it")
    assert installed == rlrag.__version__


def test_the_wheel_holds_the_library_alone():
    assert PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["rlrag"]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_pins_are_exact_versions_from_a_registry():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
    for line in (ROOT / "overrides.txt").read_text().splitlines():
        assert "://" not in line, line
        assert "@" not in line, line
    assert len(pins()) == len({canonicalize_name(name) for name in pins()})


def test_pins_lie_within_the_ranges_of_the_project():
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        if version is not None:
            assert requirement.specifier.contains(version, prereleases=True), requirement
    unpinned = {r.name for r in requirements() if canonicalize_name(r.name) not in pinned}
    assert unpinned <= {"vllm", "datasets", "wandb", "mlflow-skinny"}, "extras beyond make setup"


def test_every_range_has_an_upper_end():
    for requirement in requirements():
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


def test_no_module_hides_one_of_the_standard_library():
    """A program that is run by its path finds the modules beside it first."""
    folders = ("benchmarks", "examples", "tests", "docs", "deploy", *PACKAGES)
    names = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert {"serve", "train", "test_project"} <= names
    assert names & sys.stdlib_module_names == set()


def test_every_module_says_what_it_is_for():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            first = path.read_text().lstrip("r")
            assert first.startswith('"""'), path
            assert len(first.splitlines()[0]) <= 100, path


def test_names_say_what_they_hold():
    vague = {"utils", "util", "helpers", "common", "manager", "base", "misc"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert not vague & set(path.relative_to(ROOT).with_suffix("").parts), path


_MODEL_LOADERS = {"LLM", "SentenceTransformer", "CrossEncoder", "SparseEncoder", "from_config"}
_MODEL_LOADERS |= {"from_pretrained", "EngineArgs", "AsyncEngineArgs"}


def test_no_model_brings_code_of_its_own():
    """Left unset, transformers asks on standard input whether it may run what a model names."""
    found, open_calls = 0, []
    folders = ("rlrag", "jobs", "serve", "envs", "examples", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            if name not in _MODEL_LOADERS:
                continue
            found += 1
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            if given.get("trust_remote_code") != "False":
                open_calls.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert found > 20
    assert open_calls == []
