"""What a run reserves in; whether the cluster that RAY_ADDRESS names, or this machine, has it, out.

The cluster is asked by a process of its own, which is ended when it does not come back: a client
of Ray that finds no answer waits for minutes and may end its process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from jobs.doctor import machine
from jobs.doctor.checks import Answer, failed, ok
from jobs.doctor.needs import Needs
from rlrag.config import RunConfig

_ROOT = Path(__file__).resolve().parents[2]
_CONNECT_TIMEOUT_S = 10.0
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)")
_HEAD = "node:__internal_head__"
_ADVICE = (
    "start one with `ray start --head`, correct RAY_ADDRESS, or unset it to run on this machine"
)


def is_elsewhere(config: RunConfig) -> bool:
    """Whether the run goes to a cluster, and this machine only launches it."""
    return config.training.launcher == "ray" and bool(os.environ.get("RAY_ADDRESS"))


def check_cluster(config: RunConfig, needs: Needs, timeout_s: float) -> Answer:
    """Whether Ray would have room for the run's actors and workers.

    Args:
        config: The run.
        needs: What it reserves.
        timeout_s: Longest wait for a cluster.
    """
    if config.training.launcher == "local":
        return ok("not needed: one process")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return _compare("this machine", {"CPU": machine.read_cpus()}, 1, needs)
    refusal = _connect(address)
    if refusal:
        return failed(f"cannot reach a Ray cluster at {address}: {refusal}", _ADVICE)
    return _ask(address, needs, timeout_s)


def _connect(address: str) -> str | None:
    """Why nobody takes a connection there; None where somebody does, or Ray finds the place."""
    place = _HOST_AND_PORT.fullmatch(address)
    if place is None:
        return None
    try:
        socket.create_connection((place[1], int(place[2])), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return str(error)
    return None


def _ask(address: str, needs: Needs, timeout_s: float) -> Answer:
    command = [sys.executable, "-m", "jobs.doctor.cluster_probe", address]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=_ROOT,
            timeout=timeout_s,
            env={**os.environ, "RAY_NUM_REDIS_GET_RETRIES": "3"},
        )
    except subprocess.TimeoutExpired:
        return failed(
            f"something at {address} takes connections but did not answer as a Ray cluster within "
            f"{timeout_s:g} s",
            _ADVICE,
        )
    if done.returncode:
        said = (done.stderr.strip() or "no reason was given").splitlines()[-1]
        return failed(f"cannot use a Ray cluster at {address}: {said}", _ADVICE)
    found = json.loads(done.stdout.splitlines()[-1])
    num_nodes = sum(name.startswith("node:") and name != _HEAD for name in found)
    return _compare(f"the cluster at {address}", {"CPU": 0, "GPU": 0, **found}, num_nodes, needs)


def _compare(place: str, found: Mapping[str, float], num_nodes: int, needs: Needs) -> Answer:
    """Ray waits without an error for what a cluster does not have."""
    if needs.nodes > num_nodes:
        return failed(
            f"the run asks for {needs.nodes} nodes, and {place} has {num_nodes}",
            "set --generator.placement and --training.worker-placement to spread, or add nodes",
        )
    cpus, gpus = found["CPU"], found.get("GPU")
    has = f"{place} has {cpus:g} CPU" + ("" if gpus is None else f" and {gpus:g} GPU")
    wanted = f"the run reserves {needs.cpus:g} CPU and {needs.gpus:g} GPU"
    if needs.cpus > cpus or (gpus is not None and needs.gpus > gpus):
        return failed(
            f"{wanted}, and {has}",
            "lower --generator.num-actors, --generator.cpus-per-actor, --training.num-workers or "
            "--training.worker-cpus (and the same of GPUs), or add nodes",
        )
    return ok(f"{has}; {wanted}")
