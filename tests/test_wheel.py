"""The built wheel is whole: from an empty folder it trains, evaluates, answers and serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest
from serve_load import started_service
from tiny_models import save_family

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Programs of an environment that has the wheel, and this one's packages but no checkout.

    A folder that a `.pth` file names is searched, but its own `.pth` files, of which one leads to
    the checkout, are not read.
    """
    folder = tmp_path_factory.mktemp("wheel")
    run(folder, "uv", "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    run(folder, sys.executable, "-m", "venv", "--without-pip", folder / "env")
    [site] = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env" / "bin" / "python"
    [wheel] = folder.glob("*.whl")
    run(folder, "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    return folder / "env" / "bin"


def run(folder: Path, *words: object, timeout: float = 300) -> str:
    """What a program prints that runs in a folder with nothing of ours on its path."""
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    ended = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=variables | {"PATH": programs},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def test_it_trains_evaluates_answers_and_serves(installed, openrag_files, tmp_path):
    python, rlrag = installed / "python", installed / "rlrag"
    where = "import rlrag; print(rlrag.__file__)"
    assert run(tmp_path, python, "-c", where).startswith(str(installed.parent))
    made = """import gymnasium, rlrag.environment
from rlrag.config import RunConfig
gymnasium.make(RunConfig().environment.id)"""
    run(tmp_path, python, "-c", made)
    flags = {
        "run-dir": "run",
        "cache-dir": "cache",
        "data.corpus": openrag_files / "corpus.jsonl",
        "data.train-questions": openrag_files / "train.jsonl",
        "data.eval-questions": openrag_files / "eval.jsonl",
        "data.max-train-questions": 12,
        "data.num-validation-questions": 4,
        "retrieval.encoder": openrag_files / "encoder",
        "environment.num-selected": 1,
        "generator.model": save_family(tmp_path / "generator", "llama"),
        "generator.backend": "transformers",
        "generator.dtype": "float32",
        "generator.prompt.max-prompt-tokens": 400,
        "generator.max-model-len": 500,
        "training.launcher": "local",
        "training.num-epochs": 1,
        "training.batch-size": 4,
        "evaluation.systems": "trained",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    run(tmp_path, rlrag, "train", "factbook", *words)
    bundle, corpus = tmp_path / "run" / "bundle", openrag_files / "corpus.jsonl"
    asked = ("--corpus", corpus, "--questions", openrag_files / "eval.jsonl", "--limit", 3)
    run(tmp_path, rlrag, "evaluate", "--bundle", bundle, *asked, "--output", "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["num_questions"] == 3
    answer = f"""import rlrag
with rlrag.load_pipeline({str(bundle)!r}) as pipeline:
    print(pipeline.answer("what does the lamp hold?").text)"""
    said = run(tmp_path, python, "-c", answer).strip()
    with started_service(bundle, folder=tmp_path, program=(rlrag,)) as url:
        question = {"question": "what does the lamp hold?"}
        reply = httpx.post(f"{url}/v1/answer", json=question, timeout=60)
        assert reply.json()["answer"] == said, reply.text
        assert httpx.get(url, timeout=60).status_code == 200
