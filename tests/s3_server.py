"""An S3 server on the loopback interface, in a process of its own.

Not in a thread: where Python frees one of pyarrow's streams, pyarrow talks to the server and lets
no other thread of its process run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""
_END_TIMEOUT_S = 60.0


class S3Server:
    """The server's process and address."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "the server did not start"
        self.url = f"http://127.0.0.1:{port}"

    def end(self) -> None:
        """Close it; from then on its port refuses."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with an empty bucket `bucket`."""
    from pyarrow.fs import S3FileSystem

    server = S3Server()
    try:
        filesystem = S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=server.url,
            region="us-east-1",
            allow_bucket_creation=True,
        )
        filesystem.create_dir("bucket")
        yield server
    finally:
        server.end()
