"""What a judge shall reply in; a server on the loopback that speaks chat completions out."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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

    def answer(self, body: dict[str, Any], key: str | None) -> tuple[int, dict[str, str], Any]:
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

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                status, headers, value = 404, {}, {"error": {"message": "no such path"}}
            else:
                with judge._lock:
                    judge.at_once += 1
                    judge.most_at_once = max(judge.most_at_once, judge.at_once)
                status, headers, value = judge.answer(body, self.headers["Authorization"])
                with judge._lock:
                    judge.at_once -= 1
            content = json.dumps(value).encode()
            try:
                self.send_response(status)
                headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
                for name, text in headers.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has gone, as after a short timeout

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
