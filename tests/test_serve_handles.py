"""What goes wrong between replicas becomes an error of the project, after one more try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError

from rlrag.errors import OverloadedError, RequestError
from rlrag.serving.handles import RayPipeline, tell_registry
from rlrag.serving.records import AnswerPiece, Decoding, Filters, Routing
from rlrag.serving.versions.registry import Report, Wanted

Outcome = Any
"""What a call gives: an exception is raised, a callable is awaited, all else is returned."""


class Calls:
    """A method of a handle; each call takes the next outcome."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = list(outcomes)
        self.num_calls = 0

    async def _answer(self, outcome: Outcome) -> Any:
        if isinstance(outcome, Exception) and type(outcome) is not RequestError:
            raise outcome
        return await outcome() if callable(outcome) else outcome

    def remote(self, *arguments: object) -> Any:
        self.num_calls += 1
        return self._answer(self._outcomes.pop(0))


class Stream:
    """Pieces of an answer, and then perhaps an error."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = self._each(pieces)
        self.cancelled = False

    async def _each(self, pieces: list[Any]) -> AsyncIterator[Any]:
        for piece in pieces:
            if isinstance(piece, Exception) and not isinstance(piece, RequestError):
                raise piece
            yield piece

    def __aiter__(self) -> Stream:
        return self

    def __anext__(self) -> Any:
        return self._pieces.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment's handle."""

    def __init__(self, *streams: Stream, **methods: Calls) -> None:
        self.streams = list(streams)
        self._waiting = list(streams)
        for name, calls in methods.items():
            setattr(self, name, calls)
        self.generate = self

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, *arguments: object) -> Stream:
        return self._waiting.pop(0)


def pipeline(
    retriever: Handle | None = None, generator: Handle | None = None, down: tuple[str, ...] = ()
) -> RayPipeline:
    events = {part: asyncio.Event() for part in ("retriever", "selector", "generator")}
    for part in down:
        events[part].set()
    empty = Handle()
    return RayPipeline(retriever or empty, empty, generator or empty, events.__getitem__)


def died() -> ActorDiedError:
    return ActorDiedError()


def out_of_memory() -> OutOfMemoryError:
    return OutOfMemoryError("the node runs low on memory")


ends = pytest.mark.parametrize("end", [died, out_of_memory])
"""How a replica dies: of itself, or ended by Ray."""


def retrieved(calls: Calls, down: tuple[str, ...] = ()) -> Any:
    async def ask() -> Any:
        asked = pipeline(Handle(retrieve=calls), down=down)
        return await asked.retrieve("v", "what?", None, Filters())

    return asyncio.run(ask())


def generated(*streams: Stream) -> list[AnswerPiece]:
    async def ask() -> list[AnswerPiece]:
        asked = pipeline(generator=Handle(*streams))
        return [piece async for piece in asked.generate("v", "what?", (), Decoding())]

    return asyncio.run(ask())


def piece(text: str, finished: bool = False) -> AnswerPiece:
    return AnswerPiece(text, -1.0, 1, 5, 1, 0, finished)


def test_an_answer_is_handed_on():
    assert retrieved(Calls("found")) == "found"


@ends
def test_a_call_whose_replica_died_is_made_once_more(end: Callable[[], RayError]):
    calls = Calls(end(), "found")
    assert retrieved(calls) == "found"
    assert calls.num_calls == 2
    with pytest.raises(OverloadedError, match="the retriever is restarting"):
        retrieved(Calls(end(), end()))


def test_a_full_part_is_not_asked_again():
    calls = Calls(BackPressureError(num_queued_requests=4, max_queued_requests=4))
    with pytest.raises(OverloadedError, match="full"):
        retrieved(calls)
    assert calls.num_calls == 1


def test_an_error_that_a_part_returned_is_raised_as_it_is():
    with pytest.raises(RequestError, match="num_candidates is 0"):
        retrieved(Calls(RequestError("num_candidates is 0")))


def test_an_error_that_a_part_raised_comes_without_its_wrapping():
    error = RayTaskError("retrieve", "a traceback", RequestError("too deep"))
    with pytest.raises(RequestError) as caught:
        retrieved(Calls(error.as_instanceof_cause()))
    assert str(caught.value) == "too deep"


def test_nobody_waits_for_a_part_that_is_down():
    async def endless() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(OverloadedError, match="the retriever is restarting"):
        retrieved(Calls(endless), down=("retriever",))


def test_who_waits_when_a_part_goes_down_is_told():
    async def ask() -> None:
        event = asyncio.Event()

        async def endless() -> None:
            event.set()
            await asyncio.sleep(3600)

        empty, handle = Handle(), Handle(retrieve=Calls(endless))
        asked = RayPipeline(handle, empty, empty, lambda part: event)
        with pytest.raises(OverloadedError):
            await asyncio.wait_for(asked.retrieve("v", "what?", None, Filters()), 20)

    asyncio.run(ask())


def test_pieces_are_handed_on_and_the_stream_is_let_go():
    stream = Stream([piece("Par"), piece("is", finished=True)])
    assert [found.text for found in generated(stream)] == ["Par", "is"]
    assert stream.cancelled


@ends
def test_a_stream_that_dies_before_its_first_piece_is_begun_again(end: Callable[[], RayError]):
    first, second = Stream([end()]), Stream([piece("Paris", finished=True)])
    assert [found.text for found in generated(first, second)] == ["Paris"]
    assert first.cancelled


@ends
def test_a_stream_that_dies_in_the_middle_is_not_repeated(end: Callable[[], RayError]):
    with pytest.raises(OverloadedError, match="the generator is restarting"):
        generated(Stream([piece("Par"), end()]))


def test_an_error_among_the_pieces_is_raised():
    with pytest.raises(RequestError, match="max_new_tokens"):
        generated(Stream([RequestError("max_new_tokens is 0")]))


def test_leaving_a_stream_lets_it_go():
    stream = Stream([piece("a"), piece("b"), piece("c", finished=True)])

    async def ask() -> None:
        pieces = pipeline(generator=Handle(stream)).generate("v", "what?", (), Decoding())
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(ask())
    assert stream.cancelled


@pytest.mark.parametrize(
    "outcome",
    [died, out_of_memory, lambda: BackPressureError(num_queued_requests=1, max_queued_requests=1)],
    ids=["died", "out_of_memory", "full"],
)
def test_a_registry_that_does_not_answer_is_asked_again_later(outcome: Callable[[], Exception]):
    async def tell() -> Wanted:
        return await tell_registry(Handle(hear=Calls(outcome())), Report("r", "ingress"))

    with pytest.raises(OverloadedError, match="registry of versions is restarting"):
        asyncio.run(tell())


def test_a_registry_that_answers_is_heard():
    wanted = Wanted({"v": "/bundles/v"}, Routing("v"))

    async def tell() -> Wanted:
        return await tell_registry(Handle(hear=Calls(wanted)), Report("r", "ingress"))

    assert asyncio.run(tell()) == wanted
