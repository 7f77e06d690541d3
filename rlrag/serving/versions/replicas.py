"""Reports a replica's loaded versions to the registry, and loads what the registry asks for.

Both kinds of reporters ask the registry of versions every half second. A replica goes on with what
it has while the registry does not answer, which is logged once.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from rlrag.errors import CheckpointError, OverloadedError
from rlrag.serving.records import Routing
from rlrag.serving.versions.registry import PARTS, Kind, Report, Wanted

logger = logging.getLogger("rlrag.serve")

_EVERY_S = 0.5
_DOWN_AFTER = 3
"""Answers in a row by which a part must be down; a new registry has yet to hear of all replicas."""

Tell = Callable[[Report], Awaitable[Wanted]]
"""Brings a report to the registry, within a bound, and its answer back."""


class Part(Protocol):
    """What holds bundle versions: a retriever, selector or generator part."""

    def loaded(self) -> tuple[str, ...]:
        """Versions that can be asked."""
        ...

    def load(self, version: str, directory: Path) -> None:
        """Open a version; takes long and runs in a thread."""
        ...

    def drop(self, version: str) -> None:
        """Close a version."""
        ...


class PartReporter:
    """Keeps a part at what the registry wants.

    Args:
        kind: Which part.
        replica: Name of the replica.
        part: What loads and drops.
        tell: Brings reports.
    """

    def __init__(self, kind: Kind, replica: str, part: Part, tell: Tell) -> None:
        self._kind: Kind = kind
        self._replica = replica
        self._part = part
        self._tell = tell
        self._failed: dict[str, str] = {}
        self._proposal = ""
        self._work: asyncio.Task[None] | None = None
        self._loop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load what serves now, then go on reporting in the background.

        Raises:
            CheckpointError: when a bundle that serves cannot be loaded here.
        """
        wanted = await self._tell(self._report())
        routing = wanted.routing
        await self._follow(wanted)
        for version in (routing.active, routing.canary, routing.shadow):
            if version in self._failed:
                raise CheckpointError(
                    f"{self._kind} cannot load version {version} from {wanted.bundles[version]}: "
                    f"{self._failed[version]}"
                )
        self._loop = asyncio.create_task(self._go_on())

    def stop(self) -> None:
        """End the reports."""
        for task in (self._loop, self._work):
            if task is not None:
                task.cancel()

    async def _go_on(self) -> None:
        silent = False
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                wanted = await self._tell(self._report())
            except OverloadedError as error:
                if not silent:
                    logger.warning("%s %s: %s", self._kind, self._replica, error)
                silent = True
                continue
            silent = False
            if self._work is None or self._work.done():
                self._work = asyncio.create_task(self._follow(wanted))

    async def _follow(self, wanted: Wanted) -> None:
        """Load what is missing and drop what is not wanted any more, one after another.

        A new proposal gives what could not be loaded another try.
        """
        if wanted.proposal != self._proposal:
            self._proposal, self._failed = wanted.proposal, {}
        for version in self._part.loaded():
            if version not in wanted.bundles:
                await asyncio.to_thread(self._part.drop, version)
        self._failed = {v: why for v, why in self._failed.items() if v in wanted.bundles}
        for version, path in wanted.bundles.items():
            if version in self._part.loaded() or version in self._failed:
                continue
            try:
                await asyncio.to_thread(self._part.load, version, Path(path))
            except Exception as error:  # whatever it is, the registry must hear it
                logger.warning("cannot load %s", path, exc_info=error)
                self._failed[version] = f"{type(error).__name__}: {error}"

    def _report(self) -> Report:
        return Report(
            self._replica,
            self._kind,
            loaded=self._part.loaded(),
            failed=dict(self._failed),
            proposal=self._proposal,
        )


class RoutingReporter:
    """Knows the newest routing for an HTTP replica, and counts its requests by version."""

    def __init__(self, replica: str, tell: Tell) -> None:
        self._replica = replica
        self._tell = tell
        self._wanted: Wanted | None = None
        self._in_flight: Counter[str] = Counter()
        self._down: dict[str, asyncio.Event] = {part: asyncio.Event() for part in PARTS}
        self._times_down: Counter[str] = Counter()
        self._been_up: set[str] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report in the background."""
        self._loop = asyncio.create_task(self._go_on())

    def stop(self) -> None:
        """End the reports."""
        if self._loop is not None:
            self._loop.cancel()

    def wanted(self) -> Wanted:
        """The newest answer of the registry.

        Raises:
            OverloadedError: when none has come yet.
        """
        if self._wanted is None:
            raise OverloadedError("the service is starting; try again in a moment")
        return self._wanted

    def routing(self) -> Routing:
        """The newest known routing."""
        return self.wanted().routing

    def begin(self, version: str) -> None:
        """A request of this version starts."""
        self._in_flight[version] += 1

    def end(self, version: str) -> None:
        """A request of this version ended."""
        self._in_flight[version] -= 1
        if not self._in_flight[version]:
            del self._in_flight[version]

    def down(self, part: str) -> asyncio.Event:
        """Set while a part has no living replica."""
        return self._down[part]

    def missing(self) -> tuple[str, ...]:
        """Parts that cannot answer: those that never could yet, and those that are down.

        Until the version that a service starts with has answered its golden questions, all are.
        """
        return tuple(p for p in PARTS if p not in self._been_up or self._down[p].is_set())

    async def refresh(self) -> None:
        """Ask the registry now.

        Raises:
            OverloadedError: when it does not answer.
        """
        routing = self._wanted.routing if self._wanted else None
        report = Report(
            self._replica,
            "ingress",
            epoch=routing.epoch if routing else -1,
            in_flight=dict(self._in_flight),
        )
        self._wanted = await self._tell(report)
        for part, event in self._down.items():
            self._times_down[part] += 1
            if part not in self._wanted.down:
                self._times_down[part] = 0
                if self._wanted.checked:  # a registry that restarts checks what serves already
                    self._been_up.add(part)
                event.clear()
            elif self._times_down[part] >= _DOWN_AFTER:
                event.set()

    async def _go_on(self) -> None:
        silent = False
        while True:
            try:
                await self.refresh()
                silent = False
            except OverloadedError as error:
                if not silent:
                    logger.warning("ingress %s: %s", self._replica, error)
                silent = True
            await asyncio.sleep(_EVERY_S)
