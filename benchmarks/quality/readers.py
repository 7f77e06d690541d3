"""Quality and speed of several generators on the same passages.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.readers nq --models smollm2-135m-instruct
gemma-3-270m`. All engines are open at once, a process each, and take turns: each chunk of questions
is answered and scored by one and then by the next, so that what else the machine does slows all
alike. Nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs import own_cluster

if TYPE_CHECKING:
    from rlrag.config import GeneratorConfig, RunConfig
    from rlrag.records import Passage, Prompt, Question
    from rlrag.retrieval.candidates import CandidateTable

RESULTS_FILE = Path(__file__).parents[1] / "results" / "readers.md"
_TIMEOUT_S = 1800
_CHUNK = 12

Quality = tuple[float, float]
"""Exact match and F1 of one answer; the larger is the better one."""


class EngineProcess:
    """An engine alone in a process, which is timed and whose memory is counted there."""

    def __init__(self, config: GeneratorConfig, model_dir: Path, prefix: tuple[int, ...]) -> None:
        from rlrag.generation.build import open_engine

        self._engine = open_engine(config, model_dir, prefix)

    def call(self, name: str, *arguments: Any) -> tuple[list[Any], float]:
        """The results of a method of the engine, and the seconds that it took.

        Raises:
            RlragError: the first that stands in the place of a result.
        """
        start = time.perf_counter()
        found = getattr(self._engine, name)(*arguments)
        seconds = time.perf_counter() - start
        for result in found:
            if isinstance(result, Exception):
                raise result
        return list(found), seconds

    def peak_gib(self) -> float:
        """The most memory that the process ever held, as Linux counts it."""
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Reader:
    """A generator by name, with what its answers were worth and how fast they came."""

    def __init__(self, model: str, run: RunConfig, threads: int) -> None:
        import ray

        from rlrag.generation.backends.vllm import vllm_environment
        from rlrag.generation.build import resolve_config
        from rlrag.generation.prompts import PromptBuilder, load_tokenizer
        from rlrag.models.directories import resolve_model
        from rlrag.pipeline import sampling_of

        config = resolve_config(run.generator.model_copy(update={"model": model}), "ray")
        self.model, self.dtype = model, config.dtype
        model_dir = resolve_model(model, run.cache_path)
        self._prompts = PromptBuilder(config.prompt, load_tokenizer(model_dir))
        self._sampling = sampling_of(run)
        self._num_selected = run.environment.num_selected
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            **vllm_environment(config),
        }
        make = ray.remote(num_cpus=0, runtime_env={"env_vars": variables})(EngineProcess)
        self._process = make.remote(config, model_dir, self._prompts.prefix_ids)
        self.qualities: dict[str, list[Quality]] = {}
        self.prompt_tokens: list[int] = []
        self.speeds: dict[str, list[float]] = {}

    def read(self, questions: Sequence[Question], candidates: Sequence[Sequence[Passage]]) -> None:
        """Answer one chunk from every selection, and score its golden answers."""
        picked = range(self._num_selected)
        orders = {"order": picked, "reversed": picked[::-1]}
        for name, order in orders.items():
            shown = [[passages[i] for i in order] for passages in candidates]
            self._note(name, self._answer(questions, shown, timed=name == "order"))
        singles = [
            self._answer(questions, [[passages[i]] for passages in candidates])
            for i in range(len(candidates[0]))
        ]
        self._note("first", singles[0])
        self._note("best", [max(found) for found in zip(*singles, strict=True)])
        # Prompts that were not read before, so that only the examples are in the engine's cache.
        unseen = [
            list(passages[self._num_selected :][: self._num_selected]) for passages in candidates
        ]
        prompts = self._build(questions, unseen)
        answers = [self._prompts.encode_answer(q.golden_answers[0]) for q in questions]
        _, seconds = self._call("score", prompts, answers)
        num_tokens = [len(prompt.token_ids) for prompt in prompts]
        self.prompt_tokens += num_tokens
        self._clock("scored", len(prompts) / seconds)
        self._clock("scored tokens", sum(num_tokens) / seconds)

    def row(self) -> tuple[str, str]:
        """Its lines in the tables of quality and of speed."""
        import ray

        peak = ray.get(self._process.peak_gib.remote(), timeout=_TIMEOUT_S)
        means = [
            " / ".join(f"{statistics.mean(measure):.3f}" for measure in zip(*found, strict=True))
            for found in self.qualities.values()
        ]
        speeds = [f"{statistics.median(found):,.1f}" for found in self.speeds.values()]
        length = f"{statistics.mean(self.prompt_tokens):.0f}"
        return (
            f"| {self.model} | {' | '.join(means)} |",
            f"| {self.model} | {length} | {' | '.join(speeds)} | {peak:.2f} |",
        )

    def _answer(
        self,
        questions: Sequence[Question],
        shown: Sequence[Sequence[Passage]],
        timed: bool = False,
    ) -> list[Quality]:
        from rlrag.rewards.answer_match import exact_match, token_f1

        found, seconds = self._call("generate", self._build(questions, shown), self._sampling)
        if timed:
            self._clock("answers", len(found) / seconds)
            self._clock("answer tokens", sum(answer.num_tokens for answer in found) / seconds)
        return [
            tuple(
                measure(answer=answer.text, golden_answers=question.golden_answers)
                for measure in (exact_match, token_f1)
            )
            for answer, question in zip(found, questions, strict=True)
        ]

    def _build(
        self, questions: Sequence[Question], shown: Sequence[Sequence[Passage]]
    ) -> list[Prompt]:
        return [self._prompts.build(*pair) for pair in zip(questions, shown, strict=True)]

    def _call(self, name: str, *arguments: Any) -> tuple[list[Any], float]:
        import ray

        return ray.get(self._process.call.remote(name, *arguments), timeout=_TIMEOUT_S)

    def _note(self, name: str, found: Sequence[Quality]) -> None:
        self.qualities.setdefault(name, []).extend(found)

    def _clock(self, name: str, speed: float) -> None:
        self.speeds.setdefault(name, []).append(speed)


def measure(options: argparse.Namespace) -> str:
    """Let all models read the same questions; the report."""
    from rlrag.pipeline import candidates_of, load_questions, open_library
    from rlrag.recipes import RECIPES

    run = RECIPES[options.recipe]()
    if options.cache_dir:
        run = run.model_copy(update={"cache_dir": options.cache_dir})
    library = open_library(run)
    found = load_questions(run.data.eval_questions, run.cache_path, library.corpus)
    candidates = candidates_of(library, found.sample(options.questions, seed=0), run)
    with own_cluster(options.threads):
        readers = [Reader(model, run, options.threads) for model in options.models]
        for start in range(0, len(candidates), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(candidates)))
            # Who begins changes with the chunk.
            turns = readers if (start // _CHUNK) % 2 == 0 else readers[::-1]
            for reader in turns:
                reader.read(
                    [candidates.questions[row] for row in rows],
                    [candidates.passages(row) for row in rows],
                )
            print(f"{rows.stop} of {len(candidates)} questions", flush=True)
        return report(options, run, readers, candidates)


def report(
    options: argparse.Namespace,
    run: RunConfig,
    readers: Sequence[Reader],
    candidates: CandidateTable,
) -> str:
    """The results as Markdown."""
    command = (
        f"python -m benchmarks.quality.readers {options.recipe} --models {' '.join(options.models)}"
    )
    lines = [
        f"# Readers of {options.recipe}",
        "",
        f"`{command}`; {len(candidates)} test questions, "
        f"{run.environment.num_selected} of {candidates.num_candidates} candidates of the "
        f"{run.retrieval.kind} retriever in the prompt, three worked examples before it, nothing "
        f"trained. {platform.machine()} with {os.cpu_count()} cores, "
        f"{options.threads} threads an engine, vLLM on the CPU in {readers[0].dtype}, "
        f"Python {platform.python_version()}.",
        "",
        "Exact match / F1. Best single: of all candidates, the one whose answer is best.",
        "",
        "| model | retriever's order | reversed | first alone | best single |",
        "|---|---|---|---|---|",
    ]
    rows = [reader.row() for reader in readers]
    lines += [quality for quality, _ in rows]
    lines += [
        "",
        f"Medians over chunks of {_CHUNK} questions that the engines took in turns, while other "
        "programs may have used the machine: compare the rows with each other. Reading the prompt "
        "is part of answering; the examples come from the engine's cache. Memory is the most that "
        f"the engine's process held, {run.generator.kv_cache_gib} GiB of it for keys and values.",
        "",
        "| model | tokens a prompt | answers/s | answer tokens/s | prompts scored/s | "
        "prompt tokens scored/s | peak memory, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [speed for _, speed in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the tables and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipe", help="recipe whose data, retriever and prompt are used, such as nq"
    )
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2, help="compute threads per engine")
    parser.add_argument("--cache-dir", default=None)
    text = measure(parser.parse_args())
    print(text)
    RESULTS_FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
