"""Builds the Ray Serve application from the arguments of `serve run`.

serve run serve.app:build bundle=runs/quickstart/bundle
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import click
import ray
from ray.serve import Application

from rlrag.bundle_files import read_bundle
from rlrag.errors import ConfigError, RlragError
from rlrag.serving.http.listening import listen, refuse_address, running_command, say_when_ready
from rlrag.serving.http.proxy import PROXY_VARIABLES
from rlrag.serving.settings import PartSettings, ServeSettings, parse_settings

_ONGOING_PER_PART = 1000  # the HTTP side bounds what is under way
_HEALTH_PERIOD_S = 2.0  # a replica that has died is missed no later
_HEALTH_TIMEOUT_S = 60.0


class NotServableError(click.ClickException, RlragError):
    """There is no service for these arguments. Ray's command line shows the message alone."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as every program of this project does."""
        click.echo(f"error: {self.message}", file=file, err=True)


def build(arguments: Mapping[str, Any]) -> Application:
    """The service as `arguments` describe it; see `rlrag.serving.settings` for all of them.

    Where no Ray cluster runs yet, the one that this process starts serves as
    `rlrag.serving.http.proxy` says. Below `serve run` it listens where the settings say, and tells
    when it is ready.

    Raises:
        NotServableError: when a setting is unknown, missing or impossible, the bundle is missing or
            damaged, or nothing can listen at the address.
    """
    try:
        settings = _located(parse_settings(arguments))
        application = _application(settings)
        command = running_command()
        if command is None:
            refuse_address(settings.host, settings.port)
        if not ray.is_initialized():
            for name, value in PROXY_VARIABLES.items():
                os.environ.setdefault(name, value)
        if command is not None:
            url = listen(command, settings.host, settings.port)
            say_when_ready(command, url, settings.bundle)
    except RlragError as error:
        raise NotServableError(str(error)) from error
    return application


def _application(settings: ServeSettings) -> Application:
    from rlrag.serving import deployments

    # To a type checker a decorated class is still the class.
    decorated: Any = deployments
    read_bundle(Path(settings.bundle)).check_code_to_answer(settings.allow_code)
    limits = settings.limits
    registry = decorated.RegistryReplica.options(
        user_config={"bundle": settings.bundle},
        max_ongoing_requests=_ONGOING_PER_PART,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        logging_config={"enable_access_log": False},  # each replica reports twice a second
    ).bind(settings)
    parts = [
        replica.options(**_options(part)).bind(settings)
        for replica, part in (
            (decorated.RetrieverReplica, settings.retriever),
            (decorated.SelectorReplica, settings.selector),
            (decorated.GeneratorReplica, _without_engine(settings.generator)),
        )
    ]
    # Ray Serve's own bound stands behind that of the HTTP side, which answers in its own words.
    most = 4 * (limits.max_in_flight + limits.max_waiting)
    ingress: Application = decorated.IngressReplica.options(
        **_options(settings.ingress) | {"max_ongoing_requests": most, "max_queued_requests": most}
    ).bind(settings, registry, *parts)
    return ingress


def _without_engine(generator: PartSettings) -> PartSettings:
    """A generator replica computes nothing itself: its engines reserve what they need."""
    return generator.model_copy(update={"num_cpus": 0.1, "num_gpus": 0})


def _options(part: PartSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": part.num_cpus, "num_gpus": part.num_gpus},
        "max_ongoing_requests": _ONGOING_PER_PART,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
    }
    if part.max_replicas > part.num_replicas:
        options["autoscaling_config"] = {
            "min_replicas": part.num_replicas,
            "max_replicas": part.max_replicas,
        }
    else:
        options["num_replicas"] = part.num_replicas
    return options


def _located(settings: ServeSettings) -> ServeSettings:
    """Paths made absolute: replicas run in other directories."""
    changes: dict[str, Any] = {"bundle": _absolute(settings.bundle)}
    if settings.state_dir:
        changes["state_dir"] = _absolute(settings.state_dir)
    access = settings.access
    files = ("keys_file", "admin_keys_file")
    found = {name: _absolute(path) for name in files if (path := getattr(access, name))}
    for path in found.values():
        if not os.access(path, os.R_OK):
            raise ConfigError(f"the key file {path} cannot be read; expected one key per line")
    changes["access"] = access.model_copy(update=found)
    if settings.feedback.path:
        path = _absolute(settings.feedback.path)
        changes["feedback"] = settings.feedback.model_copy(update={"path": path})
    if settings.corpus and Path(settings.corpus).expanduser().exists():
        changes["corpus"] = _absolute(settings.corpus)
    return settings.model_copy(update=changes)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
