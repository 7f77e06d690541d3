"""JSON routes: request parsing, error responses and their OpenAPI description.

`JsonRoute` is the route class of everything under the API.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from rlrag.serving.http.problems import MEDIA_TYPE
from rlrag.serving.http.replies import Problem
from rlrag.serving.settings import LimitSettings

_WHY = {
    400: "The body is not JSON in UTF-8.",
    401: "The key is missing or unknown.",
    403: "The service was started without admin keys.",
    404: "No such thing.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    415: "The body is not declared as `application/json`.",
    421: "The service has no such name; see the setting `access.hosts`.",
    422: "A field is wrong, or the request cannot be answered as asked.",
    500: "The service failed; its log says why under the request's id.",
    503: "There is no room now; `Retry-After` says when to try again.",
    504: "The answer took too long.",
}
_WITH_BODY = ("POST", "PUT", "PATCH")
_OPEN = ("/healthz", "/readyz", "/metrics")


class JsonRoute(APIRoute):
    """A route whose body, if its method has one, must be JSON in UTF-8 and say so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the checks."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            if request.method in _WITH_BODY:
                _check_media_type(request.headers.get("content-type", ""))
                _check_encoding(await request.body())
            return await handle(request)

        return checked


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's refusals; all routes may answer 408, 413, 421 and 500."""
    schema = {"$ref": "#/components/schemas/Problem"}
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, 408, 413, 421, 500}):
        found[status] = {
            "description": _WHY[status],
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        if status == 503:
            found[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}
            }
    return found


def event_stream(description: str, example: str) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route that may answer with server-sent events."""
    # Without a schema: what tools make of one, the whole text or an event, differs.
    content = {"text/event-stream": {"example": example}}
    return {200: {"description": description, "content": content}}


def describe_api(app: FastAPI, limits: LimitSettings, asks_for_keys: bool) -> dict[str, Any]:
    """The OpenAPI document, with the bounds of the settings and the keys that are asked for."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
    )
    schemas = document["components"]["schemas"]
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schemas["Problem"].pop("$defs", {}))
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _write_bounds(schemas, limits)
    _write_security(document, asks_for_keys)
    return document


def _write_bounds(schemas: dict[str, Any], limits: LimitSettings) -> None:
    for schema in schemas.values():
        for name, field in schema.get("properties", {}).items():
            if name == "question" and "pattern" in field:
                field["maxLength"] = limits.max_question_chars
            elif name == "questions":
                field["maxItems"] = limits.max_questions
                field["items"]["maxLength"] = limits.max_question_chars
            elif name == "queries":
                field["maxItems"] = limits.max_queries
            elif name in ("num_selected", "num_candidates", "topk"):
                _number(field)["maximum"] = limits.max_candidates
            elif name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
                _number(field)["maximum"] = limits.max_new_tokens


def _number(field: dict[str, Any]) -> dict[str, Any]:
    """The branch of an optional number that is not null."""
    branches: list[dict[str, Any]] = field.get("anyOf", [field])
    return next(branch for branch in branches if branch.get("type") == "integer")


def _write_security(document: dict[str, Any], asks_for_keys: bool) -> None:
    document["components"]["securitySchemes"] = {
        "Bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
        "Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operations in document["paths"].items():
        if path not in _OPEN and (asks_for_keys or path.startswith("/admin")):
            for operation in operations.values():
                operation["security"] = [{"Bearer": []}, {"Key": []}]


def _check_media_type(declared: str) -> None:
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise HTTPException(
            415, f"the body is declared as {kind[:100] or 'nothing'}; send application/json"
        )


def _check_encoding(body: bytes) -> None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HTTPException(
            400, f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
        ) from error
