"""Converts errors of Ray Serve's HTTP proxy into problem documents.

The proxy stands before the HTTP replicas. Where the replica that works on a request dies, it sends
nothing, which its server turns into a bare 500; where it refuses or gives up a request itself, it
sends plain text. With `PROXY_VARIABLES` in the environment of the cluster's processes the proxy
runs this layer, and clients get 503 with `Retry-After` and a problem document.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlrag.errors import OverloadedError
from rlrag.serving.http.connections import bound_connections
from rlrag.serving.http.problems import problem_of, problem_response
from rlrag.serving.http.traffic import new_request_id, sane_id

PROXY_VARIABLES = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rlrag.serving.http.proxy:layers",
    # Ray Serve ends a proxy that is slower, as on a busy machine it may be (5 and 10 s otherwise).
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
"""Environment variables of Ray Serve; read by its controller and proxies when they start."""

_ID_HEADER = b"x-request-id"
_PROXY_PREFIX = "/-/"
"""Paths that the proxy answers for its own sake."""
_RETRY_AFTER_S = 2
_REFUSALS = {
    408: "the service did not answer in time; try again in a moment",
    429: "too many requests wait; try again in a moment",
    503: "too many requests wait, or the service is starting; try again in a moment",
}
_ENDED = "the HTTP replica that worked on this request has ended; send the request again"


def layers() -> list[Middleware]:
    """What the proxy puts around its own application; asked for before its server starts."""
    bound_connections()
    return [Middleware(ProxyProblems)]


class ProxyProblems:
    """Turns what the proxy says in the service's place into problem documents.

    What has begun as a response of the service goes on as it is; where its replica dies in the
    middle, the connection is cut.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"].startswith(_PROXY_PREFIX):
            await self._app(scope, receive, send)
            return
        problem: str | None = _ENDED

        async def send_service(message: Message) -> None:
            nonlocal problem
            if message["type"] == "http.response.start":
                problem = _refusal_of(message)
                message = {**message, "headers": _with_one_id(message)}
            if problem is None:
                await send(message)

        await self._app(scope, receive, send_service)
        if problem is not None:
            request_id = new_request_id()
            said = problem_of(OverloadedError(problem), request_id)
            headers = {_ID_HEADER.decode(): request_id}
            theirs = sane_id(Headers(scope=scope).get(_ID_HEADER.decode()))
            if theirs is not None:
                headers["x-client-request-id"] = theirs
            response = problem_response(said, _RETRY_AFTER_S, headers)
            await response(scope, receive, send)


def _refusal_of(message: Message) -> str | None:
    """What a client is told in place of this response, if it is the proxy's own."""
    kind = Headers(raw=message.get("headers", [])).get("content-type", "")
    return _REFUSALS.get(message["status"]) if kind.startswith("text/plain") else None


def _with_one_id(message: Message) -> list[tuple[bytes, bytes]]:
    """The headers without the request id that the proxy adds to the one of the service."""
    headers = list(message.get("headers", []))
    ids = [place for place, (name, _) in enumerate(headers) if name.lower() == _ID_HEADER]
    return [header for place, header in enumerate(headers) if place not in ids[1:]]
