"""Log files of a run's processes.

The launching process writes `libraries.log`, each Ray Train worker `worker-RANK.log` and each actor
of the generator `generator-NUMBER.log`, so that no two append to one file on shared storage.
`rlrag/json_logs.py` says what a line is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlrag.json_logs import JsonLines, log_file, logging_to
from rlrag.runs.directory import RunDirectory


def run_name(directory: Path) -> str:
    """A run directory's name; that of a turn has its run's before it.

    Example:
        >>> run_name(Path("runs/nq")), run_name(Path("runs/nq/rounds/1-retriever"))
        ('nq', 'nq/1-retriever')
    """
    if directory.parent.name == "rounds":
        return f"{directory.parents[1].name}/{directory.name}"
    return directory.name


def note_step(step: int | None) -> None:
    """Name this step in the lines that this process writes from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonLines):
            handler.formatter.step = step


@contextmanager
def worker_log(run_dir: RunDirectory, rank: int) -> Iterator[None]:
    """Keep what a Ray Train worker says in the run's `logs/worker-RANK.log`."""
    actor = f"worker-{rank}"
    records = run_dir.read_metrics()
    step = int(records[-1]["step"]) if records else None
    with logging_to([log_file(run_dir.logs / f"{actor}.log", run_name(run_dir.path), actor, step)]):
        yield
