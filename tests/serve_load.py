"""A service that is started by its command, clients that ask it without a pause, its processes."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

_PATIENCE_S = 180.0
_NUM_CLIENTS = 3
_STEADY = 20
"""Answers in a row after which a service counts as working."""


PROGRAM = (sys.executable, "-c", "from rlrag.cli import main; main()")


@contextmanager
def started_service(
    *words: object,
    folder: Path,
    program: tuple[object, ...] = PROGRAM,
    variables: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """The address of `rlrag serve`, started in a folder with these words on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [str(word) for word in (*program, "serve", *words, f"port={port}")],
        cwd=folder,
        env=os.environ | dict(variables or {}),
        stderr=subprocess.PIPE,
        text=True,
    ) as service:
        try:
            assert service.stderr is not None
            said = []
            for line in service.stderr:
                said.append(line)
                if line.startswith("ready at "):
                    break
            url = f"http://127.0.0.1:{port}"
            assert said[-1].startswith(f"ready at {url} "), "".join(said)[-3000:]
            yield url
        finally:
            stop(service)


def stop(service: subprocess.Popen[str]) -> None:
    """End a service as Ctrl-C does."""
    service.send_signal(signal.SIGINT)
    try:
        service.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        service.kill()
        raise


@dataclass(frozen=True)
class Reply:
    """What became of one question; status 0 where the connection was cut. Times are monotonic."""

    question: str
    began: float
    ended: float
    status: int
    content_type: str = ""
    retry_after: str | None = None
    body: dict[str, Any] = field(default_factory=dict)


class Load:
    """Three clients, each of which asks its next question as soon as the last one is answered.

    Who is refused waits as long as the refusal says.

    Args:
        base_url: The service.
        question: What is asked, by the number of the turn.
    """

    def __init__(self, base_url: httpx.URL, question: Callable[[int], str]) -> None:
        self.replies: list[Reply] = []
        self._base_url = base_url
        self._question = question
        self._turns = itertools.count()
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(_NUM_CLIENTS)]

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join(_PATIENCE_S)
            assert not client.is_alive(), "a request was never answered"

    def since(self, moment: float) -> list[Reply]:
        """Replies that came after a moment, first ones first."""
        return sorted(
            (reply for reply in list(self.replies) if reply.ended > moment),
            key=lambda reply: reply.ended,
        )

    def wait_for_answers(self, since: float) -> None:
        """Return when many questions in a row were answered, all asked after a moment."""

        def steady() -> bool:
            newest = self.since(since)[-_STEADY:]
            return len(newest) == _STEADY and all(
                reply.status == 200 and reply.began > since for reply in newest
            )

        wait_for(steady)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._base_url, timeout=_PATIENCE_S) as client:
            while not self._stop.is_set():
                question, began = self._question(next(self._turns)), time.monotonic()
                try:
                    response = client.post(
                        "/v1/answer", json={"question": question, "temperature": 0}
                    )
                except httpx.TransportError:
                    self.replies.append(Reply(question, began, time.monotonic(), 0))
                    continue
                kind = response.headers.get("content-type", "")
                reply = Reply(
                    question,
                    began,
                    time.monotonic(),
                    response.status_code,
                    kind,
                    response.headers.get("retry-after"),
                    response.json() if kind.endswith("json") else {},
                )
                self.replies.append(reply)
                self._stop.wait(float(reply.retry_after or 0))


def processes_of(part: str) -> list[int]:
    """Process ids of a deployment's replicas, or of the actors of a class."""
    from ray._private.state import actors

    return [
        actor["Pid"]
        for actor in actors(actor_state_name="ALIVE").values()
        if part == actor["ActorClassName"].rpartition(":")[2]
    ]


def wait_for(condition: Callable[[], object]) -> None:
    """Return when a condition holds, which must come about in a bounded time."""
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come about"
        time.sleep(0.1)
