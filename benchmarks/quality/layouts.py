"""Prompt layout: compares placing the best passage first and last, for untrained models.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.layouts`. The generator answers the same
training questions behind the retriever's first K passages, once in each layout of
`generator.prompt.passage_order`. No test question takes part, so that the recipes' default can be
chosen by it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks.quality.evidence import draw_questions, run_flags
from rlrag.cli.cluster import cluster
from rlrag.cli.command_line import parse_config
from rlrag.config import DATA_DIR_VARIABLE, PromptConfig, RunConfig
from rlrag.generation.protocol import Generator
from rlrag.recipes import RECIPES

RESULTS_FILE = Path(__file__).parents[1] / "results" / "layouts.md"
LAYOUTS: tuple[str, ...] = get_args(PromptConfig.model_fields["passage_order"].annotation)
SETS = ("factbook", "nq", "hotpotqa", "musique", "squad2")
_PROGRAM = "python -m benchmarks.quality.layouts"
_START_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Measured:
    """EM and F1 of one layout on one set, by question."""

    em: Sequence[float]
    f1: Sequence[float]


def configuration(name: str, data_dir: Path, folder: Path, cache_dir: Path | None) -> RunConfig:
    """The recipe that trains on a set, or `nq-dro` with the data of `benchmarks.quality.evidence`.

    Questions that are drawn for that go to a file in `folder`.
    """
    flags = ["--cache-dir", str(cache_dir)] if cache_dir else []
    if name in ("musique", "squad2"):
        train, test = draw_questions(name, data_dir / "questions", folder)
        flags += run_flags(data_dir / "corpus" / f"{name}.jsonl.gz", train, test)
    recipe = {"factbook": "factbook", "hotpotqa": "hotpotqa-dro"}.get(name, "nq-dro")
    return parse_config(RECIPES[recipe](), flags, _PROGRAM)


def measure(config: RunConfig, generator: Generator, num_questions: int) -> dict[str, Measured]:
    """Each layout's answers to a seeded sample of the training questions."""
    from rlrag.data.load import load_questions
    from rlrag.generation.prompts import PromptBuilder, load_tokenizer
    from rlrag.models.directories import resolve_model
    from rlrag.pipeline import candidates_of, open_library, open_reward
    from rlrag.records import Generation
    from rlrag.rewards.answer_match import exact_match, token_f1

    library = open_library(config)
    questions = load_questions(config.data.train_questions, config.cache_path, library.corpus)
    candidates = candidates_of(library, questions.sample(num_questions, seed=0), config)
    selections = [
        candidates.passages(row)[: config.environment.num_selected]
        for row in range(len(candidates))
    ]
    found = {}
    tokenizer = load_tokenizer(resolve_model(config.generator.model, config.cache_path))
    for layout in LAYOUTS:
        prompt = config.generator.prompt.model_copy(update={"passage_order": layout})
        reward = open_reward(config, generator, PromptBuilder(prompt, tokenizer))
        pairs = []
        answers = reward.answer(candidates.questions, selections)
        for question, answer in zip(candidates.questions, answers, strict=True):
            if not isinstance(answer, Generation):
                raise answer
            if question.golden_answers:
                pairs.append((answer.text, question.golden_answers))
        found[layout] = Measured(
            [exact_match(*pair) for pair in pairs], [token_f1(*pair) for pair in pairs]
        )
    return found


def report(measured: Mapping[str, Mapping[str, Measured]], shown: Mapping[str, int]) -> str:
    """The results as Markdown."""
    from rlrag.evaluation.significance import paired_randomization_ci, paired_randomization_test

    lines = [
        "# Layout of the prompt: the best passage first or last",
        "",
        f"`{_PROGRAM}`; SmolLM2-135M-Instruct, untrained, behind the dense retriever's first "
        "passages; training questions that have an answer. EM / F1.",
        "",
        f"| set | questions | passages | {' | '.join(LAYOUTS)} | F1, last minus first (95 %) | p |",
        f"|---|---|---|{'---|' * len(LAYOUTS)}---|---|",
    ]
    for name, by_layout in measured.items():
        first, last = (by_layout[layout].f1 for layout in ("as_picked", "best_last"))
        low, high = paired_randomization_ci(last, first)
        cells = [f"{_mean(m.em):.3f} / {_mean(m.f1):.3f}" for m in map(by_layout.get, LAYOUTS) if m]
        lines.append(
            f"| {name} | {len(first)} | {shown[name]} | {' | '.join(cells)} | "
            f"{_mean(last) - _mean(first):+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{paired_randomization_test(last, first):.2g} |"
        )
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Measure each set and write the table after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--cache-dir", type=Path, default=None)
    arguments = parser.parse_args()
    from rlrag.generation.build import open_generator

    data_dir = Path(os.environ.get(DATA_DIR_VARIABLE, f"${DATA_DIR_VARIABLE}"))
    measured, shown = {}, {}
    with cluster("ray"), tempfile.TemporaryDirectory() as folder:
        configs = {
            name: configuration(name, data_dir, Path(folder), arguments.cache_dir)
            for name in arguments.sets
        }
        first = next(iter(configs.values()))  # all have the same reader
        patient = first.generator.model_copy(update={"start_timeout_s": _START_TIMEOUT_S})
        generator, _ = open_generator(patient, "ray", first.cache_path)
        try:
            for name, config in configs.items():
                measured[name] = measure(config, generator, arguments.questions)
                shown[name] = config.environment.num_selected
                text = report(measured, shown)
                RESULTS_FILE.write_text(text)
                print(text, flush=True)
        finally:
            generator.close()


if __name__ == "__main__":
    main()
