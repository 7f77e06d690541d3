"""Damaged files end in a value or in a documented error, near the seeds of `benchmarks.fuzz`."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from benchmarks import fuzz
from rlrag.errors import DataError

_NUM_INPUTS = 120


@pytest.fixture(scope="module")
def folder() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def targets(folder) -> dict[str, fuzz.Target]:
    (folder / "scratch").mkdir()
    return {target.name: target for target in fuzz.targets(folder / "scratch")}


@pytest.fixture(scope="module")
def elsewhere(folder) -> fuzz.OpenedElsewhere:
    return fuzz.OpenedElsewhere([folder])


def test_no_reader_is_surprised(targets, folder, elsewhere):
    for target in targets.values():
        found = fuzz.fuzz(target, _NUM_INPUTS, 1, folder, elsewhere)
        assert not found.findings, (target.name, found.findings[0])
        assert found.accepted + found.refused.total() == _NUM_INPUTS
        assert found.refused.total()


def reader(read) -> fuzz.Target:
    return fuzz.Target("made up", {"x.json": b'{"a": [1, 2], "b": "text"}'}, read)


def test_what_is_looked_for_is_found(folder, elsewhere, tmp_path):
    def crash(at: Path) -> None:
        if (at / "x.json").read_bytes() != b'{"a": [1, 2], "b": "text"}':
            raise KeyError("a")

    def look_elsewhere(at: Path) -> None:
        (tmp_path / "outside").write_text((at / "x.json").read_text(errors="replace"))

    def refuse(at: Path) -> None:
        if (at / "x.json").read_bytes() != b'{"a": [1, 2], "b": "text"}':
            raise DataError("no")

    crashed = fuzz.fuzz(reader(crash), 20, 0, folder, elsewhere)
    assert {problem for problem, _, _ in crashed.findings} == {"KeyError: 'a'"}
    led_away = fuzz.fuzz(reader(look_elsewhere), 5, 0, folder, elsewhere)
    assert led_away.findings[0][0] == f"open {tmp_path / 'outside'}"
    refused = fuzz.fuzz(reader(refuse), 20, 0, folder, elsewhere)
    assert refused.refused["DataError"] >= 15
    assert not refused.findings


def test_a_reader_that_hangs_is_found(folder, elsewhere, monkeypatch):
    def hang(at: Path) -> None:
        while (at / "x.json").read_bytes() != b'{"a": [1, 2], "b": "text"}':
            pass

    monkeypatch.setattr(fuzz, "_TIMEOUT_S", 0.1)
    found = fuzz.fuzz(reader(hang), 2, 0, folder, elsewhere)
    assert {problem for problem, _, _ in found.findings} == {"took longer than 0.1 s"}


def test_equal_seeds_give_equal_inputs():
    content = b'{"a": [1, 2], "b": {"c": "text"}}'
    for change in (fuzz.mutate, fuzz.mutate_json):
        made = [
            [change(content, rng) for _ in range(50)]
            for rng in (random.Random(3), random.Random(3))
        ]
        assert made[0] == made[1]
        assert len(set(made[0])) > 30
