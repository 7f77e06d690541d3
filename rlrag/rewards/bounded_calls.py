"""Calls of one custom function in, its values or why there are none out, in bounded time.

A Python thread cannot be killed. A call that runs past its time therefore keeps its thread. The
next call waits for it as long again: where it has ended by then it was merely slow, and its
function goes on; otherwise the function counts as broken, and every later call fails at once. All
threads are daemons, so that a hung one does not keep the process from ending. A call that holds the
interpreter's lock (an endless loop inside a C extension) cannot be bounded from within the process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOOP_GRACE_S = 1.0
"""An event loop that answers this much later than its calls' time limit counts as blocked."""

Keywords = Mapping[str, Any]
_Request = tuple[concurrent.futures.Future[Any], Callable[..., Any], Keywords]


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Why a call gave no value."""

    cause: str


def describe_exception(error: BaseException) -> str:
    """Class, message and the place where it was raised.

    Example:
        >>> describe_exception(ValueError("too short"))
        'ValueError: too short'
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _still_running(timeout_s: float) -> CallFailure:
    return CallFailure(
        f"an earlier call ran past its limit of {timeout_s:g} s and cannot be ended, so the "
        "function is not called again; mend it or raise reward.timeout_s, and start anew"
    )


class ThreadCalls:
    """Calls a synchronous function in a thread of its own, one call at a time."""

    def __init__(self, function: Callable[..., Any], timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._requests: queue.SimpleQueue[_Request | None] | None = None
        self._late: concurrent.futures.Future[Any] | None = None
        self._is_broken = False

    def __call__(self, calls: Sequence[Keywords]) -> list[Any]:
        """One value or `CallFailure` for each call, in order."""
        return [self._call(keywords) for keywords in calls]

    def _call(self, keywords: Keywords) -> Any:
        with self._turn:  # held for at most twice the time limit
            if self._late is not None:
                concurrent.futures.wait([self._late], timeout=self._timeout_s)
                self._is_broken = not self._late.done()
                self._late = None
            if self._is_broken:
                return _still_running(self._timeout_s)
            if self._requests is None:
                self._requests = self._start()
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            self._requests.put((future, self._function, keywords))
            concurrent.futures.wait([future], timeout=self._timeout_s)
            if not future.done():
                self._late = future
                return CallFailure(f"ran past its limit of {self._timeout_s:g} s")
        error = future.exception()
        return future.result() if error is None else CallFailure(describe_exception(error))

    def _start(self) -> queue.SimpleQueue[_Request | None]:
        requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(requests,), name="custom-reward", daemon=True).start()
        weakref.finalize(self, requests.put, None)
        return requests


def _serve(requests: queue.SimpleQueue[_Request | None]) -> None:
    while (request := requests.get()) is not None:
        future, function, keywords = request
        try:
            future.set_result(function(**keywords))
        except BaseException as error:  # noqa: BLE001 - carried to the caller, SystemExit too
            future.set_exception(error)


class LoopCalls:
    """Calls an `async def` function concurrently, in an event loop that lives in its own thread.

    All calls of a batch start together and each may take the time limit. One that overruns is
    cancelled and the function may be called again. A function that blocks the loop itself counts
    as broken.
    """

    def __init__(self, function: Callable[..., Awaitable[Any]], timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_broken = False

    def __call__(self, calls: Sequence[Keywords]) -> list[Any]:
        """One value or `CallFailure` for each call, in order."""
        if not calls:
            return []
        with self._turn:
            if self._is_broken:
                return [_still_running(self._timeout_s)] * len(calls)
            if self._loop is None:
                self._loop = self._start()
            batch = _gather(self._function, calls, self._timeout_s)
            future = asyncio.run_coroutine_threadsafe(batch, self._loop)
            concurrent.futures.wait([future], timeout=self._timeout_s + LOOP_GRACE_S)
            if not future.done():
                self._is_broken = True
                cause = f"blocked its event loop past the limit of {self._timeout_s:g} s"
                return [CallFailure(cause)] * len(calls)
        return future.result()

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(
            target=_run_forever, args=(loop,), name="custom-reward-loop", daemon=True
        ).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
        return loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_the_rest())
    finally:
        loop.close()


async def _cancel_the_rest() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _gather(
    function: Callable[..., Awaitable[Any]], calls: Sequence[Keywords], timeout_s: float
) -> list[Any]:
    tasks = [asyncio.create_task(_await_one(function(**keywords))) for keywords in calls]
    await asyncio.wait(tasks, timeout=timeout_s)
    outcomes = [_outcome(task, timeout_s) for task in tasks]
    for task in tasks:
        task.cancel()
    return outcomes


async def _await_one(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except (SystemExit, KeyboardInterrupt) as error:
        # asyncio would let these two end the loop, and every other call with it.
        raise RuntimeError(f"{type(error).__name__} raised inside a reward function") from error


def _outcome(task: asyncio.Task[Any], timeout_s: float) -> Any:
    if not task.done():
        return CallFailure(f"ran past its limit of {timeout_s:g} s")
    if task.cancelled():
        return CallFailure("was cancelled")
    error = task.exception()
    return task.result() if error is None else CallFailure(describe_exception(error))
