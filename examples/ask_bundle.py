"""Asks a bundle questions, and shows each answer with the passages that it was made from.

    python -m examples.ask_bundle --bundle runs/quickstart/bundle "What is the capital of Mongolia?"

This is what the service does for one request, in one process and without Ray.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlrag.bundle import load_bundle
from rlrag.data.checks import DataReport
from rlrag.data.questions import QuestionSet
from rlrag.environment.rollout import play_greedy
from rlrag.errors import RlragError
from rlrag.generation.build import open_generator, resolve_config
from rlrag.generation.prompt_counts import cut_warning
from rlrag.pipeline import candidates_of, open_answering, open_library
from rlrag.records import Passage, Question
from rlrag.retrieval.tuned import tuned_retrieval


@dataclass(frozen=True)
class Answered:
    """One question, what was picked for it, best first, and the answer."""

    question: str
    passages: tuple[Passage, ...]
    answer: str


def ask(bundle_dir: Path, texts: Sequence[str], allow_code: Sequence[str] = ()) -> list[Answered]:
    """Answer questions as the bundle was evaluated: retrieve, select greedily, generate.

    An environment of one's own, `module:namespace/Name-v0`, has to be named in `allow_code`.
    """
    bundle = load_bundle(bundle_dir, allow_code)
    config = bundle.config
    if bundle.retriever_dir is not None:
        retrieval = tuned_retrieval(config.retrieval, bundle.retriever_dir)
        config = config.model_copy(update={"retrieval": retrieval})
    questions = [Question(f"asked-{n}", text, ()) for n, text in enumerate(texts)]
    asked = QuestionSet.of(questions, DataReport("asked", len(texts), len(texts)))
    table = candidates_of(open_library(config, bundle.index_dir), asked, config)
    selections = play_greedy(config.environment, bundle.policy, table).evidence
    generator, prompts = open_generator(config.generator, "local", config.cache_path)
    try:
        weights = bundle.generator_weights(resolve_config(config.generator, "local").dtype)
        if weights is not None:
            generator.load_weights(weights)
        answering = open_answering(config, generator, prompts)
        answers = answering.answer(questions, selections)
    finally:
        generator.close()
    for answer in answers:
        if isinstance(answer, RlragError):  # such as a question that leaves no room in the prompt
            raise answer
    if warning := cut_warning(answering.prompt_counts.shares()):
        print(warning, file=sys.stderr)
    return [
        Answered(text, selection, answer.text)
        for text, selection, answer in zip(texts, selections, answers, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print each answer above its passages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--allow-code", action="append", default=[], metavar="NAME")
    parser.add_argument("questions", nargs="+")
    arguments = parser.parse_args(argv)
    for answered in ask(arguments.bundle, arguments.questions, arguments.allow_code):
        print(f"{answered.question}\n  {answered.answer}")
        for number, passage in enumerate(answered.passages, start=1):
            print(f"    [{number}] {passage.title}: {passage.text[:100]}")


if __name__ == "__main__":
    main()
