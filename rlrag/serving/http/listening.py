"""The address that the service listens on, and the message that it is ready.

`serve run` would start Ray Serve itself, at its default address. This does it first, so that an
address can be chosen, one that is taken is named, and the terminal hears when the service is ready.
"""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import click
import ray
from ray import serve as ray_serve
from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from rlrag.errors import ConfigError, SetupError

_POLL_S = 0.5
_ASK_TIMEOUT_S = 5.0


def running_command() -> click.Context | None:
    """`serve run` with its flags, where it is what calls; None elsewhere."""
    context = click.get_current_context(silent=True)
    return context if context is not None and context.command.name == "run" else None


def listen(command: click.Context, host: str | None, port: int | None) -> str:
    """Start Ray Serve at an address, or join the one that runs; returns its URL.

    Args:
        command: `serve run`, whose flags say which Ray cluster to join.
        host: Address to listen on; Ray Serve's default when unset.
        port: Port to listen on; Ray Serve's default when unset.

    Raises:
        SetupError: when the address is taken, or Ray Serve listens elsewhere already.
    """
    flags = command.params
    if not ray.is_initialized():
        ray.init(
            address=flags["address"],
            namespace="serve",
            runtime_env=parse_runtime_env_args(
                runtime_env=flags["runtime_env"],
                runtime_env_json=flags["runtime_env_json"],
                working_dir=flags["working_dir"],
            ),
        )
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        return url_of_running(client.http_config, host, port)
    given = {"host": host, "port": port}
    options = HTTPOptions.model_validate({k: v for k, v in given.items() if v is not None})
    if not str(flags["address"]).startswith("ray://"):  # that cluster is on another machine
        check_free(str(options.host), options.port)
    ray_serve.start(http_options=options)
    return _url(options)


def url_of_running(running: HTTPOptions, host: str | None, port: int | None) -> str:
    """The URL of a Ray Serve that runs, where it is the one asked for.

    Raises:
        SetupError: when it listens elsewhere.
    """
    if host not in (None, running.host) or port not in (None, running.port):
        asked = f"{host or running.host}:{port or running.port}"
        raise SetupError(
            "Ray Serve already runs on this cluster and listens on "
            f"{running.host}:{running.port}, not on {asked}; leave out host and port to add the "
            "service there, or stop the running one with `serve shutdown`"
        )
    return _url(running)


def check_free(host: str, port: int) -> None:
    """Refuse an address on which this machine cannot listen.

    Raises:
        SetupError: saying why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray Serve's proxy does
        try:
            listener.bind((host, port))
            listener.listen(1)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "another program listens there" if taken else error.strerror or str(error)
            raise SetupError(
                f"cannot listen on {host}:{port}: {why}; give another address, such as "
                f"port={port + 1 if port < 65_535 else port - 1}"
            ) from error


def say_when_ready(command: click.Context, url: str, bundle: str) -> None:
    """Print one line on standard error once the application answers questions.

    A thread waits for it and ends with the process: `serve run` returns when Ray has deployed the
    application, and the bundle is still to be loaded and checked then.
    """
    name, prefix = command.params["name"], (command.params["route_prefix"] or "").rstrip("/")
    since, place = time.time(), url + prefix

    def wait() -> None:
        while not _is_deployed(name, since) or not _is_ready(place):
            time.sleep(_POLL_S)
        said = f"ready at {place} with the bundle {bundle}; the page for browsers is there too"
        print(said, file=sys.stderr, flush=True)

    threading.Thread(target=wait, name="ready", daemon=True).start()


def _is_deployed(name: str, since: float) -> bool:
    """Whether the application runs as deployed after this moment; an older one may answer."""
    try:
        found: Any = ray_serve.status().applications.get(name)
    except (ray.exceptions.RayError, RayServeException):  # Ray Serve is ending
        return False
    running = found is not None and found.status == ApplicationStatus.RUNNING
    return running and found.last_deployed_time_s >= since


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=_ASK_TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _url(options: HTTPOptions) -> str:
    scheme = "https" if options.ssl_keyfile else "http"
    host = f"[{options.host}]" if ":" in str(options.host) else options.host
    return f"{scheme}://{host}:{options.port}"


def refuse_address(host: str | None, port: int | None) -> None:
    """Refuse an address where `serve run` is not what starts Ray Serve.

    Raises:
        ConfigError: when there is one.
    """
    given = [f"{name}={value}" for name, value in (("host", host), ("port", port)) if value]
    if given:
        raise ConfigError(
            f"{' '.join(given)} works only with `rlrag serve` and `serve run`; for `serve "
            "deploy` set host and port under http_options, in Python pass them to serve.start"
        )
