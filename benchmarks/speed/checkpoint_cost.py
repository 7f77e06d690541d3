"""The share of training time that checkpoints take.

Run `python -m benchmarks.speed.checkpoint_cost`. The run is the recipe `factbook` with a frozen
and with a trained generator, its engines in Ray actors as always and its training loop in this
process. A checkpoint follows every step, so that there are many to time. From the moment that a
step's record is written to the beginning of the next step, the loop does nothing but that: it
gathers the tensors, writes them and deletes older ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.runs import own_cluster

if TYPE_CHECKING:
    from rlrag.config import RunConfig
    from rlrag.training.trainer import Files, Metrics, Trainer

RESULTS_FILE = Path(__file__).parents[1] / "results" / "checkpoint_cost.md"
TARGET_SHARE = 0.05
STEPS_A_CHECKPOINT = 10
_MIB = 2**20


class EndOfTrial(Exception):
    """Ends the run once enough steps are timed."""


class TimedTrainer:
    """Passes every call on and notes when steps begin; implements `Trainer`."""

    def __init__(self, inner: Trainer, num_steps: int) -> None:
        self._inner = inner
        self._limit = num_steps
        self.best_by = inner.best_by
        self.before = inner.before
        self.step_s: list[float] = []
        self.save_s: list[float] = []
        self._recorded_at: float | None = None

    @property
    def num_steps(self) -> int:
        """The inner trainer's."""
        return self._inner.num_steps

    def may_pause(self, step: int) -> bool:
        """The inner trainer's."""
        return self._inner.may_pause(step)

    def warm_start(self) -> None:
        """Pass it on."""
        self._inner.warm_start()

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Time the step, and what came between the record of the last one and its beginning."""
        began = time.monotonic()
        if self._recorded_at is not None:
            self.save_s.append(began - self._recorded_at)
        if step == self._limit:
            raise EndOfTrial
        metrics = self._inner.step(step, pauses_after)
        self.step_s.append(time.monotonic() - began)
        return metrics

    def on_step(self, metrics: Metrics) -> None:
        """What the loop calls when a step is recorded."""
        self._recorded_at = time.monotonic()

    def validate(self, step: int) -> Metrics:
        """Nothing: validations take no part in the time of a step."""
        return {}

    def tensors(self) -> Files:
        """The inner trainer's."""
        return self._inner.tensors()

    def load(self, files: Files) -> None:
        """Pass it on."""
        self._inner.load(files)

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Pass it on."""
        self._inner.resume(step, files, first)

    def close(self) -> None:
        """Close the inner trainer."""
        self._inner.close()


@dataclass(frozen=True)
class Costs:
    """What was measured of one run; the first checkpoint, of step 0, is among the saves."""

    name: str
    checkpoint_bytes: int
    step_s: Sequence[float]
    save_s: Sequence[float]

    @property
    def share(self) -> float:
        """Of the time of ten steps and a checkpoint."""
        return _share(median(self.save_s), median(self.step_s))

    @property
    def worst_share(self) -> float:
        """The same of the slowest checkpoint and the fastest step."""
        return _share(max(self.save_s), min(self.step_s))


def _share(save_s: float, step_s: float) -> float:
    return save_s / (STEPS_A_CHECKPOINT * step_s + save_s)


def runs() -> dict[str, RunConfig]:
    """What is measured, by name."""
    from rlrag.recipes.selection import factbook

    frozen = _changed(factbook(), training={"checkpoint_every": 1})
    lora = _changed(
        frozen,
        training={"worker_threads": 2},
        algorithm={"parts": ["selector", "generator"]},
        generator_training={"sequences_per_question": 1},
    )
    return {"selector": frozen, "selector, generator with LoRA": lora}


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The configuration with some fields set, checked as one that is read from a file."""
    from rlrag.config import RunConfig

    values = json.loads(config.to_json())
    for section, fields in sections.items():
        values[section].update(fields)
    return RunConfig.from_json(json.dumps(values))


def measure(name: str, config: RunConfig, folder: Path, num_steps: int) -> Costs:
    """Train some steps of a run in `folder`; nothing that it generates is in a cache."""
    import torch

    from rlrag.generation.build import open_generator
    from rlrag.generation.cache import CachedGenerator
    from rlrag.pipeline import open_library, open_training_data
    from rlrag.runs.checkpoints import CheckpointStore
    from rlrag.runs.directory import RunDirectory
    from rlrag.training.distributed.workers import SingleWorker
    from rlrag.training.launch import open_trainer
    from rlrag.training.loop import TrainingLoop
    from rlrag.training.trainer import TrainerContext

    torch.set_num_threads(config.training.worker_threads)
    library = open_library(config)
    data = open_training_data(config, library)
    run_dir = RunDirectory(folder / "run")
    run_dir.claim(config)
    opened, prompts = open_generator(config.generator, "ray", config.cache_path)
    try:
        generator = CachedGenerator(opened.inner, folder / "cache")
        workers = SingleWorker()
        inner = open_trainer(
            TrainerContext(config, workers, run_dir, library, data, generator, prompts)
        )
        trainer = TimedTrainer(inner, num_steps)
        with suppress(EndOfTrial):
            TrainingLoop(config, trainer, run_dir, workers, trainer.on_step).run()
    finally:
        opened.close()
    store = CheckpointStore(run_dir.checkpoints)
    newest = store.path(store.steps()[-1])
    size = sum(path.stat().st_size for path in newest.iterdir())
    return Costs(name, size, trainer.step_s, trainer.save_s)


def report(costs: Sequence[Costs]) -> str:
    """The measured numbers as Markdown."""
    lines = [
        "# Checkpoints: their share of a run's time",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; made by "
        "`python -m benchmarks.speed.checkpoint_cost`.",
        "",
        f"`factbook`, with a frozen generator and with one that is trained too; medians of "
        f"{len(costs[0].step_s)} steps with an empty cache and of as many checkpoints. A step "
        "collects and learns; validations do not count. A checkpoint is on disk (fsync) before "
        f"the next step begins. The share is that of one checkpoint every {STEPS_A_CHECKPOINT} "
        f"steps (target: at most {TARGET_SHARE:.0%}); the last column takes the slowest "
        "checkpoint and the fastest step.",
        "",
        "| trained | checkpoint, MiB | step, s | checkpoint, ms | slowest checkpoint, ms | share "
        "| at worst |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cost.name} | {cost.checkpoint_bytes / _MIB:.2f} | {median(cost.step_s):.2f} "
        f"| {1e3 * median(cost.save_s):.0f} | {1e3 * max(cost.save_s):.0f} | **{cost.share:.2%}** "
        f"| {cost.worst_share:.2%} |"
        for cost in costs
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and save; exit code 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps to time; eight are one epoch")
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to measure")
    parser.add_argument("--cache-dir", default=None, help="cache of models and indexes")
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    costs = []
    for name, config in runs().items():
        if options.cache_dir:
            config = config.model_copy(update={"cache_dir": options.cache_dir})
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, own_cluster(2):
            costs.append(measure(name, config, Path(folder), options.steps))
    text = report(costs)
    print(text)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    return 0 if all(cost.share <= TARGET_SHARE for cost in costs) else 1


if __name__ == "__main__":
    sys.exit(main())
