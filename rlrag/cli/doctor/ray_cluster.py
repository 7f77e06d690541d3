"""Checks of the Ray cluster at RAY_ADDRESS, or of this machine when it is unset.

The cluster is asked by a process of its own, which is ended when it does not come back: a client
of Ray that finds no answer waits for minutes and may end its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from rlrag.cli.cluster import is_token_mode
from rlrag.cli.doctor import machine
from rlrag.cli.doctor.checks import Answer, failed, ok, warning
from rlrag.config import RunConfig
from rlrag.errors import SetupError
from rlrag.training.needs import Needs

_ROOT = Path(__file__).resolve().parents[3]
_HEAD = "node:__internal_head__"
_TOKEN_ADVICE = (
    "Ray's ports listen on every interface: start it with RAY_AUTH_MODE=token, or block "
    "access from untrusted networks (docs/how-to/clusters.md)"
)


Ask = Callable[[str, Mapping[str, str]], Mapping[str, float]]
"""A cluster's address and more variables in; its resources by name, or a `SetupError`, out."""


def is_elsewhere(config: RunConfig) -> bool:
    """Whether the run goes to a cluster, and this machine only launches it."""
    return config.training.launcher == "ray" and bool(os.environ.get("RAY_ADDRESS"))


def check_cluster(
    config: RunConfig, needs: Needs, timeout_s: float, ask: Ask | None = None
) -> Answer:
    """Whether Ray would have room for the run's actors and workers, and asks for a token.

    Args:
        config: The run.
        needs: What it reserves.
        timeout_s: Longest wait for a cluster.
        ask: How to ask one, when not by joining it.

    Raises:
        SetupError: when the cluster cannot be joined.
    """
    if config.training.launcher == "local":
        return ok("not needed: one process")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ask = ask or partial(_ask, timeout_s)
        found = ask(address, {})
        num_nodes = sum(name.startswith("node:") and name != _HEAD for name in found)
        place, found = f"the cluster at {address}", {"CPU": 0, "GPU": 0, **found}
        answer = _compare(place, found, num_nodes, needs)
        without_token = not is_token_mode() or _takes_anyone(ask, address)
    else:
        answer = _compare("this machine", {"CPU": machine.read_cpus()}, 1, needs)
        # Ray turns the token on for a cluster that a run starts itself, unless this is set.
        without_token = "RAY_AUTH_MODE" in os.environ and not is_token_mode()
    if answer.status == "ok" and without_token:
        open_to_all = "whoever reaches Ray's ports can run code as its user: it asks for no token"
        return warning(f"{answer.found}; {open_to_all}", _TOKEN_ADVICE)
    return answer


def _takes_anyone(ask: Ask, address: str) -> bool:
    """Whether the cluster, which can be joined with a token, can be without one."""
    try:
        ask(address, {"RAY_AUTH_MODE": "disabled"})
    except SetupError:
        return False
    return True


def _ask(timeout_s: float, address: str, variables: Mapping[str, str]) -> Mapping[str, float]:
    """The resources of a cluster by name.

    Raises:
        SetupError: with what the asking process said when it could not.
    """
    command = [sys.executable, "-m", "rlrag.cli.doctor.cluster_probe", address]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=_ROOT,
            timeout=timeout_s,
            env={**os.environ, **variables},
        )
    except subprocess.TimeoutExpired as error:
        raise SetupError(
            f"{address} accepts connections but did not answer as a Ray cluster within "
            f"{timeout_s:g} s; correct RAY_ADDRESS, or unset it to run on this machine"
        ) from error
    if done.returncode:
        said = (done.stderr.strip() or "error: no reason was given").splitlines()[-1]
        raise SetupError(said.removeprefix("error: "))
    resources: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return resources


def _compare(place: str, found: Mapping[str, float], num_nodes: int, needs: Needs) -> Answer:
    """Ray waits without an error for what a cluster does not have."""
    if needs.nodes > num_nodes:
        return failed(
            f"the run needs {needs.nodes} nodes, but {place} has {num_nodes}",
            "set --generator.placement and --training.worker-placement to spread, or add nodes",
        )
    cpus, gpus = found["CPU"], found.get("GPU")
    has = f"{place} has {cpus:g} CPU" + ("" if gpus is None else f" and {gpus:g} GPU")
    wanted = f"the run reserves {needs.cpus:g} CPU and {needs.gpus:g} GPU"
    if needs.cpus > cpus or (gpus is not None and needs.gpus > gpus):
        return failed(
            f"{wanted}, but {has}",
            "lower --generator.num-actors, --generator.cpus-per-actor, --training.num-workers "
            "or --training.worker-cpus (likewise for GPUs), or add nodes",
        )
    return ok(f"{has}; {wanted}")
