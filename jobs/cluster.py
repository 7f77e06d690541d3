"""A launcher's name in; a reachable Ray cluster, or none, for the length of a block out."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlrag.errors import SetupError

_OBJECT_STORE_BYTES = 512 * 2**20
_WORKER_START_TIMEOUT_S = "300"
_PROBE_TIMEOUT_S = 10.0
_CONNECT_TRIES = "3"


@contextmanager
def cluster(launcher: str) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine and end it after.

    A cluster of our own is started a second time when the first fails: on a busy machine its
    processes may wait for each other in vain. Nothing but its log tells that Ray turns token
    authentication on for it, which this leaves as it is.

    Raises:
        SetupError: when Ray is missing, the cluster does not answer or cannot be started.
    """
    if launcher == "local":
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Ray Train's default of 60 s is too short for a loaded machine to import torch.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKER_START_TIMEOUT_S)
    if address:
        _check_somebody_listens(address)
        # A try takes 40 s and Ray makes 20; it reads the number when it is imported.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _CONNECT_TRIES)
    try:
        import ray
    except ImportError as error:
        raise SetupError(
            "training.launcher 'ray' needs Ray; install the extra 'vllm-cpu' or 'vllm', or use "
            "--training.launcher local"
        ) from error
    # Its import gave Ray's logger the terminal; it belongs where all libraries log.
    ray_logger = logging.getLogger("ray")
    ray_logger.handlers, ray_logger.propagate = [], True
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise SetupError(_unreachable(address, error)) from error
    else:
        # Nobody drains the one node of our own cluster, so nothing need watch for it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        own: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        start_twice(lambda: ray.init(address="local", **common, **own), ray.shutdown)
    try:
        yield
    finally:
        ray.shutdown()


def start_twice(start: Callable[[], object], end: Callable[[], object]) -> None:
    """Call `start`; when it fails, say so on stderr, call `end` and `start` once more.

    Processes of the failed start that `end` does not know of end with this process.

    Raises:
        SetupError: when the second start fails too.
    """
    try:
        start()
    except Exception as first:  # noqa: BLE001 - Ray raises the bare class when a node is late
        print(
            f"Ray did not start on this machine ({_one_line(first)}); trying once more",
            file=sys.stderr,
            flush=True,
        )
        end()
        try:
            start()
        except Exception as error:
            end()
            raise SetupError(
                f"cannot start Ray on this machine, tried twice: {_one_line(error)}; wait until "
                "the machine is less busy, look into /tmp/ray/session_latest/logs for the reason, "
                "or use --training.launcher local"
            ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_somebody_listens(address: str) -> None:
    """Refuse a `host:port` that takes no connection; Ray would go on asking for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise SetupError(_unreachable(address, error)) from error


def _unreachable(place: str, error: Exception) -> str:
    return (
        f"cannot reach a Ray cluster at {place}: {error}; start one with 'ray start --head', "
        "correct RAY_ADDRESS, or unset it to run on this machine"
    )
