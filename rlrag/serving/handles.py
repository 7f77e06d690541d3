"""Calls retriever, selector, generator and registry through Ray Serve handles.

What goes wrong between replicas becomes an error of this project: a replica that died, is missing
or is full is an `OverloadedError`. A call that failed because its replica died is made once more,
on another one, as long as nothing of its answer has been handed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)

from rlrag.errors import OverloadedError, RlragError
from rlrag.generation.pool.dispatch import ACTOR_ENDED
from rlrag.records import Passage
from rlrag.serving.records import AnswerPiece, Decoding, Filters, Picked, Retrieved
from rlrag.serving.versions.registry import Report, Wanted

_GONE = (*ACTOR_ENDED, ReplicaUnavailableError, RequestCancelledError)
_FULL = (BackPressureError, DeploymentUnavailableError)
_REGISTRY_TIMEOUT_S = 10.0

T = TypeVar("T")
Down = Callable[[str], asyncio.Event]
"""For a part's name the event that is set while no replica of it lives."""


class RayPipeline:
    """The parts of a service behind their handles; implements `ServedPipeline`.

    Args:
        retriever: Handle of the retriever deployment.
        selector: Handle of the selector deployment.
        generator: Handle of the generator deployment.
        down: Tells at once that a part cannot answer, so that nobody waits for its restart.
    """

    def __init__(self, retriever: Any, selector: Any, generator: Any, down: Down) -> None:
        self._retriever = retriever
        self._selector = selector
        self._generator = generator.options(stream=True)
        self._down = down

    async def retrieve(
        self, version: str, question: str, num_candidates: int | None, filters: Filters
    ) -> Retrieved:
        """See `ServedPipeline.retrieve`."""
        ask = self._retriever.retrieve.remote
        return await self._call(
            "retriever", lambda: ask(version, question, num_candidates, filters)
        )

    async def select(
        self,
        version: str,
        question: str,
        retrieved: Retrieved,
        num_selected: int | None,
        explore: bool,
    ) -> Picked:
        """See `ServedPipeline.select`."""
        ask = self._selector.select.remote
        return await self._call(
            "selector", lambda: ask(version, question, retrieved, num_selected, explore)
        )

    async def generate(
        self, version: str, question: str, passages: tuple[Passage, ...], decoding: Decoding
    ) -> AsyncIterator[AnswerPiece]:
        """See `ServedPipeline.generate`."""
        for tries_left in (1, 0):
            pieces = self._generator.generate.remote(version, question, passages, decoding)
            handed_on = False
            try:
                while True:
                    piece = await self._guarded("generator", anext(pieces))
                    if isinstance(piece, RlragError):
                        raise piece
                    handed_on = True
                    yield piece
            except StopAsyncIteration:
                return
            except _GONE as error:
                if handed_on or not tries_left:
                    raise _restarting("generator") from error
            except _FULL as error:
                raise _restarting("generator") from error
            except RayTaskError as error:
                raise _cause(error) from error
            finally:
                pieces.cancel()

    async def _call(self, part: str, ask: Callable[[], Awaitable[Any]]) -> Any:
        for tries_left in (1, 0):
            try:
                found = await self._guarded(part, ask())
            except _GONE as error:
                if not tries_left:
                    raise _restarting(part) from error
            except _FULL as error:
                raise _restarting(part) from error
            except RayTaskError as error:
                raise _cause(error) from error
            else:
                if isinstance(found, RlragError):
                    raise found
                return found

    async def _guarded(self, part: str, answer: Awaitable[T]) -> T:
        """The answer, unless no replica of the part lives."""
        event = self._down(part)
        if event.is_set():
            await _give_up(asyncio.ensure_future(answer))
            raise _restarting(part)
        call = asyncio.ensure_future(answer)
        down = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait((call, down), return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise _restarting(part)
            return call.result()
        finally:
            down.cancel()
            if not call.done():
                await _give_up(call)


async def tell_registry(registry: Any, report: Report) -> Wanted:
    """Bring a report to the registry.

    Raises:
        OverloadedError: when the registry is restarting or does not answer.
    """
    try:
        answer: Wanted = await asyncio.wait_for(registry.hear.remote(report), _REGISTRY_TIMEOUT_S)
    except (*_GONE, *_FULL, TimeoutError) as error:
        raise _restarting("registry of versions") from error
    except RayTaskError as error:
        raise _cause(error) from error
    return answer


async def _give_up(call: asyncio.Future[Any]) -> None:
    call.cancel()
    await asyncio.wait((call,), timeout=1.0)


def _restarting(part: str) -> OverloadedError:
    return OverloadedError(f"the {part} is restarting or full; try again in a moment")


def _cause(error: RayTaskError) -> Exception:
    """What a replica raised, without Ray's wrapping."""
    cause = error.cause
    return cause if isinstance(cause, RlragError) else error
