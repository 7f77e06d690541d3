"""What a judge shall reply in; a server on the loopback that speaks chat completions out."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from json_server import Answer, json_server

KEY = "sk-secret-4711"


class JudgeServer:
    """`reply` gets the judged case and how often it was asked before; it returns what to send.

    That is a text, a status with headers, or any JSON value. Requests are counted by the judged
    answer.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Any] = lambda case, before: "correct"
        self.key: str | None = None
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any], key: str | None) -> Answer:
        """Status, headers and value of one reply."""
        with self._lock:
            self.keys.add(key)
            self.bodies.append(body)
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, {}, {"error": {"message": f"Incorrect API key provided: {key}"}}
        text = body["messages"][1]["content"].split("\n\n")[0]
        case = json.loads(text)
        with self._lock:
            before = self.asked[case["answer"]]
            self.asked[case["answer"]] += 1
        said = self.reply(case, before)
        if isinstance(said, tuple):
            status, headers = said
            return status, headers, {"error": {"message": "not now"}}
        if not isinstance(said, str):
            return 200, {}, said
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return (
            200,
            {},
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
            },
        )


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """The server, while the block runs."""
    judge = JudgeServer()

    def answer(path: str, body: Any, key: str | None) -> Answer:
        if path != "/v1/chat/completions":
            return 404, {}, {"error": {"message": "no such path"}}
        with judge._lock:
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        found = judge.answer(body, key)
        with judge._lock:
            judge.at_once -= 1
        return found

    with json_server(answer) as judge.url:
        yield judge
