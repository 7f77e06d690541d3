"""Finished runs and temporary Ray clusters, shared by several benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TIMEOUT_S = 3 * 3600


@contextmanager
def own_cluster(num_cpus: int, object_store_memory: int = 2 * 10**8) -> Iterator[None]:
    """A Ray cluster on this machine with at least two CPUs; memory in bytes."""
    import ray

    ray.init(
        "local",
        num_cpus=max(2, num_cpus),
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=object_store_memory,
    )
    try:
        yield
    finally:
        ray.shutdown()


def finished_run(
    recipe: str, run_dir: Path, seed: int, cache_dir: str | None, flags: Sequence[str] = ()
) -> tuple[dict[str, Any], float | None]:
    """The evaluation of a run, and the minutes that it took if it was run here.

    A run that is finished is taken as it is; one that was stopped continues.
    """
    minutes = None
    if not (run_dir / "evaluation.json").is_file():
        command = [sys.executable, "-m", "jobs.train", recipe, "--run-dir", str(run_dir)]
        command += ["--seed", str(seed), *flags]
        if cache_dir:
            command += ["--cache-dir", cache_dir]
        started = time.monotonic()
        subprocess.run(command, check=True, timeout=_TIMEOUT_S)
        minutes = (time.monotonic() - started) / 60
    return json.loads((run_dir / "evaluation.json").read_text()), minutes


def evaluation_with(run_dir: Path, num_passages: int) -> dict[str, Any]:
    """The comparison of a run's bundle with so many passages in context, made once.

    With as many as the run trained for it is the run's own.
    """
    config = json.loads((run_dir / "config.json").read_text())
    path = run_dir / f"evaluation-{num_passages}.json"
    if num_passages == config["environment"]["num_selected"]:
        path = run_dir / "evaluation.json"
    if not path.exists():
        data = config["data"]
        command = [sys.executable, "-m", "jobs.evaluate", "--bundle", str(run_dir / "bundle")]
        command += ["--corpus", data["corpus"], "--questions", data["eval_questions"]]
        command += ["--docs-in-context", str(num_passages), "--output", str(path)]
        subprocess.run(command, check=True, timeout=_TIMEOUT_S)
    found: dict[str, Any] = json.loads(path.read_text())
    return found
