"""A recipe and a run directory in; the evaluation of a finished run out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMEOUT_S = 3 * 3600


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
