"""`ray job submit` of the training program to a head node, and a head node that is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from training_program import (
    NUM_STEPS,
    ROOT,
    Family,
    TrainingProgram,
    quiet_environment,
    read_metrics,
    tiny_flags,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BIN = Path(sys.executable).parent
JOB_TIMEOUT_S = 600.0
HEAD = """
import sys, ray
ray.init(
    num_cpus=2,
    include_dashboard=True,
    dashboard_host="127.0.0.1",
    dashboard_port=int(sys.argv[1]),
    object_store_memory=200 * 2**20,
    _temp_dir=sys.argv[2],
)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    # Jobs are sent over HTTP, which would need the cluster's token.
    return quiet_environment(
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", RAY_AUTH_MODE="disabled"
    )


@pytest.fixture
def head(environment, unused_port) -> Iterator[str]:
    """HTTP address of a head node with two CPUs."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path must stay short
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(unused_port), folder],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    family = Family(process.pid)
    try:
        assert process.stdout.readline() == "ready\n"
        yield f"http://127.0.0.1:{unused_port}"
        family.look()
        process.stdin.close()
        process.wait(60)
    finally:
        family.end()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_trains_on_the_cluster(head, environment, tmp_path):
    run_dir = tmp_path / "run"
    command = [BIN / "ray", "job", "submit", "--address", head, "--working-dir", ROOT, "--"]
    command += ["python", "-m", "jobs.train", "quickstart", *tiny_flags(tmp_path)]
    command += ["--run-dir", run_dir, "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_TIMEOUT_S,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "succeeded" in said
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(NUM_STEPS + 1))
    assert json.loads((run_dir / "evaluation.json").read_text())["num_questions"] == 8
    assert (run_dir / "bundle" / "bundle.json").is_file()


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
