"""A cache that also shares computations in progress between requests."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Generic, TypeVar

import numpy as np

V = TypeVar("V")
Key = tuple[str, Hashable]
"""A bundle version, and what else decides the value."""

_CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True)
class _Flight(Generic[V]):
    task: asyncio.Task[V]
    num_waiting: int = 0


class CallCache(Generic[V]):
    """The values used last; equal calls at one time are computed once.

    Args:
        max_entries: Entries kept; 0 keeps none and shares no computation.
        max_bytes: What keys and values may hold together, see `held_bytes`.
        count: Told for each lookup whether it was a hit, be it of a value or of a computation.
    """

    def __init__(self, max_entries: int, max_bytes: int, count: Callable[[bool], None]) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sizes: dict[Key, int] = {}
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
        """Keep a value, and drop those that were not used for longest where there is no room."""
        if not self._max_entries:
            return
        self._drop(key)
        size = held_bytes(key) + held_bytes(value)
        if size > self._max_bytes:
            return
        self._values[key], self._sizes[key] = value, size
        self._num_bytes += size
        while len(self._values) > self._max_entries or self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._values)))

    def keep_versions(self, versions: Collection[str]) -> None:
        """Drop what belongs to any other version."""
        for key in [key for key in self._values if key[0] not in versions]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if self._values.pop(key, None) is not None:
            self._num_bytes -= self._sizes.pop(key)

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


def held_bytes(value: object) -> int:
    """About what a value holds in memory, with all that it is made of.

    Example:
        >>> held_bytes(("a" * 1000, np.zeros(1000))) > 9000
        True
    """
    if isinstance(value, np.ndarray):
        return int(value.nbytes) + sys.getsizeof(value)
    parts: Iterable[object] = ()
    if isinstance(value, Mapping):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (tuple, list)):
        parts = value
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    return sys.getsizeof(value) + sum(map(held_bytes, parts))


async def _run(compute: Callable[[], Awaitable[V]]) -> V:
    return await compute()
