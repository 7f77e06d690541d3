"""The ASGI application: routes, middleware and OpenAPI document.

Nothing in here knows Ray: `ServedPipeline` and `VersionDesk` stand for whatever does the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import rlrag
from rlrag.data.feedback import FeedbackStore
from rlrag.errors import RlragError
from rlrag.serving.answering import Answering
from rlrag.serving.feedback_log import FeedbackLog
from rlrag.serving.http.admin_routes import admin_routes
from rlrag.serving.http.answer_routes import answer_routes, search_routes
from rlrag.serving.http.json_routes import describe_api
from rlrag.serving.http.limits import Hosts, open_keys
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.http.middleware import BodyBound, HostCheck, KeyCheck, Recording, RoomCheck
from rlrag.serving.http.openai_routes import openai_routes
from rlrag.serving.http.problems import problem_of, problem_response
from rlrag.serving.http.status_routes import add_page, health_routes, status_routes
from rlrag.serving.http.traffic import Traffic, record_of
from rlrag.serving.records import ServedPipeline, VersionDesk
from rlrag.serving.service import Service
from rlrag.serving.settings import ServeSettings

_RECENT_REQUESTS = 200
_MAX_OTHER_VALUES = 10_000
"""Values of a body besides the questions of a batch; filters have the most, 2,000 ids."""
_DESCRIPTION = """\
Answers questions from a corpus: passages are retrieved, a trained selector picks some of them in
order, and a generator answers from these.

Every response bears `X-Request-Id`, a new one each time. A request may bear a name of its own in
`X-Client-Request-Id` (or `X-Request-Id`), at most 64 letters, digits, `.`, `_` and `-`; it is
logged beside that id and sent back in `X-Client-Request-Id`. Errors are problem documents
(RFC 9457), with an `error` object as OpenAI's clients read it. Where the service asks for keys,
send one as `Authorization: Bearer KEY` or as `X-API-Key: KEY`; `/healthz`, `/readyz`, `/metrics`,
this document and the page are open, and `/admin` takes keys of its own.
"""


def create_api(
    pipeline: ServedPipeline,
    desk: VersionDesk,
    settings: ServeSettings,
    feedback: FeedbackStore | None = None,
) -> FastAPI:
    """The application of one HTTP replica.

    Args:
        pipeline: Retrieves, selects and generates.
        desk: Knows the bundle versions and changes them.
        settings: Limits, keys and sizes.
        feedback: Where selections and feedback are recorded; None records nothing.

    Raises:
        ConfigError: when a key file or variable that the settings name gives no key.
    """
    access, limits = settings.access, settings.limits
    keys = open_keys(access.keys_file, access.keys_variable)
    admin_keys = open_keys(access.admin_keys_file, access.admin_keys_variable)
    service = _service(pipeline, desk, settings, feedback)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.answering.close()

    app = FastAPI(
        title="rlrag",
        version=rlrag.__version__,
        summary="Questions answered from a corpus by a trained pipeline.",
        description=_DESCRIPTION,
        # The usual documentation pages load their code from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    for routes in (answer_routes, search_routes, openai_routes, status_routes, health_routes):
        app.include_router(routes(service))
    app.include_router(admin_routes(service))
    add_page(app)
    _answer_errors(app, limits.retry_after_s)
    _describe(app, settings, keys is not None)

    # The layer that is added last is the outermost.
    retry = limits.retry_after_s
    app.add_middleware(
        BodyBound,
        max_bytes=limits.max_body_bytes,
        max_values=_MAX_OTHER_VALUES + limits.max_queries + limits.max_questions,
        timeout_s=limits.timeout_s,
        retry_after_s=retry,
    )
    app.add_middleware(RoomCheck, check_room=service.answering.check_room, retry_after_s=retry)
    app.add_middleware(KeyCheck, keys=keys, admin_keys=admin_keys, retry_after_s=retry)
    app.add_middleware(HostCheck, hosts=Hosts(access.hosts), retry_after_s=retry)
    app.add_middleware(
        Recording, traffic=service.traffic, metrics=service.metrics, retry_after_s=retry
    )
    if access.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            # Clients send headers of their own, such as `X-Stainless-*`; the origin is what counts.
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Client-Request-Id", "Retry-After"],
        )
    return app


def _service(
    pipeline: ServedPipeline,
    desk: VersionDesk,
    settings: ServeSettings,
    feedback: FeedbackStore | None,
) -> Service:
    metrics = Metrics()
    log = None
    if feedback is not None:
        log = FeedbackLog(feedback, settings.feedback.explore_share, metrics)
    answering = Answering(pipeline, desk, settings, metrics, log)
    traffic = Traffic(_RECENT_REQUESTS, keeps_questions=feedback is not None)
    return Service(answering, desk, settings, metrics, traffic, log)


def _answer_errors(app: FastAPI, retry_after_s: int) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        record = record_of(request.scope)
        problem = problem_of(error, record.request_id, record.field_names)
        headers = error.headers if isinstance(error, HTTPException) else None
        return problem_response(problem, retry_after_s, headers)

    for kind in (RequestValidationError, HTTPException, RlragError):
        app.add_exception_handler(kind, answer)


def _describe(app: FastAPI, settings: ServeSettings, asks_for_keys: bool) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe_api(app, settings.limits, asks_for_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
