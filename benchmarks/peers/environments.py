"""Python environments for other libraries, each created from a pinned `requirements.txt`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rlrag.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]
_MARKER = "installed.sha256"
_TIMEOUT_S = 1800


def interpreter(requirements: Path, folder: Path) -> Path:
    """Python of the environment of `requirements` below `folder`, made when it is missing.

    Peers whose requirements are the same file share one. An environment whose file has changed, or
    whose installation was stopped, is made anew.

    Raises:
        SetupError: when uv is missing or an installation fails, with its last line.
    """
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    directory = folder.absolute() / requirements.parent.name
    python = directory / "bin" / "python"
    marker = directory / _MARKER
    if marker.is_file() and marker.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    uv = _uv()
    _run([uv, "venv", "--quiet", "--python", sys.executable, str(directory)], {})
    command = [uv, "pip", "install", "--quiet", "--python", str(python)]
    # Where two peers and this project have a package in common, all have the same version of it.
    command += ["--constraint", "constraints.txt", "--override", "overrides.txt"]
    _run([*command, "--requirements", str(requirements)], torch_source(os.environ, _pip_wheels()))
    marker.write_text(wanted)
    return python


def torch_source(environment: Mapping[str, str], configured: str) -> dict[str, str]:
    """Where uv finds the CPU build of torch, as the Makefile chooses it.

    `configured` is the folder of wheels in pip's configuration, empty where there is none.
    """
    wheels = environment.get("PIP_FIND_LINKS") or configured
    return {"UV_FIND_LINKS": wheels} if wheels else {"UV_TORCH_BACKEND": "cpu"}


def _pip_wheels() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return asked.stdout.strip()  # pip fails where nothing is configured, or is not there itself


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise SetupError(
            "uv, which creates the environments of other libraries, is not installed; `make "
            "setup` installs it, or run `pip install uv`"
        )
    return found


def _run(command: list[str], variables: Mapping[str, str]) -> None:
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"{' '.join(command[1:3])} took more than {_TIMEOUT_S} s; look at the connection to "
            "the package index"
        ) from error
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["it said nothing"]
        raise SetupError(f"{' '.join(command[1:3])} failed: {said[-1].strip()}")
