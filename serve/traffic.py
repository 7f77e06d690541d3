"""Requests in; their ids, a line of JSON for each in the log, and the newest ones out."""

from __future__ import annotations

import json
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
_LOG = logging.getLogger("rlrag.serve")


@dataclass(slots=True)
class RequestRecord:
    """What is known about one request; filled in while it is worked on."""

    request_id: str
    method: str
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
        """The record for people: without a question where none is kept."""
        said: dict[str, Any] = {
            "request_id": self.request_id,
            "time": round(self.time_s, 3),
            "route": self.route,
            "status": self.status,
            "version": self.version,
            "timings_ms": {name: round(ms, 2) for name, ms in self.timings_ms.items()},
        }
        return said if self.question is None else said | {"question": self.question}


class Traffic:
    """The newest requests of a replica, and its log.

    Args:
        max_requests: Requests kept.
        keeps_questions: Whether questions may be kept and logged.
    """

    def __init__(self, max_requests: int, keeps_questions: bool) -> None:
        self._newest: deque[RequestRecord] = deque(maxlen=max_requests)
        self._keeps_questions = keeps_questions

    def note_question(self, record: RequestRecord, question: str) -> None:
        """Keep a request's question with it, where that is allowed."""
        if self._keeps_questions:
            record.question = question

    def finish(self, record: RequestRecord) -> None:
        """Log a request, and keep it if it was about the pipeline."""
        record.timings_ms.setdefault("total", 1000 * (time.perf_counter() - record.started))
        _LOG.info("%s", json.dumps({"method": record.method, **record.describe()}))
        if record.version is not None or record.method == "POST":
            self._newest.appendleft(record)

    def newest(self) -> list[RequestRecord]:
        """Requests that have ended, newest first."""
        return list(self._newest)


def choose_request_id(given: str | None) -> str:
    """The client's own id if it is short and plain, else a new one.

    Example:
        >>> choose_request_id("job-7.3")
        'job-7.3'
        >>> len(choose_request_id("a b")), len(choose_request_id(None))
        (32, 32)
    """
    return given if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


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
