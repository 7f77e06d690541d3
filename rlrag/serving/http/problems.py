"""Error responses as problem documents (RFC 9457), without internal details."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rlrag.errors import (
    GeneratorTimeoutError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    RlragError,
)
from rlrag.serving.http.replies import FieldError, OpenAIError, Problem

MEDIA_TYPE = "application/problem+json"
_MAX_FIELD_ERRORS = 20
_MAX_DETAIL_CHARS = 2000
_MAX_NAME_CHARS = 100
_OWN_NAMES: Mapping[str, str] = {}
_LOG = logging.getLogger("rlrag.serve")


class DeadlineError(RlragError, TimeoutError):
    """A request was not answered within its time."""


class UnknownNameError(RequestError, LookupError):
    """A request names something that the service does not have."""


class UnsupportedParameterError(RequestError):
    """A request sets a parameter that the service does not follow."""


class FeedbackOffError(RlragError, LookupError):
    """Feedback came to a service that records none."""


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    slug: str
    title: str


_KINDS: tuple[tuple[type[Exception], _Kind], ...] = (
    (UnknownNameError, _Kind(404, "unknown-name", "No such thing here")),
    (
        UnsupportedParameterError,
        _Kind(400, "unsupported-parameter", "The service does not follow a parameter"),
    ),
    (PromptTooLongError, _Kind(422, "prompt-too-long", "The question does not fit the prompt")),
    (RequestError, _Kind(422, "unanswerable", "The request cannot be answered as asked")),
    (OverloadedError, _Kind(503, "overloaded", "The service has no room now")),
    (DeadlineError, _Kind(504, "too-late", "The answer took too long")),
    (GeneratorTimeoutError, _Kind(504, "too-late", "The answer took too long")),
    (FeedbackOffError, _Kind(404, "feedback-off", "Feedback is off")),
)
_OF_STATUS = {
    400: _Kind(400, "malformed", "The request cannot be read"),
    401: _Kind(401, "unauthorized", "A valid key is needed"),
    403: _Kind(403, "forbidden", "This is closed"),
    404: _Kind(404, "not-found", "There is nothing here"),
    405: _Kind(405, "method", "The method is not allowed here"),
    408: _Kind(408, "slow-request", "The request took too long to arrive"),
    413: _Kind(413, "too-large", "The request is too large"),
    415: _Kind(415, "media-type", "The request must be JSON"),
    421: _Kind(421, "unknown-host", "The service has another name"),
}
_INVALID = _Kind(422, "invalid", "A field of the request is wrong")
_INTERNAL = _Kind(500, "internal", "The service failed")
_UNPARSED = "There was an error parsing the body"
_DETAILS = {
    400: "the body is not readable JSON: too deeply nested, or a number has too many digits",
    404: "no resource has this path; /openapi.json lists all",
    405: "the Allow header names the methods of this path",
}


def problem_of(
    error: BaseException, request_id: str, names: Mapping[str, str] = _OWN_NAMES
) -> Problem:
    """What a client is told about an error.

    An error that no client can act on is logged with its traceback under the request's id, and the
    client is told that id alone.

    Args:
        error: What was raised.
        request_id: The request that it ended.
        names: What the client calls a field that this service calls otherwise.
    """
    kind, detail, errors = _describe(error)
    field = _field_of(error, errors)
    if field is not None and field in names:
        detail = names[field] + detail.removeprefix(field)
        field = names[field]
    if kind is _INTERNAL:
        _LOG.error("request %s failed", request_id, exc_info=error)
        detail = f"the service could not answer; its log says why under {request_id}"
    detail = detail[:_MAX_DETAIL_CHARS]
    code = kind.slug.replace("-", "_")
    return Problem(
        type=f"urn:rlrag:{kind.slug}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        request_id=request_id,
        errors=errors,
        error=OpenAIError(message=detail, type=code, param=field, code=code),
    )


def problem_response(
    problem: Problem, retry_after_s: int, headers: Mapping[str, str] | None = None
) -> Response:
    """The HTTP response that carries a problem."""
    # Escaped, since names in a request may hold halves of surrogate pairs, which have no UTF-8.
    body = json.dumps(problem.model_dump()).encode()
    response = Response(body, problem.status, headers=headers, media_type=MEDIA_TYPE)
    if problem.status == 503:
        response.headers["Retry-After"] = str(retry_after_s)
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _describe(error: BaseException) -> tuple[_Kind, str, list[FieldError] | None]:
    if isinstance(error, RequestValidationError):
        return _describe_validation(error)
    if isinstance(error, HTTPException) and error.status_code in _OF_STATUS:
        kind = _OF_STATUS[error.status_code]
        # A detail that Starlette or FastAPI wrote says less than this project's own.
        own = error.detail not in (_phrase(kind.status), _UNPARSED)
        return kind, error.detail if own else _DETAILS.get(kind.status, kind.title), None
    for known, kind in _KINDS:
        if isinstance(error, known):
            return kind, str(error), None
    return _INTERNAL, "", None


def _field_of(error: BaseException, errors: list[FieldError] | None) -> str | None:
    """The one field, or the first, that is wrong, by this service's name."""
    if errors:
        return errors[0].field
    if isinstance(error, PromptTooLongError):
        return "question"
    return error.field if isinstance(error, RequestError) else None


def _phrase(status: int) -> str:
    return HTTPException(status).detail


def _describe_validation(
    error: RequestValidationError,
) -> tuple[_Kind, str, list[FieldError] | None]:
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return _OF_STATUS[400], f"the body is not JSON: {why} at {first['loc'][-1]}", None
    errors = [
        FieldError(field=_field_name(one["loc"]), message=one["msg"])
        for one in found[:_MAX_FIELD_ERRORS]
    ]
    return _INVALID, f"{errors[0].field}: {errors[0].message}", errors


def _field_name(place: tuple[str | int, ...]) -> str:
    """`("body", "filters", "ids", 0)` becomes `filters.ids.0`."""
    names = place[1:] if place[:1] in (("body",), ("path",)) else place
    return (".".join(map(str, names)) or "body")[:_MAX_NAME_CHARS]
