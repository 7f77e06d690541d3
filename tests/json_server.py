"""An HTTP server on the loopback that answers posted JSON with JSON."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]
"""Status, headers and value of a reply; a text is sent as HTML, which an API never sends."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked has gone
            super().handle_error(request, client_address)


@contextmanager
def json_server(answer: Callable[[str, Any, str | None], Answer]) -> Iterator[str]:
    """The address of its API while the block runs.

    `answer` gets the path, the posted value and what the header `Authorization` says. It is called
    in a thread of each request.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers, value = answer(self.path, body, self.headers["Authorization"])
            kind = "text/html" if isinstance(value, str) else "application/json"
            content = (value if isinstance(value, str) else json.dumps(value)).encode()
            try:
                self.send_response(status)
                headers = {**headers, "Content-Type": kind, "Content-Length": str(len(content))}
                for name, text in headers.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # who asked has gone, as after a short timeout

        def log_message(self, *_: Any) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
