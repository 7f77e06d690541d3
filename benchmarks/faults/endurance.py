"""Measures growth of memory, threads and open files over many short training steps.

Run `python -m benchmarks.faults.endurance`. Training loop, trainer, selector, environment, reward,
cache, checkpoints and logs are the real ones, in one process and with a batch that runs ahead. The
questions are made up, their vectors are short, and the generator is a stand-in that reads the
prompt, so that 10,000 steps take minutes.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlrag.config import (
    DataConfig,
    DROConfig,
    EnvironmentConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.records import Generation, Passage, Prompt, Question, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.runs.directory import RunDirectory

RESULTS_FILE = Path(__file__).parents[1] / "results" / "endurance.md"
TARGET_GROWTH = 0.02
_NUM_QUESTIONS = 240
_NUM_VALIDATION = 20
_NUM_CANDIDATES = 5
_BATCH_SIZE = 8
_VECTOR_SIZE = 8
_NUM_ROWS = 10


class WordPrompts:
    """Builds prompts of bytes; stands in for a tokenizer."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        """The passages and then the question."""
        text = " | ".join([*(p.contents for p in passages), question.question])
        return Prompt(tuple(text.encode()), text, len(passages))

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """The answer's bytes."""
        return tuple(answer.encode())


class ReadingGenerator:
    """Knows an answer when the prompt holds it; implements `Generator`."""

    def __init__(self) -> None:
        self.identity, self.version, self.tokens = "reading", 0, TokenCount()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """The last word of the first passage."""
        self._count(prompts)
        return [
            Generation(p.text.split(" | ")[0].split()[-1], -1.0, 1, len(p.token_ids))
            for p in prompts
        ]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """Likely where the prompt holds the answer."""
        self._count(prompts)
        return [
            Score(-0.5 if bytes(a).decode() in p.text else -6.0, len(a), len(p.token_ids))
            for p, a in zip(prompts, answers, strict=True)
        ]

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Never asked: the generator is not trained."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""

    def _count(self, prompts: Sequence[Prompt]) -> None:
        self.tokens.spent += sum(len(p.token_ids) for p in prompts)


@dataclass(frozen=True)
class Sample:
    """What the process holds after some steps; memory in MiB."""

    step: int
    seconds: float
    rss: float
    anonymous: float
    objects: int
    threads: int
    open_files: int
    files: int
    metrics_mib: float


class Recorder:
    """Takes a sample every so many steps."""

    def __init__(self, run_dir: RunDirectory, every: int) -> None:
        self.samples: list[Sample] = []
        self._run_dir = run_dir
        self._every = every
        self._began = time.monotonic()

    def on_step(self, metrics: dict[str, Any]) -> None:
        """What the loop calls after every step."""
        if metrics["step"] % self._every or not metrics["step"]:
            return
        gc.collect()  # what only waits to be collected is no leak
        memory = _memory_mib()
        self.samples.append(
            Sample(
                metrics["step"],
                time.monotonic() - self._began,
                memory["Rss"],
                memory["Anonymous"],
                len(gc.get_objects()),
                threading.active_count(),
                len(os.listdir("/proc/self/fd")),
                sum(len(files) for _, _, files in os.walk(self._run_dir.path)),
                self._run_dir.metrics.stat().st_size / 2**20,
            )
        )


def _memory_mib() -> dict[str, float]:
    """Of this process, by the names of the kernel."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


def made_up_table(num_questions: int, seed: int) -> CandidateTable:
    """Questions whose answer stands in one candidate, which one entry of its vector tells."""
    from rlrag.data.corpus import MemoryCorpus
    from rlrag.retrieval.candidates import CandidateTable

    rng = np.random.default_rng(seed)
    num_passages = num_questions * _NUM_CANDIDATES
    gold = rng.integers(_NUM_CANDIDATES, size=num_questions)
    vectors = rng.normal(size=(num_passages, _VECTOR_SIZE)).astype(np.float32)
    vectors[:, 0] = 0.0
    vectors[np.arange(num_questions) * _NUM_CANDIDATES + gold, 0] = 3.0
    passages = [
        Passage(f"p{row}", "", f"the value is {_word(row, gold)}") for row in range(num_passages)
    ]
    questions = [
        Question(f"q{number}", f"what is value {number}?", (f"answer{number}",))
        for number in range(num_questions)
    ]
    scores = -np.sort(-rng.normal(size=(num_questions, _NUM_CANDIDATES, 2)), axis=1)
    return CandidateTable(
        questions=tuple(questions),
        corpus=MemoryCorpus(passages),
        rows_QN=np.arange(num_passages).reshape(num_questions, _NUM_CANDIDATES),
        scores_QNC=scores.astype(np.float32),
        score_names=("dense", "bm25"),
        question_vectors_QD=np.ones((num_questions, _VECTOR_SIZE), dtype=np.float32),
        passage_vectors_PD=vectors,
    )


def _word(row: int, gold: np.ndarray) -> str:
    number, place = divmod(row, _NUM_CANDIDATES)
    return f"answer{number}" if gold[number] == place else f"other{row}"


def endurance_config(folder: Path, num_steps: int) -> RunConfig:
    """A run of so many steps that logs all that a run can log."""
    return RunConfig(
        recipe="endurance",
        cache_dir=str(folder / "cache"),
        data=DataConfig(num_validation_questions=_NUM_VALIDATION),
        retrieval=RetrievalConfig(num_candidates=_NUM_CANDIDATES),
        environment=EnvironmentConfig(num_selected=2),
        # A batch that runs ahead needs a bound.
        algorithm=DROConfig(num_samples=4, clip_ratio=0.2, overlap=True),
        training=TrainingConfig(
            launcher="local",
            batch_size=_BATCH_SIZE,
            num_epochs=-(-num_steps * _BATCH_SIZE // _NUM_QUESTIONS),
            log_experience=True,
            validate_every=50,
            checkpoint_every=10,
        ),
    )


def train(folder: Path, config: RunConfig, every: int) -> list[Sample]:
    """Run the loop to its end, from the last checkpoint in the folder."""
    from rlrag.runs.directory import RunDirectory

    run_dir = RunDirectory(folder / "run")
    with run_dir.in_use(print):
        return _train(run_dir, config, every)


def _train(run_dir: RunDirectory, config: RunConfig, every: int) -> list[Sample]:
    from rlrag.generation.cache import CachedGenerator
    from rlrag.pipeline import TrainingData
    from rlrag.runs.preemption import ended_between_steps
    from rlrag.training.distributed.workers import SingleWorker
    from rlrag.training.dro.trainer import DROTrainer
    from rlrag.training.loop import TrainingLoop
    from rlrag.training.trainer import TrainerContext

    run_dir.claim(config)
    data = TrainingData(
        made_up_table(_NUM_QUESTIONS, seed=0), made_up_table(_NUM_VALIDATION, seed=1), {}
    )
    generator = CachedGenerator(ReadingGenerator(), config.cache_path)
    prompts: Any = WordPrompts()
    library: Any = None  # DRO asks it for nothing
    workers = SingleWorker()
    trainer = DROTrainer(
        TrainerContext(config, workers, run_dir, library, data, generator, prompts)
    )
    recorder = Recorder(run_dir, every)
    with ended_between_steps(run_dir):
        TrainingLoop(config, trainer, run_dir, workers, recorder.on_step).run()
    return recorder.samples


def growth(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    """Share by which the last tenth of the run has more than the tenth after the warm-up."""
    tenth = max(1, len(samples) // 10)
    return fmean(map(of, samples[-tenth:])) / fmean(map(of, samples[tenth : 2 * tenth])) - 1


def leaks(samples: Sequence[Sample]) -> list[str]:
    """What there is more of at the end than there ever was in the first half of the run."""
    found = []
    for name in ("threads", "open_files", "files"):
        before = max(getattr(sample, name) for sample in samples[: len(samples) // 2])
        after = getattr(samples[-1], name)
        if after > before:
            found.append(f"{name.replace('_', ' ')} went from {before} to {after}")
    return found


def report(samples: Sequence[Sample]) -> str:
    """The measured numbers as Markdown."""
    step_ms = 1e3 * samples[-1].seconds / samples[-1].step
    names = [field.name for field in fields(Sample)]
    shown = samples[:: max(1, len(samples) // _NUM_ROWS)]
    shown = [*shown, samples[-1]] if shown[-1] is not samples[-1] else shown
    lines = [
        f"# Endurance: {samples[-1].step:,} steps in one process",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.faults.endurance`.",
        "",
        f"A selector of features is trained by DRO on {_NUM_QUESTIONS} made-up questions with a "
        "stand-in for the generator; the rest is what every run has: environment, cache, a batch "
        "that runs ahead, a checkpoint every 10 steps, a validation every 50, metrics and a log "
        f"of all selections. {step_ms:.0f} ms a step on {torch.get_num_threads()} thread.",
        "",
        "Memory in MiB, as the kernel counts it after a collection of garbage: `rss` is all that "
        "is resident, `anonymous` what is no file's. `objects` are those that the collector knows, "
        "`files` those in the run directory.",
        "",
        f"| {' | '.join(name.replace('_', ' ') for name in names)} |",
        "|---" * len(names) + "|",
        *(f"| {' | '.join(_cell(getattr(sample, name)) for name in names)} |" for sample in shown),
        "",
        "From the second tenth of the run, which follows the warm-up, to the last:",
        "",
        f"- resident memory {growth(samples, lambda s: s.rss):+.2%} (target: below "
        f"{TARGET_GROWTH:+.0%});",
        f"- anonymous memory {growth(samples, lambda s: s.anonymous):+.2%};",
        f"- objects {growth(samples, lambda s: s.objects):+.2%};",
        f"- leaked: {'; '.join(leaks(samples)) or 'nothing'}.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and save; exit code 1 when memory grows or something leaks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=100, help="steps between samples")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    if options.steps < 20 * options.every:
        parser.error("a tenth of --steps must contain two samples; lower --every")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = endurance_config(Path(folder), options.steps)
        samples = train(Path(folder), config, options.every)
    text = report(samples)
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    grown = growth(samples, lambda sample: sample.rss)
    return 0 if grown < TARGET_GROWTH and not leaks(samples) else 1


if __name__ == "__main__":
    sys.exit(main())
