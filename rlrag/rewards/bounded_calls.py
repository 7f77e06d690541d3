"""Calls custom functions concurrently, each with a time limit.

A Python thread cannot be killed, so that a call that runs past its time keeps its thread. All
threads are daemons: a hung one does not keep the process from ending. A call that holds the
interpreter's lock (an endless loop inside a C extension) cannot be bounded from within the process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        f"earlier calls ran past their limit of {timeout_s:g} s and cannot be ended, so the "
        "function is not called again; mend it or raise reward.timeout_s, and start anew"
    )


class ThreadCalls:
    """Calls a synchronous function in threads, several calls at once.

    Each call may take the time limit, counted from its own start. One that overruns keeps its
    thread until it ends; where every thread is kept so, the rest waits for them once more, and then
    the function counts as broken.
    """

    def __init__(self, function: Callable[..., Any], timeout_s: float, at_once: int) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._turn = threading.Lock()
        self._free: list[queue.SimpleQueue[_Request | None]] = []
        self._late: dict[concurrent.futures.Future[Any], queue.SimpleQueue[_Request | None]] = {}
        self._num_unstarted = at_once

    def __call__(self, calls: Sequence[Keywords]) -> list[Any]:
        """One value or `CallFailure` for each call, in order."""
        outcomes: list[Any] = [_still_running(self._timeout_s)] * len(calls)
        waiting = deque(enumerate(calls))
        running: dict[concurrent.futures.Future[Any], _Running] = {}
        with self._turn:
            while waiting or running:
                while waiting and (lane := self._lane()) is not None:
                    place, keywords = waiting.popleft()
                    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
                    lane.put((future, self._function, keywords))
                    running[future] = _Running(place, lane, time.monotonic() + self._timeout_s)
                if not running:  # every thread is kept by a call that overran
                    concurrent.futures.wait(self._late, self._timeout_s, "FIRST_COMPLETED")
                    if not any(future.done() for future in self._late):
                        break
                    continue
                self._collect(running, outcomes)
        return outcomes

    def _collect(
        self, running: dict[concurrent.futures.Future[Any], _Running], outcomes: list[Any]
    ) -> None:
        """Wait until a call ends or overruns, and note what became of it."""
        first = min(call.deadline for call in running.values())
        left_s = max(0.0, first - time.monotonic())
        done, _ = concurrent.futures.wait(running, left_s, "FIRST_COMPLETED")
        for future in done:
            call, error = running.pop(future), future.exception()
            self._free.append(call.lane)
            outcomes[call.place] = (
                future.result() if error is None else CallFailure(describe_exception(error))
            )
        now = time.monotonic()
        for future in [f for f, call in running.items() if call.deadline <= now]:
            call = running.pop(future)
            self._late[future] = call.lane
            outcomes[call.place] = CallFailure(f"ran past its limit of {self._timeout_s:g} s")

    def _lane(self) -> queue.SimpleQueue[_Request | None] | None:
        """The requests of a thread that is free, None where all are busy."""
        for future in [future for future in self._late if future.done()]:
            self._free.append(self._late.pop(future))
        if self._free:
            return self._free.pop()
        if not self._num_unstarted:
            return None
        self._num_unstarted -= 1
        requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(requests,), name="custom-reward", daemon=True).start()
        weakref.finalize(self, requests.put, None)
        return requests


class _Running(NamedTuple):
    """A call under way: its place in the batch, its thread, and when it overruns."""

    place: int
    lane: queue.SimpleQueue[_Request | None]
    deadline: float


def _serve(requests: queue.SimpleQueue[_Request | None]) -> None:
    while (request := requests.get()) is not None:
        future, function, keywords = request
        try:
            future.set_result(function(**keywords))
        except BaseException as error:  # noqa: BLE001 - carried to the caller, SystemExit too
            future.set_exception(error)


class LoopCalls:
    """Calls an `async def` function concurrently, in an event loop that lives in its own thread.

    Each call may take the time limit, counted from its own start. One that overruns is cancelled
    and the function may be called again. A function that blocks the loop itself counts as broken.
    """

    def __init__(
        self, function: Callable[..., Awaitable[Any]], timeout_s: float, at_once: int
    ) -> None:
        self._function = function
        self._timeout_s = timeout_s
        self._at_once = at_once
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
            batch = _gather(self._function, calls, self._timeout_s, self._at_once)
            future = asyncio.run_coroutine_threadsafe(batch, self._loop)
            longest_s = self._timeout_s * math.ceil(len(calls) / self._at_once)
            concurrent.futures.wait([future], timeout=longest_s + LOOP_GRACE_S)
            if not future.done():
                self._is_broken = True
                cause = f"blocked its event loop past the limit of {self._timeout_s:g} s a call"
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
    function: Callable[..., Awaitable[Any]],
    calls: Sequence[Keywords],
    timeout_s: float,
    at_once: int,
) -> list[Any]:
    room = asyncio.Semaphore(at_once)
    return await asyncio.gather(
        *(_await_one(function, keywords, timeout_s, room) for keywords in calls)
    )


async def _await_one(
    function: Callable[..., Awaitable[Any]],
    keywords: Keywords,
    timeout_s: float,
    room: asyncio.Semaphore,
) -> Any:
    async with room:
        task = asyncio.create_task(_shielded(function(**keywords)))
        await asyncio.wait([task], timeout=timeout_s)
        outcome = _outcome(task, timeout_s)
        task.cancel()  # not awaited: a call may refuse
        return outcome


async def _shielded(call: Awaitable[Any]) -> Any:
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
