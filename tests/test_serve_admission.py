"""Room for so many questions: who waits, who is refused, and whose turn it is."""

from __future__ import annotations

import asyncio

import pytest

from rlrag.errors import OverloadedError
from rlrag.serving.http.limits import Admission
from rlrag.serving.http.metrics import Metrics


async def hold(room: Admission, release: asyncio.Event, order: list[int], name: int) -> None:
    async with room.slot():
        order.append(name)
        await release.wait()


def test_room_is_given_in_the_order_of_arrival_and_one_too_many_is_refused() -> None:
    async def run() -> None:
        room, release, order = Admission(2, 2, Metrics()), asyncio.Event(), list[int]()
        tasks = []
        for name in range(4):
            tasks.append(asyncio.ensure_future(hold(room, release, order, name)))
            await asyncio.sleep(0)
        assert order == [0, 1]
        with pytest.raises(OverloadedError, match="2 questions are in progress and 2 are waiting"):
            async with room.slot():
                pass
        release.set()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]
        async with room.slot(), room.slot():
            pass

    asyncio.run(run())


def test_who_leaves_the_queue_frees_its_place() -> None:
    async def run() -> None:
        room, release, order = Admission(1, 1, Metrics()), asyncio.Event(), list[int]()
        first = asyncio.ensure_future(hold(room, release, order, 0))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(hold(room, release, order, 1))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait((second,))
        third = asyncio.ensure_future(hold(room, release, order, 2))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, third)
        assert order == [0, 2]

    asyncio.run(run())


def test_a_patient_question_waits_where_others_are_refused() -> None:
    async def run() -> None:
        room, release, order = Admission(1, 0, Metrics()), asyncio.Event(), list[int]()
        first = asyncio.ensure_future(hold(room, release, order, 0))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            async with room.slot():
                pass
        release.set()
        async with room.slot(patient=True):
            assert first.done()

    asyncio.run(run())


def test_a_batch_and_single_questions_take_turns() -> None:
    async def run() -> None:
        room, order, gate = Admission(1, 2, Metrics()), list[str](), asyncio.Event()

        async def work(name: str, patient: bool) -> None:
            async with room.slot(patient):
                await gate.wait()
                order.append(name)

        first = asyncio.ensure_future(work("first", False))
        await asyncio.sleep(0)
        batch = [asyncio.ensure_future(work(f"b{n}", True)) for n in range(4)]
        await asyncio.sleep(0)
        single = [asyncio.ensure_future(work(f"s{n}", False)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="1 questions are in progress and 2 are waiting"):
            room.check()
        batch[0].cancel()
        await asyncio.sleep(0)
        room_for_batches = pytest.raises(OverloadedError, match="3 questions of other batches")
        single[1].cancel()
        await asyncio.sleep(0)
        room.check()
        with room_for_batches:
            room.check(batch=True)
        gate.set()
        await asyncio.gather(first, *batch[1:], single[0])
        assert order == ["first", "s0", "b1", "b2", "b3"]
        async with room.slot():
            pass

    asyncio.run(run())
