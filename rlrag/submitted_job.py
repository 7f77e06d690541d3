"""Resolves and checks file paths in a job submitted with `ray job submit`.

`ray job submit --working-dir .` uploads that directory without what its .gitignore and .rayignore
name. The program starts in a copy of it, without the variables of the submitting shell.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlrag.errors import ConfigError

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable, really of this name, in which Ray tells a submitted program of its job."""


def is_submitted() -> bool:
    """Whether this is the program of a submitted job."""
    return _JOB_CONFIG in os.environ


def where_to_look(path: Path | str, otherwise: str = "check the path") -> str:
    """What to do about a file that cannot be read; `otherwise` where no upload is to blame."""
    if not is_below_upload(path) or os.path.exists(os.path.expanduser(path)):
        return otherwise
    return (
        "it is looked for in what was uploaded with the job, which lacks what .gitignore and "
        ".rayignore name, such as runs/: give an absolute path that every node sees"
    )


def check_outlives_job(flag: str, path: Path | str) -> None:
    """Refuse to write where Ray deletes what was written.

    Raises:
        ConfigError: when `path`, which is `flag`'s, lies in what was uploaded with the job.
    """
    if is_below_upload(path):
        raise ConfigError(
            f"{flag} {path} is inside the uploaded copy of the working directory, which Ray "
            "deletes after the job; give an absolute path that every node sees"
        )


def is_below_upload(path: Path | str) -> bool:
    """Whether a path lies in the copy of a working directory that came with a job."""
    here = Path.cwd()  # the copy, where a job has one
    # Unlike Path.expanduser, this leaves the `~` of an unknown user where it is.
    if not is_submitted() or not (here / os.path.expanduser(path)).is_relative_to(here):
        return False
    job = json.loads(os.environ[_JOB_CONFIG])
    return bool((job.get("runtime_env") or {}).get("working_dir"))
