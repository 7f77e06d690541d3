"""Time and memory of pushing new weights to running engines.

Run `python -m benchmarks.speed.weight_sync`. This process plays the learner: it holds two sets of
weights and pushes them in turn, whole models first and then low-rank adapters. Some pushes are
timed; others, which are not, have the memory of all processes of the cluster read meanwhile: the
pages of each, and shared memory once. After the last push the engines' scores are compared with
those of a model in this process that holds the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runs import own_cluster

if TYPE_CHECKING:
    import torch

    from rlrag.config import GeneratorConfig
    from rlrag.generation.protocol import Generator
    from rlrag.generation.weights import GeneratorWeights
    from rlrag.records import Prompt

RESULTS_FILE = Path(__file__).parents[1] / "results" / "weight_sync.md"
TARGET_COPIES = 1.5
_MIB = 2**20
_SETTLE_S = 2.0  # Ray frees objects within a second


class MemoryPeak:
    """Reads the memory of this process, all that descend from it, and Ray's object store."""

    def __init__(self) -> None:
        self._store = _object_store(_descendants())
        self.before = self.peak = self._memory()
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> MemoryPeak:
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._reader.join()

    @property
    def extra(self) -> int:
        """Bytes at the peak over those at the start."""
        return self.peak - self.before

    def _read(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._memory())

    def _memory(self) -> int:
        """Pages that a process has alone or maps from a file, and those of the object store.

        A mapped file counts for each process, since an engine needs its weights whether it copied
        them or maps their file. The object store counts once, however many processes map it.
        """
        total = self._store.stat().st_blocks * 512
        for pid in _descendants():
            sizes = _sizes(f"/proc/{pid}/status")
            total += sizes.get("RssAnon", 0) + sizes.get("RssFile", 0)
        return total


def _descendants() -> list[int]:
    """This process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # After the name in parentheses, which may hold anything: state, then parent.
            fields = _read_or_empty(f"/proc/{entry.name}/stat").rpartition(")")[2].split()
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def _object_store(pids: Sequence[int]) -> Path:
    """The open file that Ray's object store lies in; it has no name any more."""
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if os.readlink(descriptor).startswith("/dev/shm/plasma"):
                    return descriptor
            except OSError:
                continue  # closed, or the process has ended
    raise RuntimeError("Ray's object store has no file in /dev/shm; is Ray running here?")


def _sizes(path: str) -> dict[str, int]:
    """Bytes by name, from lines such as `RssAnon:   12 kB`."""
    fields = (line.split() for line in _read_or_empty(path).splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


def _read_or_empty(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""  # the process has ended


@dataclass(frozen=True)
class Pushes:
    """What was measured of one pool; `copy_bytes` is the model, `pushed_bytes` what travels."""

    copy_bytes: int
    pushed_bytes: int
    first_s: float
    later_s: Sequence[float]
    hash_s: float
    extra: int
    difference: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="default: the built-in generator")
    parser.add_argument("--backends", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--kinds", nargs="+", choices=["whole", "adapter"], default=["whole", "adapter"]
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument(
        "--pushes", type=int, default=5, help="timed pushes; memory is measured on as many more"
    )
    parser.add_argument("--output", type=Path, default=RESULTS_FILE)
    options = parser.parse_args(arguments)
    report = measure(options)
    print(report)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(report, encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> str:
    """The whole report, one row a back end, number of actors and kind of push."""
    from rlrag.config import GeneratorConfig, RunConfig
    from rlrag.generation.build import resolve_config

    wanted = {"model": options.model} if options.model else {}
    cache = RunConfig().cache_path
    rows = []
    for backend, num_actors, kind in product(options.backends, options.actors, options.kinds):
        config = GeneratorConfig(
            **wanted,
            backend=backend,
            num_actors=num_actors,
            cpus_per_actor=0.5,
            max_model_len=256,
        )
        config = resolve_config(config, "ray")
        learner = _learner(config, cache)
        sets = _whole(config, cache) if kind == "whole" else _adapters(config, cache, options.rank)
        size = _copy_bytes(config, cache)
        with own_cluster(num_actors, max(10**8, 3 * size)):
            pushes = _measure_pool(config, cache, learner, sets, size, options.pushes)
        rows.append(_row(backend, num_actors, kind, pushes))
    return _report(config, rows, options)


def _learner(config: GeneratorConfig, cache: Path) -> Generator:
    """A model in this process, which the engines are compared with."""
    from rlrag.generation.backends.transformers import TransformersGenerator
    from rlrag.models.directories import resolve_model

    return TransformersGenerator(resolve_model(config.model, cache), config.dtype, "cpu")


def _whole(config: GeneratorConfig, cache: Path) -> tuple[GeneratorWeights, GeneratorWeights]:
    """Two sets of all weights: those on disk, and others near them."""
    import torch

    from rlrag.generation.weights import pack_weights
    from rlrag.models.directories import resolve_model

    parameters = _parameters(resolve_model(config.model, cache), config.dtype)
    random = torch.Generator().manual_seed(0)
    changed = {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=random).to(tensor.dtype))
        for name, tensor in parameters.items()
    }
    return pack_weights(parameters, version=1), pack_weights(changed, version=2)


def _adapters(
    config: GeneratorConfig, cache: Path, rank: int
) -> tuple[GeneratorWeights, GeneratorWeights]:
    """Two adapters as a learner publishes them, their weights moved as by training."""
    import torch

    from rlrag.config import GeneratorTrainingConfig
    from rlrag.models.directories import resolve_model
    from rlrag.training.learners.generator_model import TrainableGenerator

    training = GeneratorTrainingConfig(lora_rank=rank)
    learner = TrainableGenerator(resolve_model(config.model, cache), training, "cpu", seed=0)

    def moved(version: int) -> GeneratorWeights:
        random = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in learner.trainable_parameters().values():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=random))
        return learner.published_weights(version, torch.float32)

    return moved(1), moved(2)


def _copy_bytes(config: GeneratorConfig, cache: Path) -> int:
    """Bytes of the model in the number format of the engines."""
    import torch

    from rlrag.generation.backends.weight_layout import WeightLayout
    from rlrag.models.directories import resolve_model

    shapes = WeightLayout.of(resolve_model(config.model, cache)).shapes.values()
    return sum(map(math.prod, shapes)) * getattr(torch, config.dtype).itemsize


def _parameters(directory: Path, dtype: str) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def _measure_pool(
    config: GeneratorConfig,
    cache: Path,
    learner: Generator,
    sets: tuple[GeneratorWeights, GeneratorWeights],
    copy_bytes: int,
    num_pushes: int,
) -> Pushes:
    from rlrag.generation.build import open_generator
    from rlrag.generation.pool.client import PoolClient
    from rlrag.generation.weights import pack_weights

    start = time.perf_counter()
    pack_weights(sets[0].tensors, 1, sets[0].adapter_scale)
    hash_s = time.perf_counter() - start
    opened, _ = open_generator(config, "ray", cache)
    pool, num_actors = opened.inner, config.num_actors
    assert isinstance(pool, PoolClient)
    prompts, answers = _requests()
    try:
        pool.wait_until_ready()
        pool.score(prompts * num_actors, answers * num_actors)
        version = 0

        def push() -> float:
            nonlocal version
            version += 1
            chosen = replace(sets[version % 2], version=version)
            start = time.perf_counter()
            pool.load_weights(chosen)
            return time.perf_counter() - start

        with MemoryPeak() as memory:
            first_s = push()
            for _ in range(num_pushes):
                time.sleep(_SETTLE_S)
                push()
        later_s = []
        for _ in range(num_pushes):
            time.sleep(_SETTLE_S)
            later_s.append(push())
        learner.load_weights(sets[version % 2])
        ours, theirs = pool.score(prompts, answers), learner.score(prompts, answers)
        difference = max(abs(a.mean_logp - b.mean_logp) for a, b in zip(ours, theirs, strict=True))
    finally:
        opened.close()
    pushed = sum(tensor.nbytes for tensor in sets[0].tensors.values())
    return Pushes(copy_bytes, pushed, first_s, later_s, hash_s, memory.extra, difference)


def _requests() -> tuple[list[Prompt], list[tuple[int, ...]]]:
    """Sixteen prompts of 40 tokens, with three answer tokens each."""
    import numpy as np

    from rlrag.records import Prompt

    random = np.random.default_rng(0)
    prompts = [Prompt(tuple(map(int, random.integers(5, 500, size=40))), "", 1) for _ in range(16)]
    return prompts, [tuple(map(int, random.integers(5, 500, size=3))) for _ in prompts]


def _row(backend: str, num_actors: int, kind: str, pushes: Pushes) -> str:
    later = statistics.median(pushes.later_s)
    speed = num_actors * pushes.copy_bytes / later / 2**30
    return (
        f"| {backend} | {num_actors} | {kind} | {pushes.pushed_bytes / _MIB:,.1f} | "
        f"{pushes.copy_bytes / _MIB:,.1f} | {pushes.hash_s:.2f} | "
        f"{pushes.first_s:.2f} | **{later:.2f}** | {speed:.2f} | "
        f"**{pushes.extra / pushes.copy_bytes:.2f}** | {pushes.difference:.1e} |"
    )


def _report(config: GeneratorConfig, rows: Sequence[str], options: argparse.Namespace) -> str:
    lines = [
        "# Weight sync: a push into engines that go on running",
        "",
        f"{platform.machine()}, Python {platform.python_version()}, {config.model} in "
        f"{config.dtype}; made by `python -m benchmarks.speed.weight_sync`.",
        "",
        "A push ends when the last actor answers with the new weights. It has three parts: every "
        "engine checks names and shapes, one copy goes to Ray's object store piece by piece, every "
        "engine reads it there and copies it into its model. No engine restarts. Of a `whole` push "
        f"all weights travel; of an `adapter` push those of rank {options.rank} on every linear "
        "layer, in float32, which each engine merges into the weights on its disk, one tensor at a "
        "time. `push, s` is the "
        f"median of {options.pushes} pushes after the first. Extra memory is the peak of all "
        f"processes and the object store over {options.pushes + 1} pushes, less what there was "
        "before the first of them, in copies of the model; what stays in the object "
        f"store for actors that restart is part of it (target: at most {TARGET_COPIES}). The "
        "difference is the largest between the engines' mean log-probability a token "
        "and that of a transformers model in this process with the same weights.",
        "",
        "| back end | actors | push | pushed, MiB | model, MiB | hash, s | first push, s | push, s "
        "| model GiB/s, all actors | extra memory, copies of the model | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
