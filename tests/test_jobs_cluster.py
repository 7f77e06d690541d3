"""The training program on clusters: one that is not there, one that starts late, a real one."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError
from training_program import tiny_flags

from benchmarks.faults.programs import (
    ROOT,
    Family,
    TrainingProgram,
    quiet_environment,
    read_metrics,
)
from rlrag.cli import cluster
from rlrag.cli.cluster import start_twice
from rlrag.errors import SetupError


class LateCluster:
    """Starts only after some failures."""

    def __init__(self, num_failures: int) -> None:
        self._left = num_failures
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")
        if self._left:
            self._left -= 1
            # The class and the words of Ray 2.60 when a raylet does not register in time.
            raise Exception("The current node timed out\nduring startup.")

    def end(self) -> None:
        self.calls.append("end")


def test_a_cluster_that_starts_is_started_once(capsys):
    found = LateCluster(0)
    start_twice(found.start, found.end)
    assert found.calls == ["start"]
    assert capsys.readouterr().err == ""


def test_a_cluster_that_fails_once_is_cleared_away_and_started_again(capsys):
    found = LateCluster(1)
    start_twice(found.start, found.end)
    assert found.calls == ["start", "end", "start"]
    assert capsys.readouterr().err == (
        "Ray did not start on this machine (Exception: The current node timed out during "
        "startup.); trying once more\n"
    )


def test_a_cluster_that_fails_twice_is_an_error_that_says_what_to_do(capsys):
    found = LateCluster(2)
    with pytest.raises(
        SetupError, match=r"in two attempts: Exception: The .* startup\.; wait until"
    ):
        start_twice(found.start, found.end)
    assert found.calls == ["start", "end", "start", "end"]
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_path_too_long_for_sockets_is_not_tried_twice(capsys):
    """In the words of the installed Ray."""
    from ray._private.utils import validate_socket_filepath

    def start() -> None:
        calls.append("start")
        validate_socket_filepath("/long" * 30 + "/sockets/plasma_store")

    calls: list[str] = []
    with pytest.raises(SetupError, match=r"paths are too long.*; set RAY_TMPDIR to a short path"):
        start_twice(start, lambda: calls.append("end"))
    assert calls == ["start", "end"]
    assert "trying once more" not in capsys.readouterr().err


def test_memory_that_runs_out_is_one_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(cluster, "connect", lambda address: None)
    error = OutOfMemoryError("7 worker(s) were killed")
    with (
        pytest.raises(SetupError, match="ran out of memory, and Ray killed"),
        cluster.cluster("ray"),
    ):
        raise error


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
    assert "once more" not in program.stderr()


NUM_TRIES = 3
ANSWER_TIMEOUT_S = 180.0
SMALL_JOB_TIMEOUT_S = 300.0
JOB_TIMEOUT_S = 1200.0
RAY = str(Path(sys.executable).with_name("ray"))

# Ends with the test, also when that is killed: the end of its input tells.
_UNTIL_INPUT_ENDS = """
import subprocess, sys, threading

head = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

def end():
    sys.stdin.read()
    head.terminate()

threading.Thread(target=end, daemon=True).start()
sys.exit(head.wait())
"""


def head_command(folder: Path, dashboard_port: int) -> list[str]:
    """Every port is its own: with Ray's fixed ones two clusters on a machine get no job agent."""
    options = {
        "node-ip-address": "127.0.0.1",
        "port": 0,
        "temp-dir": folder / "ray",
        "num-cpus": 2,
        "object-store-memory": 256 * 2**20,
        "include-dashboard": "true",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [RAY, "start", "--head", "--block", "--disable-usage-stats", *flags]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class HeadNode:
    """A head node with a dashboard, in a process of its own; it lies in `folder`.

    It asks for a token, which lies in a home of its own.
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        self.environment = quiet_environment(
            RAY_AUTH_MODE="token",
            RAY_API_SERVER_ADDRESS=self.address,
            HOME=str(folder),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )
        made = subprocess.run(
            [RAY, "get-auth-token", "--generate"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
            check=True,
        )
        self._token = made.stdout.strip()
        assert self._token == (folder / ".ray" / "auth_token").read_text()
        self._said = folder / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _UNTIL_INPUT_ENDS, *head_command(folder, port)],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._family = Family(self._process.pid)

    def why_not_ready(self) -> str:
        """Wait until it takes jobs; what went wrong when it does not, else nothing."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return f"no answer from {self.address}: {self._said.read_text()[-3000:]}"
            time.sleep(0.5)
        done = self.run("ray job submit -- true", SMALL_JOB_TIMEOUT_S)
        return f"{done.args}: {done.stdout[-3000:]}" if done.returncode else ""

    def _answers(self) -> bool:
        try:
            headers = {"Authorization": f"Bearer {self._token}"}
            asked = urllib.request.Request(f"{self.address}/api/version", headers=headers)
            with urllib.request.urlopen(asked, timeout=5) as answer:
                return "ray_version" in json.load(answer)
        except (urllib.error.URLError, OSError):
            return False

    def run(
        self, command: str, timeout_s: float, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """What a shell makes of it, with exit code 124 when it does not end in time."""
        try:
            return subprocess.run(
                ["bash", "-c", command],
                cwd=ROOT,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            said = f"no end in {timeout_s:g} s: {error.output!r}"
            return subprocess.CompletedProcess(command, 124, said)

    def end(self) -> None:
        """End it and all that it started."""
        self._family.look()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._family.end()
            self._process.wait()


@pytest.fixture
def head_node() -> Iterator[HeadNode]:
    """One that takes jobs. On a busy machine it may start too late: three tries."""
    said = []
    for _ in range(NUM_TRIES):
        # Ray's sockets lie below; their paths may not be longer than 107 characters.
        with tempfile.TemporaryDirectory(prefix="h", ignore_cleanup_errors=True) as folder:
            head = HeadNode(Path(folder))
            try:
                said.append(head.why_not_ready())
                if not said[-1]:
                    yield head
                    return
            finally:
                head.end()
    pytest.fail("\n\n".join(["no head node that takes jobs:", *said]))


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_the_job_of_the_readme_trains_on_a_cluster_that_asks_for_a_token(tmp_path, head_node):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^ray job submit .*$", text, re.M)
    flags = dict(zip(*[iter(tiny_flags(tmp_path)[1:])] * 2, strict=True))
    # The recipe finds them in the folder that the submitting shell names.
    for name, target in (
        ("--data.corpus", "corpus/nq.jsonl.gz"),
        ("--data.train-questions", "questions/nq.train.jsonl"),
        ("--data.eval-questions", "questions/nq.dev.jsonl"),
    ):
        place = tmp_path / "the data" / target
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(flags.pop(name), place)
    flags |= {"--training.num-epochs": "1", "--evaluation.systems": "retriever_order trained"}
    done = head_node.run(
        f"{command.replace('/shared', str(tmp_path))} --training.loggers "
        + " ".join(f"{name} {value}" for name, value in flags.items()),
        JOB_TIMEOUT_S,
        RLRAG_DATA_DIR=str(tmp_path / "the data"),
    )
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    run_dir = tmp_path / "nq"
    assert [line["step"] for line in read_metrics(run_dir)] == [0, 1, 2, 3, 4, 5]
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["num_questions"] == 8
    assert evaluation["systems"].keys() == {"retriever_order", "trained"}
    assert (run_dir / "bundle" / "bundle.json").is_file()
