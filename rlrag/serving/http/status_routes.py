"""Routes for health, metrics, versions, recent requests, feedback, and the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from rlrag.errors import OverloadedError
from rlrag.serving.http.json_routes import JsonRoute, refusals
from rlrag.serving.http.metrics import MEDIA_TYPE
from rlrag.serving.http.problems import FeedbackOffError, UnknownNameError
from rlrag.serving.http.replies import Accepted, Health, RecentRequest, RecentRequests, Versions
from rlrag.serving.http.responses import json_response
from rlrag.serving.http.schemas import FeedbackRequest
from rlrag.serving.http.traffic import record_of
from rlrag.serving.records import Routing
from rlrag.serving.service import Service

PAGE_DIR = Path(__file__).parents[1] / "page"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PLAIN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


def health_routes(service: Service) -> APIRouter:
    """The open routes that tell how the service does."""
    router = APIRouter(route_class=JsonRoute, tags=["status"])

    @router.get("/healthz", response_model=Health, responses=refusals())
    async def alive() -> Response:
        """200 as long as the process answers."""
        return json_response(Health())

    @router.get("/readyz", response_model=Health, responses=refusals(503))
    async def ready() -> Response:
        """200 when every part holds the bundle version that answers, else 503."""
        service.answering.check_ready()
        return json_response(Health())

    @router.get("/metrics", response_class=Response, responses={**refusals(), **_PLAIN})
    async def metrics() -> Response:
        """Counts and times of this replica in Prometheus's text format."""
        return Response(service.metrics.text(_known_routing(service)), media_type=MEDIA_TYPE)

    return router


def status_routes(service: Service) -> APIRouter:
    """What the page shows beside answers, and where feedback goes."""
    router = APIRouter(route_class=JsonRoute, tags=["status"])

    @router.get("/v1/versions", response_model=Versions, responses=refusals(401, 503))
    async def versions() -> Response:
        """The bundle versions in use."""
        routing = service.answering.routing()
        return json_response(
            Versions(
                active=routing.active,
                canary=routing.canary,
                canary_share=routing.canary_share,
                shadow=routing.shadow,
                epoch=routing.epoch,
            )
        )

    @router.get("/v1/recent", response_model=RecentRequests, responses=refusals(401))
    async def recent(request: Request) -> Response:
        """The last requests with this key that this replica has finished.

        The beginnings of their questions are with them where feedback is recorded.
        """
        newest = [
            RecentRequest(**record.describe(), question=record.question)
            for record in service.traffic.newest(record_of(request.scope).key)
        ]
        return json_response(RecentRequests(requests=newest))

    @router.post(
        "/v1/feedback",
        status_code=202,
        response_model=Accepted,
        responses=refusals(400, 401, 404, 415, 422, 503),
    )
    async def feedback(body: FeedbackRequest) -> Response:
        """Tell what an answer was worth, by exactly one of reward, golden answers and thumbs."""
        if service.feedback is None:
            raise FeedbackOffError(
                "this service records no feedback; the setting feedback.path turns it on"
            )
        given = body.model_dump(include=body.model_fields_set)
        [kind] = given.keys() - {"request_id"}
        known = await service.feedback.record_feedback(
            body.request_id, given.get("reward"), given.get("golden_answers"), given.get("thumbs")
        )
        if not known:
            raise UnknownNameError.about(
                "request_id", f"{body.request_id} is that of no answer on record"
            )
        service.metrics.fed_back(kind)
        return json_response(Accepted(request_id=body.request_id), 202)

    return router


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/page`; neither asks for a key."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        return FileResponse(PAGE_DIR / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE_DIR), name="page")


def _known_routing(service: Service) -> Routing | None:
    try:
        return service.answering.routing()
    except OverloadedError:
        return None
