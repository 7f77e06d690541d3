"""Limits of the HTTP interface: concurrent and waiting requests, host names, API keys."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

from rlrag.errors import ConfigError, OverloadedError
from rlrag.serving.http.metrics import Metrics

_LOG = logging.getLogger("rlrag.serve")
_PORT = re.compile(r":[0-9]*$")


class Admission:
    """Room for so many questions at once, and for so many more to wait.

    Questions that came alone wait in one queue, and the later ones of batches in another; room is
    given to the two in turns, to the first in each, so that no batch crowds out single questions
    and no flood of these holds up a batch.

    Args:
        max_in_flight: Questions worked on at once.
        max_waiting: Questions that may wait in the first queue; one more is refused.
        metrics: Shows how many are worked on and wait, and counts refusals.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, metrics: Metrics) -> None:
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._num_free = max_in_flight
        self._queues: tuple[deque[asyncio.Future[None]], ...] = (deque(), deque())
        self._turn = 0

    @asynccontextmanager
    async def slot(self, patient: bool = False) -> AsyncIterator[None]:
        """Room for one question while the block runs.

        Args:
            patient: Wait even where too many do: for the later questions of a request that has
                been let in.

        Raises:
            OverloadedError: when too many wait.
        """
        await self._enter(patient)
        try:
            with self._metrics.in_flight.track_inprogress():
                yield
        finally:
            self._leave()

    def check(self, batch: bool = False) -> None:
        """Refuse a request for which there is no room; of a batch, also where too many wait.

        Raises:
            OverloadedError: when there is none.
        """
        num_waiting = len(self._queues[0])
        if self._num_free == 0 and num_waiting >= self._max_waiting:
            self._refuse(
                f"{self._max_in_flight} questions are in progress and {num_waiting} are waiting"
            )
        if batch and len(self._queues[1]) > self._max_waiting:
            self._refuse(f"{len(self._queues[1])} questions of other batches are waiting")

    def _refuse(self, why: str) -> NoReturn:
        self._metrics.rejected()
        raise OverloadedError(f"{why}; try again in a moment")

    async def _enter(self, patient: bool) -> None:
        if self._num_free and not any(self._queues):
            self._num_free -= 1
            return
        if not patient:
            self.check()
        queue, place = self._queues[patient], asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            with self._metrics.waiting.track_inprogress():
                await place
        except asyncio.CancelledError:
            if place.cancelled():
                queue.remove(place)
            else:
                self._leave()  # room was given at the moment of leaving
            raise

    def _leave(self) -> None:
        """Give room to the first who still waits, in the queue whose turn it is."""
        for turn in (self._turn, 1 - self._turn):
            for place in self._queues[turn]:
                if not place.done():
                    self._queues[turn].remove(place)
                    self._turn = 1 - turn
                    place.set_result(None)
                    return
        self._num_free += 1


class Hosts:
    """Names under which the service may be asked.

    A page of another site that has its name lead here (DNS rebinding) asks under that name, never
    under an address; so addresses are let in, and names must be known.

    Args:
        names: Known besides `localhost` and names below it; `*` takes any.

    Example:
        >>> hosts = Hosts(["rag.example.org"])
        >>> [hosts.know(host) for host in ("127.0.0.1:8000", "[::1]", "RAG.example.org.:80")]
        [True, True, True]
        >>> [hosts.know(host) for host in ("evil.example", "rag.example.org.evil.example", "")]
        [False, False, False]
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in names)

    def know(self, host: str) -> bool:
        """Whether a `Host` header, with or without a port, names the service."""
        if "*" in self._names:
            return True
        name = _PORT.sub("", host.strip()).lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


class Keys:
    """A set of keys that is compared in a time that tells nothing about them.

    Args:
        keys: The keys that fit.

    Example:
        >>> Keys(["s3cret"]).fit("s3cret"), Keys(["s3cret"]).fit("guess"), Keys([]).fit("")
        (True, False, False)
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def fit(self, key: str) -> bool:
        """Whether this is one of the keys; all of them are compared in any case."""
        digest = _digest(key)
        return any([hmac.compare_digest(digest, known) for known in self._digests])


class KeyFile:
    """Keys of a file, which is read again when it changes, and of an environment variable.

    A key is revoked by taking it out of the file. A file that holds no key any more, or cannot be
    read, lets nobody in until it does again.

    Args:
        file: One key a line.
        variable: Keys as words.

    Raises:
        ConfigError: see `read_keys`.
    """

    def __init__(self, file: str | None, variable: str | None) -> None:
        self._file = file
        self._variable = variable
        self._seen = self._state()
        self._keys = read_keys(file, variable) or Keys([])

    def fit(self, key: str) -> bool:
        """Whether this is one of the keys now."""
        state = self._state()
        if state != self._seen:
            self._seen = state
            try:
                self._keys = read_keys(self._file, self._variable) or Keys([])
                _LOG.info("reloaded the keys in %s", self._file)
            except ConfigError as error:
                self._keys = Keys([])
                _LOG.error("no key is valid any more: %s", error)
        return self._keys.fit(key)

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else ()


def open_keys(file: str | None, variable: str | None) -> KeyFile | None:
    """The keys that settings name; None where they name none.

    Raises:
        ConfigError: see `read_keys`.
    """
    return None if file is None and variable is None else KeyFile(file, variable)


def fingerprint(key: str) -> str:
    """What stands for a key in logs: eight characters of its SHA-256, in hexadecimal."""
    return _digest(key).hex()[:8]


def read_keys(file: str | None, variable: str | None) -> Keys | None:
    """The keys of a file with one a line and of an environment variable with some a word.

    None where neither is named. Blank lines and those that begin with `#` hold no key.

    Raises:
        ConfigError: when a named file cannot be read, a named variable is unset, or there is no key
            in either, since a service that was to be closed would be open to nobody or to all.
    """
    if file is None and variable is None:
        return None
    found: list[str] = []
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the key file {file} cannot be read: {error}") from error
        found += [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if variable is not None:
        if variable not in os.environ:
            raise ConfigError(
                f"the environment variable {variable}, which should contain the keys, is not set"
            )
        found += os.environ[variable].split()
    if not found:
        raise ConfigError(f"{file or variable} contains no key; give one per line")
    return Keys(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
