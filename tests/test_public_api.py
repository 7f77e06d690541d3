"""What users import changes only on purpose."""

from __future__ import annotations

import difflib

import public_api


def test_public_names_and_parameters_are_those_that_were_agreed():
    agreed = public_api.FILE.read_text().splitlines()
    difference = [
        line
        for line in difflib.unified_diff(agreed, public_api.lines(), lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert not difference, (
        "the public API changed; if that is meant, say so in CHANGELOG.md and run "
        "`python tests/public_api.py`:\n" + "\n".join(difference)
    )
