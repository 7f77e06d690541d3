"""Every pinned package has a licence that somebody has read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "docs" / "package_licences.py"


def test_no_pinned_package_has_a_licence_that_nobody_has_read():
    spec = importlib.util.spec_from_file_location("package_licences", PATH)
    assert spec is not None
    assert spec.loader is not None
    package_licences = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package_licences)
    found = package_licences.packages()
    assert len(found) > 200
    unread = [(package.name, package.licence) for package in found if not package.is_clear]
    assert not unread, "read their licences and add them to REVIEWED in docs/package_licences.py"
    pinned = package_licences.CONSTRAINTS.read_text()
    stale = [name for name in package_licences.REVIEWED if f"\n{name}==" not in pinned]
    assert not stale
