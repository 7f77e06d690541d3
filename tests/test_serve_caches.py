"""Values that are kept, computations that are shared, and those that are given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from rlrag.errors import OverloadedError
from rlrag.serving.caches import CallCache


class Work:
    """A computation that waits for `gate` and counts its runs and how many were cancelled."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.num_runs = self.num_cancelled = 0
        self.failure: Exception | None = None

    async def __call__(self) -> str:
        self.num_runs += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return f"value {self.num_runs}"


def make_cache(size: int, max_bytes: int = 2**20) -> tuple[CallCache[str], list[bool]]:
    hits: list[bool] = []
    return CallCache(size, max_bytes, hits.append), hits


def test_a_cache_is_bounded_by_what_it_holds_too() -> None:
    cache, _ = make_cache(100, max_bytes=100_000)
    for number in range(50):
        cache.put(("v1", ("x" * 9000, number)), "y" * 900)
    assert len(cache) == 9
    assert cache.find(("v1", ("x" * 9000, 49))) is not None
    cache.put(("v1", "large"), "y" * 200_000)
    assert cache.find(("v1", "large")) is None
    assert len(cache) == 9
    cache.keep_versions([])
    for number in range(9):
        cache.put(("v2", ("x" * 9000, number)), "y" * 900)
    assert len(cache) == 9


def value_of(text: str) -> Callable[[], Awaitable[str]]:
    async def compute() -> str:
        return text

    return compute


async def started(tasks: list[asyncio.Task[tuple[str, bool]]]) -> list[asyncio.Task]:
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


def test_a_value_is_computed_once_and_then_found() -> None:
    async def run() -> None:
        cache, hits = make_cache(2)
        assert await cache.get(("v1", "a"), value_of("A")) == ("A", False)
        assert await cache.get(("v1", "a"), value_of("other")) == ("A", True)
        assert await cache.get(("v2", "a"), value_of("B")) == ("B", False)
        assert hits == [False, True, False]

    asyncio.run(run())


def test_the_value_unused_for_longest_goes_first() -> None:
    async def run() -> None:
        cache, _ = make_cache(2)
        for name in ("a", "b"):
            await cache.get(("v", name), value_of(name))
        await cache.get(("v", "a"), value_of("again"))
        await cache.get(("v", "c"), value_of("c"))
        assert len(cache) == 2
        assert cache.find(("v", "a")) == "a"
        assert cache.find(("v", "b")) is None

    asyncio.run(run())


def test_a_cache_without_room_shares_and_counts_nothing() -> None:
    async def run() -> None:
        cache, hits = make_cache(0)
        assert await cache.get(("v", "a"), value_of("1")) == ("1", False)
        assert await cache.get(("v", "a"), value_of("2")) == ("2", False)
        cache.put(("v", "a"), "3")
        assert cache.find(("v", "a")) is None
        assert not hits

    asyncio.run(run())


def test_values_of_versions_out_of_use_go() -> None:
    async def run() -> None:
        cache, _ = make_cache(9)
        for version in ("v1", "v2", "v3"):
            cache.put((version, "a"), version)
        cache.keep_versions({"v2"})
        assert [cache.find((version, "a")) for version in ("v1", "v2", "v3")] == [None, "v2", None]

    asyncio.run(run())


def test_equal_calls_at_one_time_share_one_computation() -> None:
    async def run() -> None:
        cache, work = make_cache(9)[0], Work()
        calls = [asyncio.ensure_future(cache.get(("v", "a"), work)) for _ in range(3)]
        await started(calls)
        work.gate.set()
        assert await asyncio.gather(*calls) == [
            ("value 1", False),
            ("value 1", True),
            ("value 1", True),
        ]
        assert work.num_runs == 1

    asyncio.run(run())


def test_a_computation_outlives_whoever_began_it_and_ends_with_the_last_one() -> None:
    async def run() -> None:
        cache, work = make_cache(9)[0], Work()
        first, second, third = await started(
            [asyncio.ensure_future(cache.get(("v", "a"), work)) for _ in range(3)]
        )
        first.cancel()
        await asyncio.wait((first,))
        assert work.num_cancelled == 0
        for call in (second, third):
            call.cancel()
        await asyncio.wait((second, third))
        assert work.num_cancelled == 1
        work.gate.set()
        assert await cache.get(("v", "a"), work) == ("value 2", False)

    asyncio.run(run())


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    async def run() -> None:
        cache, work = make_cache(9)[0], Work()
        work.failure = OverloadedError("full")
        calls = await started([asyncio.ensure_future(cache.get(("v", "a"), work)) for _ in "12"])
        work.gate.set()
        for call in calls:
            with pytest.raises(OverloadedError, match="full"):
                await call
        work.failure = None
        assert await cache.get(("v", "a"), work) == ("value 2", False)

    asyncio.run(run())
