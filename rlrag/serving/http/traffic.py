"""Request ids, the request log, and the list of recent requests."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

RECORD_KEY = "rlrag.record"
"""Where a request's record stands in its ASGI scope."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_QUESTION_CHARS = 500
_LOG = logging.getLogger("rlrag.serve.requests")


@dataclass(slots=True)
class RequestRecord:
    """What is known about one request; filled in while it is worked on.

    `request_id` is the service's own, so that no client can take another's; `client_request_id` is
    what the client called it. `key` is the fingerprint of the key that it came with.
    """

    request_id: str
    method: str
    client_request_id: str | None = None
    key: str | None = None
    route: str = "unmatched"
    status: int = 0
    version: str | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    question: str | None = None
    field_names: dict[str, str] = field(default_factory=dict)
    """What this client calls a field that the service calls otherwise."""
    time_s: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)

    def describe(self) -> dict[str, Any]:
        """The record for people: without its question."""
        said: dict[str, Any] = {
            "request_id": self.request_id,
            "client_request_id": self.client_request_id,
            "time": round(self.time_s, 3),
            "route": self.route,
            "status": self.status,
            "version": self.version,
            "timings_ms": {name: round(ms, 2) for name, ms in self.timings_ms.items()},
        }
        return said


class Traffic:
    """The newest requests of a replica, and its log.

    Args:
        max_requests: Requests kept.
        keeps_questions: Whether questions may be kept; they are never logged, since a log outlives
            the days for which questions may be kept.
    """

    def __init__(self, max_requests: int, keeps_questions: bool) -> None:
        self._newest: deque[RequestRecord] = deque(maxlen=max_requests)
        self._keeps_questions = keeps_questions

    def note_question(self, record: RequestRecord, question: str) -> None:
        """Keep the beginning of a request's question with it, where that is allowed."""
        if self._keeps_questions:
            cut = len(question) > _MAX_QUESTION_CHARS
            record.question = question[:_MAX_QUESTION_CHARS] + "…" * cut

    def finish(self, record: RequestRecord) -> None:
        """Log a request, and keep it if it was about the pipeline."""
        record.timings_ms.setdefault("total", 1000 * (time.perf_counter() - record.started))
        said = {"method": record.method, "key": record.key, **record.describe()}
        _LOG.info("%s %s: %d", record.method, record.route, record.status, extra={"fields": said})
        if record.version is not None or record.method == "POST":
            self._newest.appendleft(record)

    def newest(self, key: str | None) -> list[RequestRecord]:
        """Requests with this key that have ended, newest first."""
        return [record for record in self._newest if record.key == key]


def new_request_id() -> str:
    """An id that nobody can guess: who knows it may say what its answer was worth."""
    return uuid.uuid4().hex


def sane_id(given: str | None) -> str | None:
    """The id that a client gave, if it is short and plain.

    Example:
        >>> sane_id("job-7.3"), sane_id("a b"), sane_id(None)
        ('job-7.3', None, None)
    """
    return given if given and _SANE_ID.fullmatch(given) else None


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request with this scope."""
    record: RequestRecord = scope[RECORD_KEY]
    return record


def route_path(scope: Scope) -> str:
    """The path below the place where the application is mounted.

    Example:
        >>> route_path({"path": "/rag/v1/answer", "root_path": "/rag"})
        '/v1/answer'
    """
    path, root = scope["path"], scope.get("root_path", "")
    below = path.removeprefix(root)
    return below if root and path.startswith(root) and below[:1] in ("", "/") else path
