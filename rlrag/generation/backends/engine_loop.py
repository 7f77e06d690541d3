"""Runs an engine in a thread: accepts prompts at any time and streams the answers.

One thread steps the engine while a request is unfinished and sleeps otherwise. Requests join and
leave between two steps, which is what lets an engine with a scheduler batch them as they come.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field

from rlrag.errors import GenerationError, GeneratorTimeoutError
from rlrag.generation.backends.stepping import Stepper, Update
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Request:
    """One answer on its way. The queue has no bound: `max_new_tokens` bounds what goes into it."""

    name: str
    prompt: Prompt
    sampling: Sampling
    event_loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Update | GenerationError] = field(default_factory=asyncio.Queue)


class EngineLoop:
    """Owns the calls to an engine, not the engine: close the engine after the loop.

    While a loop runs, nobody else may call its engine.

    Args:
        stepper: The engine.
        update_timeout_s: Longest wait for the next piece of an answer, and longest step of an
            engine that counts as working.
    """

    def __init__(self, stepper: Stepper, update_timeout_s: float = 300.0) -> None:
        self._stepper = stepper
        self._timeout_s = update_timeout_s
        self._names = map(str, itertools.count())
        self._changed = threading.Condition()
        # Guarded by `_changed`: requests that the engine has yet to hear of, those that it works
        # on, and names of those that it has yet to forget.
        self._new: dict[str, _Request] = {}
        self._running: dict[str, _Request] = {}
        self._left: list[str] = []
        self._failure: str | None = None
        self._closing = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Update, None]:
        """The answer as it is decoded.

        Closing the iterator, or cancelling who waits for it, frees the engine's slot. A slow
        consumer holds nobody up: what was decoded meanwhile comes in one update.

        Raises:
            GenerationError: when the engine refuses the prompt or has failed.
            GeneratorTimeoutError: when no piece came for `update_timeout_s`.
        """
        request = _Request(next(self._names), prompt, sampling, asyncio.get_running_loop())
        self._submit(request)
        try:
            finished = False
            while not finished:
                update = await self._next_update(request)
                finished = update.finished
                yield update
        finally:
            self._withdraw(request)

    def failure(self) -> str | None:
        """Why no request can be answered any more; None while the engine works."""
        since = self._busy_since
        if self._failure is None and since is not None:
            busy_s = time.monotonic() - since
            if busy_s > self._timeout_s:
                return f"the engine has not come back from a step for {busy_s:.0f} s"
        return self._failure

    def num_unfinished(self) -> int:
        """Requests that wait or are being answered."""
        with self._changed:
            return len(self._new) + len(self._running)

    def close(self, timeout_s: float = 60.0) -> None:
        """End the thread after the present step; unanswered requests get an error.

        Raises:
            GeneratorTimeoutError: when the step takes longer than `timeout_s`.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._fail("it was closed")
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise GeneratorTimeoutError(
                f"the engine did not end its step within {timeout_s:g} s; end its process"
            )

    def _submit(self, request: _Request) -> None:
        with self._changed:
            if self._failure is not None:
                raise _unanswered(self._failure)
            self._new[request.name] = request
            self._changed.notify()

    def _withdraw(self, request: _Request) -> None:
        """Nothing where the request has ended."""
        with self._changed:
            if self._new.pop(request.name, None) is not None:
                return
            if self._running.pop(request.name, None) is not None:
                self._left.append(request.name)
                self._changed.notify()

    async def _next_update(self, request: _Request) -> Update:
        try:
            async with asyncio.timeout(self._timeout_s):
                items = [await request.items.get()]
        except TimeoutError as error:
            raise GeneratorTimeoutError(
                f"no piece of the answer came within {self._timeout_s:g} s while "
                f"{self.num_unfinished()} requests were unfinished; send fewer at once, or raise "
                "generator.request_timeout_s"
            ) from error
        while not request.items.empty():
            items.append(request.items.get_nowait())
        updates = []
        for item in items:
            if isinstance(item, GenerationError):
                raise item
            updates.append(item)
        last = updates[-1]
        text = "".join(update.text for update in updates)
        return Update(text, last.logp, last.num_tokens, last.finished)

    def _run(self) -> None:
        try:
            while self._take_in():
                self._hand_out(self._stepper.step())
        except Exception as error:
            logger.exception("the engine failed")
            self._fail(f"{type(error).__name__}: {error}")

    def _take_in(self) -> bool:
        """Wait for work, and tell the engine who came and who left; False when it is to end."""
        with self._changed:
            self._busy_since = None
            self._changed.wait_for(
                lambda: self._closing or self._new or self._left or self._running
            )
            if self._closing:
                return False
            new, left = self._new, self._left
            self._new, self._left = {}, []
            self._running |= new
            self._busy_since = time.monotonic()
        for name in left:
            self._stepper.abort(name)
        for request in new.values():
            try:
                self._stepper.begin(request.name, request.prompt, request.sampling)
            except GenerationError as error:
                with self._changed:
                    self._running.pop(request.name, None)
                self._deliver([(request, error)])
        return True

    def _hand_out(self, updates: Iterable[tuple[str, Update | GenerationError]]) -> None:
        items: list[tuple[_Request, Update | GenerationError]] = []
        with self._changed:
            for name, update in updates:
                request = self._running.get(name)
                if request is None:  # withdrawn during the step
                    continue
                if isinstance(update, GenerationError) or update.finished:
                    del self._running[name]
                items.append((request, update))
        self._deliver(items)

    def _deliver(self, items: Iterable[tuple[_Request, Update | GenerationError]]) -> None:
        """Wake each event loop once, whatever number of its requests have news."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Request, Update | GenerationError]]]
        by_loop = {}
        for request, item in items:
            by_loop.setdefault(request.event_loop, []).append((request, item))
        for event_loop, news in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(_put, news)
            except RuntimeError:  # the event loop was closed, so nobody waits there any more
                for request, _ in news:
                    self._withdraw(request)

    def _fail(self, why: str) -> None:
        """Refuse requests from now on, those that wait included. The first reason stands."""
        with self._changed:
            if self._failure is None:
                self._failure = why
            why = self._failure
            waiting = [*self._new.values(), *self._running.values()]
            self._new, self._running = {}, {}
        self._deliver((request, _unanswered(why)) for request in waiting)


def _put(news: Iterable[tuple[_Request, Update | GenerationError]]) -> None:
    for request, item in news:
        request.items.put_nowait(item)


def _unanswered(why: str) -> GenerationError:
    return GenerationError(f"the engine no longer answers requests ({why}); create a new one")
