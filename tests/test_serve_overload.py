"""More questions than can be answered, for a while: some are answered, the others refused."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator

from serve_stand_ins import NumberPipeline, Served

from rlrag.records import Passage
from rlrag.serving.records import AnswerPiece, Decoding

NUM_AT_ONCE, ANSWER_S = 4, 0.04
CAPACITY = NUM_AT_ONCE / ANSWER_S
EXTRA_RATE = 200.0


class BusyPipeline(NumberPipeline):
    """Decodes four answers at a time, each for 40 ms: 100 a second."""

    def __init__(self) -> None:
        super().__init__()
        self._slots = asyncio.Semaphore(NUM_AT_ONCE)

    async def generate(
        self, version: str, question: str, passages: tuple[Passage, ...], decoding: Decoding
    ) -> AsyncIterator[AnswerPiece]:
        async with self._slots:
            await asyncio.sleep(ANSWER_S)
            async for piece in super().generate(version, question, passages, decoding):
                yield piece


async def flood(served: Served, seconds: float) -> Counter[int]:
    """Statuses of requests that begin at a rate, whatever is under way; a tenth are streamed."""
    statuses: Counter[int] = Counter()

    async def ask(number: int) -> None:
        reply = await served.ask(f"number {number}?", stream=number % 10 == 0)
        statuses[reply.status_code] += 1
        if reply.status_code == 503:
            assert reply.headers["retry-after"] == "1"
            assert reply.json()["type"] == "urn:rlrag:overloaded"
        elif number % 10 == 0:
            assert "event: answer" in reply.text

    rate, start = CAPACITY + EXTRA_RATE, time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
            group.create_task(ask(number))
    await served.settled()
    return statuses


def num_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_an_overload_is_refused_in_part_leaves_nothing_behind_and_ends_with_its_cause() -> None:
    async def run() -> None:
        served = Served(
            pipeline=BusyPipeline(),
            limits__max_in_flight=2 * NUM_AT_ONCE,
            limits__max_waiting=2 * NUM_AT_ONCE,
            caches__answers=0,
            caches__candidates=0,
        )
        # The newest requests are kept, so that some must have come before memory stands still.
        await flood(served, 1)
        before = num_objects()
        statuses = await flood(served, 4)
        assert set(statuses) == {200, 503}
        assert served.pipeline.most_engines <= NUM_AT_ONCE
        assert num_objects() - before < sum(statuses.values()) / 10
        assert len(asyncio.all_tasks()) == 1
        text = (await served.client.get("/metrics")).text
        assert "rlrag_in_flight 0.0" in text
        assert "rlrag_waiting 0.0" in text
        again = await asyncio.gather(*(served.ask(f"again {n}?") for n in range(4 * NUM_AT_ONCE)))
        assert {reply.status_code for reply in again} == {200}

    asyncio.run(run())
