"""`/admin` routes: add, promote and remove bundle versions; they need an admin key."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlrag.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IndexMismatchError,
    ModelNotFoundError,
    RequestError,
)
from rlrag.serving.http.json_routes import JsonRoute, refusals
from rlrag.serving.http.replies import ComparisonReport, LoadedBundle, VersionsWithPaths
from rlrag.serving.http.responses import json_response
from rlrag.serving.http.schemas import BundleRequest
from rlrag.serving.http.traffic import record_of
from rlrag.serving.service import Service

_LOG = logging.getLogger("rlrag.serve.admin")
_BAD_BUNDLE = (CheckpointError, ConfigError, DataError, IndexMismatchError, ModelNotFoundError)


def admin_routes(service: Service) -> APIRouter:
    """The routes of the operator."""
    router = APIRouter(prefix="/admin", route_class=JsonRoute, tags=["admin"])
    loads: set[asyncio.Task[str]] = set()

    @router.post(
        "/bundle",
        response_model=LoadedBundle,
        responses=refusals(400, 401, 403, 415, 422, 503, 504),
    )
    async def load(request: Request, body: BundleRequest) -> Response:
        """Load a bundle beside those in use, check it, and give it a role.

        A bundle that is damaged, or answers its golden questions otherwise than recorded, is
        refused, and what served before goes on. Loading goes on when the client leaves;
        `/admin/versions` tells how it ended. A version that is in use already is not read again,
        nor is its corpus: `note` says where that has changed on disk since.
        """
        before = service.answering.routing().versions
        key = record_of(request.scope).key
        task = asyncio.ensure_future(_load(service, body))
        loads.add(task)
        task.add_done_callback(loads.discard)
        task.add_done_callback(partial(_log_load, key, body))
        version = await asyncio.shield(task)
        return json_response(
            LoadedBundle(
                version=version,
                role=body.role,
                already_loaded=version in before,
                note=await _note(service, version) if version in before else None,
            )
        )

    @router.delete(
        "/bundle/{role}",
        response_model=VersionsWithPaths,
        responses=refusals(401, 403, 422, 503),
    )
    async def drop(request: Request, role: Literal["canary", "shadow"]) -> Response:
        """End the canary or the shadow; the active version can only be replaced."""
        try:
            await service.desk.drop(role)
        except CheckpointError as error:
            raise RequestError(f"the {role} was not ended: {error}") from error
        _audit(record_of(request.scope).key, f"ended the {role}")
        return json_response(_versions(service))

    @router.get("/versions", response_model=VersionsWithPaths, responses=refusals(401, 403, 503))
    async def versions() -> Response:
        """The versions in use and their bundles."""
        return json_response(_versions(service))

    @router.get("/compare", response_model=ComparisonReport, responses=refusals(401, 403, 503))
    async def compare() -> Response:
        """How the shadow's answers compare with those of the active version, on this replica.

        The differences hold questions. They are kept in memory alone.
        """
        routing = service.answering.routing()
        return json_response(service.answering.shadow.report(routing))

    return router


async def _load(service: Service, body: BundleRequest) -> str:
    try:
        return await service.desk.load(body.path, body.role, body.share)
    except _BAD_BUNDLE as error:
        raise RequestError(f"the bundle was refused: {error}") from error


async def _note(service: Service, version: str) -> str | None:
    corpus = await service.desk.changed_corpus(version)
    if corpus is None:
        return None
    return (
        f"the corpus {corpus} has changed on disk since it was read, and questions are answered "
        "from what was read; restart the service to read it anew"
    )


def _log_load(key: str | None, body: BundleRequest, task: asyncio.Task[str]) -> None:
    if task.cancelled():
        outcome = "was cancelled"
    elif (error := task.exception()) is not None:
        outcome = f"failed: {error}"
    else:
        outcome = f"gave version {task.result()} this role"
    _audit(key, f"loading {body.path} as {body.role} {outcome}")


def _audit(key: str | None, done: str) -> None:
    _LOG.info("admin key %s: %s", key, done, extra={"fields": {"key": key}})


def _versions(service: Service) -> VersionsWithPaths:
    routing = service.answering.routing()
    return VersionsWithPaths(
        active=routing.active,
        canary=routing.canary,
        canary_share=routing.canary_share,
        shadow=routing.shadow,
        epoch=routing.epoch,
        paths={version: service.desk.bundle_path(version) for version in sorted(routing.versions)},
    )
