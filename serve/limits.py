"""Questions and keys in; room for a question, or a refusal, out."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from rlrag.errors import ConfigError, OverloadedError
from serve.metrics import Metrics


class Admission:
    """Room for so many questions at once, and for so many more to wait, first come first served.

    Args:
        max_in_flight: Questions worked on at once.
        max_waiting: Questions that may wait for room; one more is refused.
        metrics: Shows how many are worked on and wait, and counts refusals.
    """

    def __init__(self, max_in_flight: int, max_waiting: int, metrics: Metrics) -> None:
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._room = asyncio.Semaphore(max_in_flight)
        self._num_waiting = 0

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
            self._room.release()

    async def _enter(self, patient: bool) -> None:
        if not self._room.locked():
            await self._room.acquire()
            return
        if self._num_waiting >= self._max_waiting and not patient:
            self._metrics.rejected()
            raise OverloadedError(
                f"{self._max_in_flight} questions are under way and {self._num_waiting} wait; try "
                "again in a moment"
            )
        self._num_waiting += 1
        try:
            with self._metrics.waiting.track_inprogress():
                await self._room.acquire()
        finally:
            self._num_waiting -= 1


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
            raise ConfigError(f"the environment has no variable {variable} to take keys from")
        found += os.environ[variable].split()
    if not found:
        raise ConfigError(f"there is no key in {file or variable}; give one a line")
    return Keys(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
