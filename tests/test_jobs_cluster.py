"""The training program and a head node that is not there."""

from __future__ import annotations

import pytest
from training_program import (
    TrainingProgram,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_an_unreachable_cluster_is_named_in_bounded_time(tmp_path, unused_port):
    address = f"127.0.0.1:{unused_port}"
    flags = ["--generator.backend", "transformers"]
    program = TrainingProgram(tmp_path, flags, tmp_path / "cache", {"RAY_ADDRESS": address})
    try:
        assert program.wait(240) == 4, program.stderr()
    finally:
        program.end()
    last = program.stderr().splitlines()[-1]
    assert last.startswith(f"error: cannot reach a Ray cluster at {address}: ")
    assert "RAY_ADDRESS" in last
