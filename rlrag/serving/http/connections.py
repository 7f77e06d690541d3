"""Time limit for request headers in Ray Serve's HTTP proxy.

uvicorn bounds the pause between two requests, but neither the time in which a request's line and
headers arrive nor the number of connections: half a header could hold one for good.
`rlrag.serving.http.proxy` has the proxy take this class in place of uvicorn's own.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any, ClassVar

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_HEAD_WITHIN_S = 10.0
_MAX_CONNECTIONS = 4096


def bound_connections() -> None:
    """Have the servers that this process starts from now on use `BoundedConnection`."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedConnection.__name__}"


class BoundedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is closed when the head of a request does not arrive in time.

    Where there are too many connections, that goes which has waited longest for its head; where
    none waits, the new one.
    """

    _waiting: ClassVar[OrderedDict[BoundedConnection, asyncio.TimerHandle]] = OrderedDict()
    cycle: Any
    connections: Any
    transport: Any

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > _MAX_CONNECTIONS:
            next(iter(self._waiting)).transport.close()

    def data_received(self, data: bytes) -> None:
        """Take in bytes; a head that is complete ends the wait, and half a head begins one."""
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop_waiting()
        elif self.cycle is None or self.cycle.response_complete:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self not in self._waiting:
            loop = asyncio.get_running_loop()
            self._waiting[self] = loop.call_later(_HEAD_WITHIN_S, self.transport.close)

    def _stop_waiting(self) -> None:
        timer = self._waiting.pop(self, None)
        if timer is not None:
            timer.cancel()
