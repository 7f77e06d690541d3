"""Overhead of a loaded pipeline over its generator, and import time compared with torch.

Run `python -m benchmarks.speed.pipeline --bundle runs/factbook/bundle`. Questions of the bundle's
evaluation are answered one by one, in turn by `Pipeline.answer` and by the bare generator, which is
given the same prompts; nothing is cached. An import is timed in a process of its own, in turn with
that of torch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS_FILE = Path(__file__).parents[1] / "results" / "pipeline.md"


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def answers(bundle: Path, num_questions: int) -> tuple[list[float], list[float]]:
    """Seconds of each answer by the pipeline, and by its generator alone."""
    from rlrag import load_pipeline
    from rlrag.data.load import load_questions
    from rlrag.pipeline import sampling_of

    with load_pipeline(bundle) as pipeline:
        config = pipeline.config
        found = load_questions(config.data.eval_questions, config.cache_path)
        questions = found.sample(num_questions, seed=0).questions
        generator, sampling = pipeline.generator.inner, sampling_of(config)
        whole, bare = [], []
        for number, question in enumerate([questions[0], *questions]):
            prompt = pipeline.prompts.build(question, pipeline.select(question.question))
            turns: list[tuple[list[float], Callable[[], object]]] = [
                (whole, lambda text=question.question: pipeline.answer(text)),
                (bare, lambda prompt=prompt: generator.generate([prompt], sampling)),
            ]
            for times, work in turns if number % 2 else reversed(turns):
                times.append(seconds(work))
    return whole[1:], bare[1:]  # the first pays for what loads when it is first asked


def imports(num_turns: int) -> tuple[list[float], list[float]]:
    """Seconds of `import rlrag` and of `import torch`, the interpreter's start left out."""
    found: dict[str, list[float]] = {"rlrag": [], "torch": []}
    for _ in range(num_turns):
        for name, times in found.items():
            code = f"import time; t = time.perf_counter; s = t(); import {name}; print(t() - s)"
            words = [sys.executable, "-c", code]
            times.append(float(subprocess.run(words, capture_output=True, check=True).stdout))
    return found["rlrag"], found["torch"]


def interval(ratios: list[float]) -> str:
    """Median, and the bootstrap's 95 % interval of it."""
    drawn = np.random.default_rng(0).choice(ratios, (2_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument(
        "--turns", type=int, default=9, help="number of times each package is imported"
    )
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    arguments = parser.parse_args()
    whole, bare = answers(arguments.bundle, arguments.questions)
    ours, torchs = imports(arguments.turns)
    rows = (
        (
            "one answer, pipeline / its generator alone",
            whole,
            bare,
            interval([a / b for a, b in zip(whole, bare, strict=True)]),
        ),
        (
            "`import rlrag` / `import torch`",
            ours,
            torchs,
            interval([a / b for a, b in zip(ours, torchs, strict=True)]),
        ),
    )
    lines = [
        "# The loaded pipeline beside its generator",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, {len(whole)} questions; made "
        "by `python -m benchmarks.speed.pipeline`, whose module says what is done.",
        "",
        "| | median s | median s | median of the ratios (95 %) |",
        "|---|---|---|---|",
        *(
            f"| {what} | {statistics.median(left):.4f} | {statistics.median(right):.4f} | {ratio} |"
            for what, left, right, ratio in rows
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
