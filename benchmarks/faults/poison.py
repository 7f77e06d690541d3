"""Environment variables that crash an engine whenever it gets a given question."""

from __future__ import annotations

from pathlib import Path

from rlrag.config import RunConfig
from rlrag.pipeline import open_library, open_training_data

_POISON = '''
import os, signal, sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

WORD = os.environ["POISON"]


class Poison(MetaPathFinder):
    """Lets engines of this process die of prompts with a word."""

    def find_spec(self, name, path=None, target=None):
        if name != "rlrag.generation.backends.transformers":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def execute(module):
            load(module)
            for method in ("generate", "score"):
                setattr(module.TransformersGenerator, method, deadly(
                    getattr(module.TransformersGenerator, method)))

        spec.loader.exec_module = execute
        return spec


def deadly(method):
    def call(self, prompts, *rest):
        if any(WORD in prompt.text for prompt in prompts):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, prompts, *rest)

    return call


sys.meta_path.insert(0, Poison())
'''


def poison(folder: Path, asked: str) -> dict[str, str]:
    """Have every Python process of the run import the poison."""
    (folder / "poison").mkdir(parents=True, exist_ok=True)
    (folder / "poison" / "sitecustomize.py").write_text(_POISON)
    return {"PYTHONPATH": str(folder / "poison"), "POISON": asked}


def asked_question(run_dir: Path) -> str:
    """A question that a run trained on."""
    config = RunConfig.from_json((run_dir / "config.json").read_text())
    return open_training_data(config, open_library(config)).train.questions[0].question
