"""Equal calls in; one computation of them, kept for the next ones, out."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

V = TypeVar("V")
Key = tuple[str, Hashable]
"""A bundle version, and what else decides the value."""

_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Flight(Generic[V]):
    task: asyncio.Task[V]
    num_waiting: int = 0


class CallCache(Generic[V]):
    """The values used last, at most `max_entries`; equal calls at one time are computed once.

    Args:
        max_entries: Entries kept; 0 keeps none and shares no computation.
        count: Told for each lookup whether it was a hit, be it of a value or of a computation.
    """

    def __init__(self, max_entries: int, count: Callable[[bool], None]) -> None:
        self._max_entries = max_entries
        self._count = count
        self._values: OrderedDict[Key, V] = OrderedDict()
        self._flights: dict[Key, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Key) -> V | None:
        """The value, if it is kept; counted."""
        value = self._look_up(key)
        if self._max_entries:
            self._count(value is not None)
        return value

    def put(self, key: Key, value: V) -> None:
        """Keep a value, and drop the one that was not used for longest where there is no room."""
        if not self._max_entries:
            return
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._max_entries:
            self._values.popitem(last=False)

    def keep_versions(self, versions: Collection[str]) -> None:
        """Drop what belongs to any other version."""
        for key in [key for key in self._values if key[0] not in versions]:
            del self._values[key]

    async def get(self, key: Key, compute: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """The value, and whether another call has computed it or is computing it.

        A computation goes on as long as anyone waits for it, and is cancelled when the last one
        leaves. What it raises, all who wait for it get, and nothing is kept.
        """
        if not self._max_entries:
            return await compute(), False
        value, flight = self._look_up(key), self._flights.get(key)
        joined = flight is not None
        self._count(value is not None or joined)
        if value is not None:
            return value, True
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(_run(compute)))
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task), joined
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting and not flight.task.done():
                await self._abandon(key, flight)

    def _look_up(self, key: Key) -> V | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    async def _abandon(self, key: Key, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.task.cancel()
        await asyncio.wait((flight.task,), timeout=_CLOSE_TIMEOUT_S)

    def _landed(self, key: Key, task: asyncio.Task[V]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
        if not task.cancelled() and task.exception() is None:
            self.put(key, task.result())


async def _run(compute: Callable[[], Awaitable[V]]) -> V:
    return await compute()
