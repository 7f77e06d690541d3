"""Damaged files end in a value or a documented error, as in `benchmarks.faults.fuzz`."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import fuzz
from rlrag.errors import DataError

SEED = b'{"a": [1, 2], "b": "text"}'
_NUM_INPUTS = 100


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> fuzz.OpenedElsewhere:
    return fuzz.OpenedElsewhere([tmp_path_factory.mktemp("allowed")])


@pytest.fixture
def reading(elsewhere, tmp_path_factory):
    allowed = next(tmp_path_factory.getbasetemp().glob("allowed*"))

    def make(read) -> fuzz.Reading:
        return fuzz.Reading(fuzz.Target("made up", {"x.json": SEED}, read), allowed, elsewhere)

    return make


def fuzzer(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, since the fuzzer changes how modules are imported."""
    pytest.importorskip("atheris", reason="atheris has no package for this platform")
    command = [sys.executable, "-m", "benchmarks.faults.fuzz", "--inputs", str(_NUM_INPUTS), *words]
    root = Path(fuzz.__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=root)


def test_a_name_that_is_no_target_is_refused():
    done = fuzzer("--targets", "questions", "no such")
    assert done.returncode == 2
    assert "--targets has 'no such', which is unknown; choose from: " in done.stderr


def test_no_reader_is_surprised(tmp_path):
    done = fuzzer("--seed", "1", "--output", str(tmp_path / "fuzz.md"))
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "fuzz.md").read_text().splitlines()[6:]
    assert len(rows) == 9
    for row in rows:
        _, inputs, accepted, refused, findings, _ = (cell.strip() for cell in row[2:-2].split("|"))
        assert (int(inputs), findings) == (_NUM_INPUTS, "0")
        assert int(accepted) + int(refused) == _NUM_INPUTS
        assert int(refused) > 0, row


def test_an_exception_of_another_class_is_found(reading):
    def crash(at: Path) -> None:
        if (at / "x.json").read_bytes() != SEED:
            raise KeyError("a")

    crashed = reading(crash)
    crashed.read(b"\x00{}")
    crashed.read(b"\x00" + SEED)
    assert crashed.found.findings == [("KeyError: 'a'", "x.json", b"{}")]
    assert crashed.found.accepted == 1


def test_a_file_outside_is_found(reading, tmp_path):
    def look_elsewhere(at: Path) -> None:
        (tmp_path / "outside").write_text((at / "x.json").read_text(errors="replace"))

    led_away = reading(look_elsewhere)
    led_away.read(b"\x00{}")
    assert led_away.found.findings[0][0] == f"open {tmp_path / 'outside'}"


def test_a_documented_error_is_none(reading):
    def refuse(at: Path) -> None:
        if (at / "x.json").read_bytes() != SEED:
            raise DataError("no")

    refused = reading(refuse)
    refused.read(b"")
    refused.read(b"\x07[]")
    assert refused.found.refused == {"DataError": 2}
    assert not refused.found.findings


def test_a_reader_that_hangs_is_found(reading, monkeypatch):
    def hang(at: Path) -> None:
        while (at / "x.json").read_bytes() != SEED:
            pass

    monkeypatch.setattr(fuzz, "_TIMEOUT_S", 0.1)
    hanging = reading(hang)
    hanging.read(b"\x00{}")
    assert [problem for problem, _, _ in hanging.found.findings] == ["took longer than 0.1 s"]


def test_values_are_put_in_place_of_others():
    content = b'{"a": [1, 2], "b": {"c": "text"}}'
    made = [fuzz.other_value(content, random.Random(seed)) for seed in range(50)]
    assert made == [fuzz.other_value(content, random.Random(seed)) for seed in range(50)]
    assert len(set(made)) > 25
    assert fuzz.other_value(b"{", random.Random(0)) is None
    assert fuzz.other_value(b"[]", random.Random(0)) is None
