"""Ray Serve deployments of the service's parts.

Ingress (HTTP) -> Retriever -> Selector -> Generator, each with its own replicas; and one Registry,
which says to all of them which bundle versions to hold. Replicas find the registry by its name, so
that it can restart.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from rlrag.data.feedback import FeedbackStore
from rlrag.errors import RlragError
from rlrag.json_logs import log_to_stderr
from rlrag.records import Passage
from rlrag.serving.generating import GeneratorPart
from rlrag.serving.handles import RayPipeline, tell_registry
from rlrag.serving.records import AnswerPiece, Decoding, Filters, Picked, Retrieved, Routing
from rlrag.serving.retrieving import Ask, RetrieverPart
from rlrag.serving.selecting import Choice, SelectorPart
from rlrag.serving.settings import ServeSettings
from rlrag.serving.versions.director import Bounds, Director
from rlrag.serving.versions.registry import Kind, Report, Wanted
from rlrag.serving.versions.replicas import Part, PartReporter, RoutingReporter, Tell

REGISTRY, RETRIEVER, SELECTOR, GENERATOR = "Registry", "Retriever", "Selector", "Generator"
_CORPUS_TIMEOUT_S = 30.0
_DEFAULT_STATE = ".cache/rlrag/serve"

logger = logging.getLogger("rlrag.serve")


class _Replica:
    """What the three parts have in common: they report, and their work runs in one thread."""

    _kind: Kind

    async def _begin(self, part: Part) -> None:
        _log_lines(self._kind)
        self._reporter = PartReporter(self._kind, _replica_name(), part, _tell())
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=self._kind)
        await self._reporter.start()

    async def _in_thread(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)


@ray_serve.deployment(name=RETRIEVER)
class RetrieverReplica(_Replica):
    """Finds candidates; questions that wait together are searched together."""

    _kind = "retriever"

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        self._part = RetrieverPart(
            settings.corpus, settings.limits.max_filtered, settings.allow_code
        )
        self._batched.set_max_batch_size(settings.retriever.max_batch_size)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(settings.retriever.batch_wait_ms / 1000)  # type: ignore[attr-defined]
        await self._begin(self._part)

    async def retrieve(
        self, version: str, question: str, num_candidates: int | None, filters: Filters
    ) -> Retrieved | RlragError:
        """See `ServedPipeline.retrieve`; an error is returned, not raised."""
        found: Retrieved | RlragError = await self._batched(
            (version, Ask(question, num_candidates, filters))
        )
        return found

    async def changed_corpus(self, version: str) -> str | None:
        """See `RetrieverPart.changed_corpus`."""
        return await asyncio.to_thread(self._part.changed_corpus, version)

    @ray_serve.batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def _batched(self, calls: list[tuple[str, Ask]]) -> list[Retrieved | RlragError]:
        return await self._in_thread(partial(_by_version, self._part.retrieve, calls))


@ray_serve.deployment(name=SELECTOR)
class SelectorReplica(_Replica):
    """Picks passages; questions that wait together are picked for together."""

    _kind = "selector"

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        kept = settings.feedback
        explore_share = kept.explore_share if kept.path else 0.0
        self._part = SelectorPart(explore_share, settings.allow_code, settings.corpus)
        self._batched.set_max_batch_size(settings.selector.max_batch_size)  # type: ignore[attr-defined]
        self._batched.set_batch_wait_timeout_s(settings.selector.batch_wait_ms / 1000)  # type: ignore[attr-defined]
        self._random = random.SystemRandom()
        await self._begin(self._part)

    async def select(
        self,
        version: str,
        question: str,
        retrieved: Retrieved,
        num_selected: int | None,
        explore: bool,
    ) -> Picked | RlragError:
        """See `ServedPipeline.select`; an error is returned, not raised."""
        seed = self._random.getrandbits(63) if explore else 0
        found: Picked | RlragError = await self._batched(
            (version, Choice(question, retrieved, num_selected, explore, seed))
        )
        return found

    @ray_serve.batch(max_batch_size=1, batch_wait_timeout_s=0)
    async def _batched(self, calls: list[tuple[str, Choice]]) -> list[Picked | RlragError]:
        return await self._in_thread(partial(_by_version, self._part.select, calls))


@ray_serve.deployment(name=GENERATOR)
class GeneratorReplica(_Replica):
    """Answers; the engine behind it decodes many answers at once."""

    _kind = "generator"

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        self._part = GeneratorPart(settings)
        await self._begin(self._part)

    async def generate(
        self, version: str, question: str, passages: tuple[Passage, ...], decoding: Decoding
    ) -> AsyncIterator[AnswerPiece | RlragError]:
        """See `ServedPipeline.generate`; an error is the last piece."""
        pieces = self._part.generate(version, question, passages, decoding)
        async with aclosing(pieces):  # a call that is cancelled frees its slot at once
            try:
                async for piece in pieces:
                    yield piece
            except RlragError as error:
                yield error

    def check_health(self) -> None:
        """Have the replica replaced when its engine is dead.

        Raises:
            GenerationError: saying why.
        """
        self._part.check_health()


@ray_serve.deployment(name=REGISTRY, num_replicas=1)
class RegistryReplica:
    """Says which bundle versions the replicas hold and which one answers."""

    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]
        _log_lines("registry")
        self._director = Director(
            settings.bundle,
            Path(settings.state_dir).expanduser()
            if settings.state_dir
            else Path.home() / _DEFAULT_STATE,
            Bounds(settings.start_timeout_s),
            RayPipeline(_handle(RETRIEVER), _handle(SELECTOR), _handle(GENERATOR), _never),
        )
        self._configured = settings.bundle
        self._checking = asyncio.create_task(self._director.check_first(settings.corpus is None))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Begin to serve the bundle that `user_config` names, as `POST /admin/bundle` would.

        Replicas report here while it is loaded, so that is not waited for. What is wrong with the
        bundle is logged, and what served before goes on.
        """
        path = user_config.get("bundle", self._configured)
        if path != self._configured:
            self._configured = path
            self._change = asyncio.create_task(self._load_logged(path))

    async def _load_logged(self, path: str) -> None:
        try:
            routing = await self._director.load(path, "active", 0.0)
            logger.info("version %s from %s is active", routing.active, path)
        except RlragError as error:
            logger.error("the configured bundle cannot be served: %s", error)

    async def hear(self, report: Report) -> Wanted:
        """See `Director.hear`."""
        return self._director.hear(report)

    async def load(self, path: str, role: str, share: float) -> Routing | RlragError:
        """See `Director.load`; an error is returned, not raised."""
        try:
            return await self._director.load(path, role, share)
        except RlragError as error:
            return error

    async def drop(self, role: str) -> Routing | RlragError:
        """See `Director.drop`; an error is returned, not raised."""
        try:
            return self._director.drop(role)
        except RlragError as error:
            return error


@ray_serve.deployment(name="Ingress")
@ray_serve.ingress()
class IngressReplica:
    """The HTTP side; see `rlrag.serving.http.api`."""

    async def __init__(  # type: ignore[misc]
        self, settings: ServeSettings, registry: Any, retriever: Any, selector: Any, generator: Any
    ) -> None:
        _log_lines("ingress")
        self._settings = settings
        self._desk = RayDesk(registry, retriever)
        self._pipeline = RayPipeline(retriever, selector, generator, self._desk.reporter.down)

    def __serve_build_asgi_app__(self) -> Any:
        from rlrag.serving.http.api import create_api

        kept = self._settings.feedback
        store = FeedbackStore(Path(kept.path), kept.max_rows, kept.max_days) if kept.path else None
        self._desk.reporter.start()
        return create_api(self._pipeline, self._desk, self._settings, store)


class RayDesk:
    """The registry as the HTTP side sees it; implements `VersionDesk`."""

    def __init__(self, registry: Any, retriever: Any) -> None:
        self._registry = registry
        self._retriever = retriever
        self.reporter = RoutingReporter(_replica_name(), partial(tell_registry, registry))

    def routing(self) -> Routing:
        """See `VersionDesk.routing`."""
        return self.reporter.routing()

    def missing(self) -> tuple[str, ...]:
        """See `VersionDesk.missing`."""
        return self.reporter.missing()

    def bundle_path(self, version: str) -> str:
        """See `VersionDesk.bundle_path`."""
        return self.reporter.wanted().bundles[version]

    async def load(self, path: str, role: str, share: float) -> str:
        """See `VersionDesk.load`."""
        routing = _raised(await self._registry.load.remote(path, role, share))
        await self.reporter.refresh()
        version: str = getattr(routing, role)
        return version

    async def drop(self, role: str) -> None:
        """See `VersionDesk.drop`."""
        _raised(await self._registry.drop.remote(role))
        await self.reporter.refresh()

    async def changed_corpus(self, version: str) -> str | None:
        """See `VersionDesk.changed_corpus`."""
        call = self._retriever.changed_corpus.remote(version)
        changed: str | None = await asyncio.wait_for(call, _CORPUS_TIMEOUT_S)
        return changed

    def begin(self, version: str) -> None:
        """See `VersionDesk.begin`."""
        self.reporter.begin(version)

    def end(self, version: str) -> None:
        """See `VersionDesk.end`."""
        self.reporter.end(version)


def _by_version(ask: Any, calls: list[tuple[str, Any]]) -> list[Any]:
    """Call `ask` once for each version among the calls; an error of one concerns its calls only."""
    found: dict[int, Any] = {}
    for version in dict.fromkeys(version for version, _ in calls):
        places = [place for place, call in enumerate(calls) if call[0] == version]
        try:
            answers = ask(version, [calls[place][1] for place in places])
        except RlragError as error:
            answers = [error] * len(places)
        found.update(zip(places, answers, strict=True))
    return [found[place] for place in range(len(calls))]


def _raised(answer: Any) -> Any:
    if isinstance(answer, RlragError):
        raise answer
    return answer


def _log_lines(part: str) -> None:
    """Let what this replica says come out; Ray Serve looks after its own log alone."""
    log_to_stderr("serve", f"{part}-{_replica_name()}")


def _replica_name() -> str:
    return str(ray_serve.get_replica_context().replica_id.unique_id)


def _handle(deployment: str) -> Any:
    """A deployment of the application that this replica belongs to."""
    return ray_serve.get_deployment_handle(deployment, ray_serve.get_replica_context().app_name)


def _tell() -> Tell:
    return partial(tell_registry, _handle(REGISTRY))


def _never(part: str) -> asyncio.Event:
    """The registry asks whatever answers; it waits no longer than its own bounds."""
    return asyncio.Event()
