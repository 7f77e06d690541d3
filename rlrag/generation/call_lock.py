"""A lock that keeps calls and weight updates apart, so that a call sees one set of weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CallLock:
    """Many calls at once, or one change of weights alone.

    A change waits for the calls that run, each of which has its own bound; calls that come later
    wait for the change, so that a stream of calls cannot hold it up. A pickled lock arrives free.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._num_calls = 0
        self._num_waiting = 0  # changes
        self._changing = False

    def __reduce__(self) -> tuple[Any, ...]:
        return CallLock, ()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold off changes of weights."""
        with self._condition:
            self._condition.wait_for(lambda: not self._num_waiting and not self._changing)
            self._num_calls += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_calls -= 1
                self._condition.notify_all()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Hold off calls and other changes."""
        with self._condition:
            self._num_waiting += 1
            try:
                self._condition.wait_for(lambda: not self._num_calls and not self._changing)
                self._changing = True
            finally:
                self._num_waiting -= 1
        try:
            yield
        finally:
            with self._condition:
                self._changing = False
                self._condition.notify_all()
