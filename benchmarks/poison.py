"""A question in; variables of a program whose engines die of it, out."""

from __future__ import annotations

import json
from pathlib import Path

from rlrag.config import RunConfig
from rlrag.data.load import load_corpus, load_questions

_POISON = '''
import os, signal, sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

WORD = os.environ["POISON"]


class Poison(MetaPathFinder):
    """Lets engines of this process die of prompts with a word."""

    def find_spec(self, name, path=None, target=None):
        if name != "rlrag.generation.transformers_backend":
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
    """The first question that a run trained on."""
    config = RunConfig.from_json((run_dir / "config.json").read_text())
    first = json.loads((run_dir / "experience" / "worker-0.jsonl").read_text().split("\n")[0])
    corpus = load_corpus(config.data.corpus, config.cache_path, config.data.passage_words)
    found = load_questions(config.data.train_questions, config.cache_path, corpus).questions
    return next(q.question for q in found if q.id == first["question"])
