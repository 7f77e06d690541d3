"""The Ray actor that runs one engine of a pool."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray

from rlrag.errors import GenerationError
from rlrag.generation.pool.weight_store import StoredWeights, WeightsTag, call_store, fetch_tensors
from rlrag.generation.protocol import Generator, Sampling
from rlrag.generation.weights import ChecksWeights
from rlrag.json_logs import logging_to
from rlrag.records import Generation, Prompt, Score

logger = logging.getLogger(__name__)

Engine = Callable[[], Generator]


@dataclass(frozen=True, slots=True)
class Standing:
    """What an actor holds: the identity that its engine started with, and its weights.

    `newest` is what the pool's store holds, where the actor asked it. `process` tells an actor that
    was started again from the one that it was before.
    """

    identity: str
    tag: WeightsTag
    process: str
    newest: WeightsTag | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """No answer, because the actor does not hold the wanted weights (or no engine yet)."""

    held: WeightsTag | None


@dataclass(frozen=True, slots=True)
class Member:
    """One actor of a pool as its clients know it."""

    name: str
    handle: Any


@dataclass(frozen=True, slots=True)
class Actors:
    """What all clients of a pool share; `identity` is the one that its engines start with."""

    members: tuple[Member, ...]
    store: Any
    identity: str


class EngineActor:
    """One engine, loaded by the first `start`; each request says which weights must answer it.

    A restarted actor comes back without an engine, and its engine with the weights on disk, so it
    refuses requests until `start` has loaded the wanted set from the pool's store.
    """

    def __init__(
        self,
        engine: Engine,
        store: str,
        fetch_timeout_s: float,
        log: Callable[[], logging.Handler] | None = None,
    ) -> None:
        """Remember how to make the engine; a constructor that failed would hide its error.

        The weight store comes by name: Ray warns of a handle, whose object a restart would need.
        With `log`, what this process says goes to the handler that it opens.
        """
        self._open_log = log
        self._logging = ExitStack()
        self._make = engine
        self._store_name = store
        self._fetch_timeout_s = fetch_timeout_s
        self._generator: Generator | None = None
        self._first_identity = ""
        self._held = WeightsTag()
        self._process = uuid.uuid4().hex

    def start(self, wanted: WeightsTag) -> Standing:
        """Load the engine if it is not loaded, and the wanted weights if the store has them.

        Raises:
            SetupError, GenerationError: what keeps the engine from starting or the set from it.
        """
        self._open()
        newest = None
        if self._held != wanted:
            stored = call_store(self._store().newest.remote(), "tell its newest set")
            if stored is not None and stored.tag == wanted:
                self._take(stored)
            newest = stored.tag if stored is not None else None
        return Standing(self._first_identity, self._held, self._process, newest)

    def check_weights(self, shapes: Mapping[str, Sequence[int]], adapter: bool) -> None:
        """Refuse a set that the engine could not load, before anybody gives up the old one.

        Raises:
            GenerationError: naming the tensors that do not fit.
        """
        generator = self._open()
        if not isinstance(generator, ChecksWeights):
            raise GenerationError(
                f"{type(generator).__name__} has no check_weights; an engine in a pool must "
                "check whether new weights fit before the old ones are dropped"
            )
        generator.check_weights(shapes, adapter)

    def generate(
        self, wanted: WeightsTag, prompts: list[Prompt], sampling: Sampling
    ) -> Sequence[Generation | GenerationError] | Refusal:
        """Decode one answer a prompt with the wanted weights."""
        if self._generator is None or self._held != wanted:
            return self._refusal()
        return self._generator.generate(prompts, sampling)

    def score(
        self, wanted: WeightsTag, prompts: list[Prompt], answers: list[tuple[int, ...]]
    ) -> Sequence[Score | GenerationError] | Refusal:
        """Teacher-forced log p(answer | prompt) with the wanted weights."""
        if self._generator is None or self._held != wanted:
            return self._refusal()
        return self._generator.score(prompts, answers)

    def _open(self) -> Generator:
        if self._generator is None:
            started = time.monotonic()
            self._take_over_logging()
            self._generator = self._make()
            self._take_over_logging()  # libraries that were imported just now write elsewhere
            logger.info(
                "%s is ready after %.1f s", self._generator.identity, time.monotonic() - started
            )
            self._first_identity = self._generator.identity
            self._held = WeightsTag()
        return self._generator

    def _take_over_logging(self) -> None:
        if self._open_log is not None:
            self._logging.close()
            self._logging.enter_context(logging_to([self._open_log()]))

    def _take(self, stored: StoredWeights) -> None:
        from rlrag.generation.weights import GeneratorWeights  # brings torch

        tag = stored.tag
        tensors = fetch_tensors(self._store(), stored, self._fetch_timeout_s)
        generator, self._generator = self._open(), None  # half-loaded weights must not answer
        try:
            generator.load_weights(
                GeneratorWeights(tag.version, tag.digest, tensors, stored.adapter_scale)
            )
        except Exception:
            generator.close()
            raise
        self._generator, self._held = generator, tag
        logger.info("loaded weights of version %d", tag.version)

    def _store(self) -> Any:
        try:
            return ray.get_actor(self._store_name)
        except ValueError as error:
            raise GenerationError(
                f"the pool's weight store {self._store_name} is gone; create a new pool"
            ) from error

    def _refusal(self) -> Refusal:
        return Refusal(self._held if self._generator is not None else None)
