"""Replicas load what they are told, report it, and survive a registry that does not answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rlrag.errors import CheckpointError, OverloadedError
from rlrag.serving.records import Routing
from rlrag.serving.versions.registry import Report, Wanted
from rlrag.serving.versions.replicas import PartReporter, RoutingReporter


class PartInMemory:
    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self._broken = broken
        self._loaded: list[str] = []

    def loaded(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, version: str, directory: Path) -> None:
        if version in self._broken:
            raise CheckpointError(f"{directory} is damaged")
        self._loaded.append(version)

    def drop(self, version: str) -> None:
        self._loaded.remove(version)

    def mend(self) -> None:
        self._broken = ()


class RegistryInMemory:
    def __init__(self, *versions: str) -> None:
        self.wanted = Wanted({v: f"/bundles/{v}" for v in versions}, Routing(versions[0]))
        self.reports: list[Report] = []
        self.answers = True

    async def tell(self, report: Report) -> Wanted:
        self.reports.append(report)
        if not self.answers:
            raise OverloadedError("the registry is restarting")
        return self.wanted


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_part_loads_what_serves_before_it_is_ready():
    async def scenario() -> None:
        part, registry = PartInMemory(), RegistryInMemory("a", "b")
        reporter = PartReporter("selector", "s1", part, registry.tell)
        await reporter.start()
        assert part.loaded() == ("a", "b")
        reporter.stop()

    asyncio.run(scenario())


def test_a_part_whose_bundle_is_broken_does_not_start():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = PartReporter("selector", "s1", PartInMemory(("a",)), registry.tell)
        with pytest.raises(CheckpointError, match="selector cannot load version a from /bundles/a"):
            await reporter.start()

    asyncio.run(scenario())


def test_a_part_follows_what_it_is_told_later():
    async def scenario() -> None:
        part, registry = PartInMemory(broken=("c",)), RegistryInMemory("a")
        reporter = PartReporter("selector", "s1", part, registry.tell)
        await reporter.start()
        registry.wanted = Wanted({v: f"/bundles/{v}" for v in ("a", "b", "c")}, Routing("a"))
        await until(lambda: "c" in registry.reports[-1].failed)
        assert registry.reports[-1].loaded == ("a", "b")
        assert "/bundles/c is damaged" in registry.reports[-1].failed["c"]
        registry.wanted = Wanted({"b": "/bundles/b"}, Routing("b"))
        await until(lambda: registry.reports[-1].loaded == ("b",))
        assert registry.reports[-1].failed == {}
        reporter.stop()

    asyncio.run(scenario())


def test_a_new_proposal_gives_a_broken_bundle_another_try():
    async def scenario() -> None:
        part, registry = PartInMemory(broken=("b",)), RegistryInMemory("a")
        reporter = PartReporter("selector", "s1", part, registry.tell)
        await reporter.start()
        held = {v: f"/bundles/{v}" for v in ("a", "b")}
        registry.wanted = Wanted(held, Routing("a"), "first")
        await until(lambda: "b" in registry.reports[-1].failed)
        assert registry.reports[-1].proposal == "first"
        part.mend()
        told = len(registry.reports)
        await until(lambda: len(registry.reports) > told + 1)
        assert part.loaded() == ("a",)
        registry.wanted = Wanted(held, Routing("a"), "second")
        await until(lambda: registry.reports[-1].loaded == ("a", "b"))
        assert registry.reports[-1].proposal == "second"
        assert registry.reports[-1].failed == {}
        reporter.stop()

    asyncio.run(scenario())


def test_a_part_outlives_a_registry_that_does_not_answer():
    async def scenario() -> None:
        part, registry = PartInMemory(), RegistryInMemory("a")
        reporter = PartReporter("selector", "s1", part, registry.tell)
        await reporter.start()
        registry.answers = False
        told = len(registry.reports)
        await until(lambda: len(registry.reports) > told + 1)
        assert part.loaded() == ("a",)
        registry.answers = True
        registry.wanted = Wanted({"b": "/bundles/b"}, Routing("b"))
        await until(lambda: part.loaded() == ("b",))
        reporter.stop()

    asyncio.run(scenario())


def test_the_http_side_knows_the_routing_once_it_was_told():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = RoutingReporter("i1", registry.tell)
        with pytest.raises(OverloadedError, match="starting"):
            reporter.routing()
        await reporter.refresh()
        assert reporter.routing() == Routing("a")
        assert registry.reports[-1].epoch == -1
        await reporter.refresh()
        assert registry.reports[-1].epoch == 0

    asyncio.run(scenario())


def test_a_part_is_missing_until_it_is_up_and_again_when_it_is_down():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = RoutingReporter("i1", registry.tell)
        bundles = {"a": "/bundles/a"}
        assert reporter.missing() == ("retriever", "selector", "generator")
        registry.wanted = Wanted(bundles, Routing("a"), down=("generator",))
        await reporter.refresh()
        assert reporter.missing() == ("generator",)
        registry.wanted = Wanted(bundles, Routing("a"))
        await reporter.refresh()
        assert reporter.missing() == ()
        registry.wanted = Wanted(bundles, Routing("a"), down=("selector",))
        await reporter.refresh()
        assert reporter.missing() == ()  # a registry that restarted has yet to hear of it
        await reporter.refresh()
        await reporter.refresh()
        assert reporter.missing() == ("selector",)

    asyncio.run(scenario())


def test_no_part_is_up_before_the_first_version_is_checked():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = RoutingReporter("i1", registry.tell)
        unchecked = Wanted({"a": "/bundles/a"}, Routing("a"), checked=False)
        registry.wanted = unchecked
        await reporter.refresh()
        assert reporter.missing() == ("retriever", "selector", "generator")
        registry.wanted = Wanted({"a": "/bundles/a"}, Routing("a"))
        await reporter.refresh()
        assert reporter.missing() == ()
        registry.wanted = unchecked
        await reporter.refresh()
        assert reporter.missing() == ()  # a registry that restarted checks what serves already

    asyncio.run(scenario())


def test_requests_are_counted_by_version():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = RoutingReporter("i1", registry.tell)
        reporter.begin("a")
        reporter.begin("a")
        reporter.begin("b")
        reporter.end("a")
        reporter.end("b")
        await reporter.refresh()
        assert registry.reports[-1].in_flight == {"a": 1}

    asyncio.run(scenario())


def test_a_part_is_down_once_the_registry_has_said_so_for_a_while():
    async def scenario() -> None:
        registry = RegistryInMemory("a")
        reporter = RoutingReporter("i1", registry.tell)
        up = Wanted({"a": "/bundles/a"}, Routing("a"))
        down = Wanted({"a": "/bundles/a"}, Routing("a"), down=("generator",))
        # A registry that has just begun knows of nobody yet.
        for registry.wanted in (down, down, up, down, down):
            await reporter.refresh()
            assert not reporter.down("generator").is_set()
        await reporter.refresh()
        assert reporter.down("generator").is_set()
        assert not reporter.down("selector").is_set()
        registry.wanted = up
        await reporter.refresh()
        assert not reporter.down("generator").is_set()

    asyncio.run(scenario())
