"""Middleware: request ids, host names, keys and size limits.

Five ASGI layers, outermost first: `Recording` gives a request its id and its record and turns
whatever fails into a problem, `HostCheck` knows the service's names, `KeyCheck` asks for a key,
`RoomCheck` refuses questions for which there is no room, `BodyBound` reads the body up to a bound
and ends the work when the client leaves.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlrag.errors import OverloadedError
from rlrag.serving.http.limits import Hosts, KeyFile, fingerprint
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.http.problems import problem_of, problem_response
from rlrag.serving.http.traffic import (
    RECORD_KEY,
    RequestRecord,
    Traffic,
    new_request_id,
    record_of,
    route_path,
    sane_id,
)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/metrics", "/openapi.json"})
"""Paths that need no key, besides the files of the page."""
PAGE_PREFIX = "/page/"
ADMIN_PREFIX = "/admin/"
QUESTION_PATHS = frozenset(
    {"/v1/answer", "/v1/answers", "/v1/retrieve", "/v1/chat/completions", "/retrieve"}
)
"""Paths whose requests need room."""

_CLIENT_LEFT = 499
_MAX_SHOWN = 100
_JSON_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A text, or the rest of the body where it does not end: so each byte is looked at once."""
_ID_HEADER = "x-request-id"
_THEIR_ID_HEADER = "x-client-request-id"


class Recording:
    """Gives each request an id and a record; the id stands in the response's `X-Request-Id`.

    What the client calls the request, in `X-Client-Request-Id` or `X-Request-Id`, is kept beside it
    and sent back in `X-Client-Request-Id`.

    `HEAD` is answered as `GET` is, without the body.

    Args:
        app: The next layer.
        traffic: Logs and keeps the records.
        metrics: Counts the requests.
        retry_after_s: What a refusal for want of room says.
    """

    def __init__(
        self, app: ASGIApp, traffic: Traffic, metrics: Metrics, retry_after_s: int
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._metrics = metrics
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        theirs = sane_id(headers.get(_THEIR_ID_HEADER)) or sane_id(headers.get(_ID_HEADER))
        record = RequestRecord(new_request_id(), scope["method"], theirs)
        scope[RECORD_KEY] = record
        head_alone = scope["method"] == "HEAD"
        if head_alone:
            scope["method"] = "GET"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers[_ID_HEADER] = record.request_id
                if theirs is not None:
                    headers[_THEIR_ID_HEADER] = theirs
                headers["x-content-type-options"] = "nosniff"
            elif head_alone:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the last layer: nothing may reach the server
            problem = problem_of(error, record.request_id, record.field_names)
            if not record.status:
                response = problem_response(problem, self._retry_after_s)
                await response(scope, receive, send_with_id)
        finally:
            record.status = record.status or _CLIENT_LEFT
            record.route = _route_of(scope) or record.route
            seconds = time.perf_counter() - record.started
            self._metrics.finished(record.route, record.status, seconds)
            self._traffic.finish(record)


class HostCheck:
    """Lets a request pass that names the service by a name that it has.

    Args:
        app: The next layer.
        hosts: Its names.
        retry_after_s: Passed on to the refusal.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, retry_after_s: int) -> None:
        self._app = app
        self._hosts = hosts
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        # Browsers always send the header; what asks without one is no browser.
        names = Headers(scope=scope).getlist("host") if scope["type"] == "http" else []
        unknown = [name for name in names if not self._hosts.know(name)]
        if unknown:
            refusal = HTTPException(
                421,
                f"this service is not {unknown[0][:_MAX_SHOWN]!r}; the operator can add the name "
                "to access.hosts",
            )
            await _refuse(refusal, self._retry_after_s, scope, receive, send)
        else:
            await self._app(scope, receive, send)


class KeyCheck:
    """Lets a request pass whose key fits its path.

    `/admin` takes the admin keys alone and is closed where there are none. All else but the open
    paths takes the API keys, and is open where there are none. A key stands in
    `Authorization: Bearer KEY` or in `X-API-Key: KEY`.

    Args:
        app: The next layer.
        keys: API keys; None asks for none.
        admin_keys: Keys of `/admin`.
        retry_after_s: Passed on to the refusal.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyFile | None, admin_keys: KeyFile | None, retry_after_s: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(refusal, self._retry_after_s, scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        path = route_path(scope)
        if path in OPEN_PATHS or path.startswith(PAGE_PREFIX):
            return None
        admin = path.startswith(ADMIN_PREFIX)
        keys = self._admin_keys if admin else self._keys
        if keys is None:
            if not admin:
                return None
            return HTTPException(
                403, "/admin is closed: the service was started without admin keys"
            )
        key = _key_of(Headers(scope=scope))
        if key is None:
            return HTTPException(401, "send a key as Authorization: Bearer KEY, or as X-API-Key")
        if not keys.fit(key):
            return HTTPException(401, "the service does not know this key")
        record_of(scope).key = fingerprint(key)
        return None


@dataclass(slots=True)
class _Connection:
    left: bool = False
    answered: bool = False


class RoomCheck:
    """Refuses questions for which there is no room before their bodies are read.

    Args:
        app: The next layer.
        check_room: Raises `OverloadedError` where there is no room.
        retry_after_s: Passed on to the refusal.
    """

    def __init__(self, app: ASGIApp, check_room: Callable[[], None], retry_after_s: int) -> None:
        self._app = app
        self._check_room = check_room
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path = route_path(scope)
            if path in QUESTION_PATHS:
                try:
                    self._check_room()
                except OverloadedError as refusal:
                    record_of(scope).route = path
                    await _refuse(refusal, self._retry_after_s, scope, receive, send)
                    return
        await self._app(scope, receive, send)


class BodyBound:
    """Reads a body of at most `max_bytes` in at most `timeout_s`, and watches for a client leaving.

    A client that leaves before its response is complete cancels the work on its request. Ray Serve
    cancels the request's task itself; other servers only send `http.disconnect`, which is heard
    here. Both ways, the work ends with a cancellation where it stands.

    Args:
        app: The next layer.
        max_bytes: Longest body; of a longer one no more than this is read.
        max_values: Values in a body, which are counted before any of them is made an object.
        timeout_s: Longest time that a body may take to arrive.
        retry_after_s: Passed on to the refusal.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_values: int,
        timeout_s: float,
        retry_after_s: int,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._timeout_s = timeout_s
        self._retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except HTTPException as refusal:
            await _refuse(refusal, self._retry_after_s, scope, receive, send)
            return
        if body is not None:
            await self._work(body, scope, receive, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None if the client left while it sent it."""
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            raise self._too_large()
        pieces, num_bytes = [], 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    num_bytes += len(pieces[-1])
                    if num_bytes > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise HTTPException(
                408, f"the body did not arrive within {self._timeout_s:g} s"
            ) from error
        body = b"".join(pieces)
        if _has_more_values(body, self._max_values):
            raise HTTPException(413, f"the body has more than {self._max_values} values")
        return body

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is longer than {self._max_bytes} bytes")

    async def _work(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        connection = _Connection()
        gone = asyncio.Event()
        messages: list[MutableMapping[str, object]] = [
            {"type": "http.request", "body": body, "more_body": False}
        ]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                connection.answered = True
            await send(message)

        task = asyncio.current_task()
        assert task is not None  # an ASGI application always runs in a task
        watch = asyncio.create_task(_watch(receive, connection, gone, task))
        try:
            await self._app(scope, replay, send_and_note)
        except asyncio.CancelledError:
            # Only the watcher's own cancellation ends here; any other goes on its way.
            if not connection.left or task.cancelling() > 1:
                raise
        finally:
            watch.cancel()
            if connection.left:
                task.uncancel()


async def _watch(
    receive: Receive, connection: _Connection, gone: asyncio.Event, task: asyncio.Task[object]
) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    # Servers also say this once a response is complete.
    if not connection.answered:
        connection.left = True
        gone.set()
        task.cancel()


async def _refuse(
    refusal: Exception, retry_after_s: int, scope: Scope, receive: Receive, send: Send
) -> None:
    problem = problem_of(refusal, record_of(scope).request_id)
    await problem_response(problem, retry_after_s)(scope, receive, send)


def _has_more_values(body: bytes, most: int) -> bool:
    """Whether JSON holds more values, or lists and objects, than this."""

    def count(text: bytes) -> int:
        return sum(map(text.count, (b",", b"[", b"{")))

    if count(body) <= most:
        return False
    # What texts hold does not count; but their ends are looked for only where they are few.
    num_quotes = body.count(b'"') - body.count(b'\\"') + body.count(b"\\\\")
    return num_quotes > 16 * most or count(_JSON_TEXT.sub(b"", body)) > most


def _key_of(headers: Headers) -> str | None:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key")


def _route_of(scope: Scope) -> str | None:
    """The matched route's pattern, which has few values, where a path may have any."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path
