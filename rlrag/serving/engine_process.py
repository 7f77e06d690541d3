"""A generation engine in its own process, and a client that streams its answers.

vLLM keeps global state, so that two engines in one process could not be closed one by one. Each set
of weights therefore gets a Ray actor, which runs the engine exactly as training does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError, OverloadedError, RlragError
from rlrag.generation.backends.engine_loop import EngineLoop
from rlrag.generation.backends.stepping import BatchStepper, Stepper, Update
from rlrag.generation.build import open_engine, resolve_config
from rlrag.generation.pool.dispatch import ACTOR_ENDED
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 30.0
"""Longest wait for what an engine's process answers without computing."""
_MAX_CALLS = 10_000
"""Answers on their way at once; further ones wait outside the engine's queue."""
_JOINED_FOR_S = 10.0
"""Longest time for which updates of an answer that is not streamed are held back."""
_WATCH_EVERY_S = 1.0
"""How often an engine's process looks whether its engine works."""


class EngineProcess:
    """The Ray actor around one engine; `start` loads it.

    A constructor that failed would hide its error, so loading is a call of its own.
    """

    def __init__(
        self, config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._prefix_ids = prefix_ids
        self._loop: EngineLoop | None = None

    async def start(self) -> None:
        """Load the model; other calls are answered meanwhile.

        Raises:
            SetupError, GenerationError: what keeps the engine from starting.
        """
        self._loop = await asyncio.to_thread(self._open)

    async def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        """The answer as it is decoded; cancelling the call frees the engine's slot.

        Each update is a message between processes. Where the answer is not streamed, its updates
        are therefore joined to one, or to one in ten seconds, from which its reader knows that this
        process lives.

        Raises:
            GenerationError: when the engine refuses the prompt, has failed or is not loaded.
        """
        text, sent = "", time.monotonic()
        async with aclosing(self._started().stream(prompt, sampling)) as updates:
            async for update in updates:
                text += update.text
                if streamed or update.finished or time.monotonic() - sent > _JOINED_FOR_S:
                    yield replace(update, text=text)
                    text, sent = "", time.monotonic()

    async def watch(self) -> str:
        """Why no request can be answered any more; returns when that comes about."""
        while (why := self._started().failure()) is None:
            await asyncio.sleep(_WATCH_EVERY_S)
        return why

    async def num_unfinished(self) -> int:
        """Requests that wait or are being answered."""
        return self._started().num_unfinished()

    def _started(self) -> EngineLoop:
        if self._loop is None:
            raise GenerationError("this engine has not been started; call start and wait for it")
        return self._loop

    def _open(self) -> EngineLoop:
        # Here and not where the actor is asked for: only this process sees its GPU.
        config = resolve_config(self._config, "ray")
        generator: Any = open_engine(config, self._model_dir, self._prefix_ids)
        stepper = (
            generator
            if isinstance(generator, Stepper)
            else BatchStepper(generator, config.batch_size)
        )
        return EngineLoop(stepper, config.request_timeout_s)


class EngineClient:
    """Talks to one `EngineProcess`, and ends it with `close`."""

    def __init__(self, actor: Any, name: str, timeout_s: float) -> None:
        self._actor = actor
        self._name = name
        # The engine's own bound comes first; this one is for a process that hangs.
        self._timeout_s = timeout_s + _ANSWER_TIMEOUT_S
        self._silence: str | None = None
        self._watch: Future[str] = actor.watch.remote().future()

    async def stream(
        self, prompt: Prompt, sampling: Sampling, streamed: bool
    ) -> AsyncGenerator[Update, None]:
        """The answer as it is decoded, its updates joined unless it is `streamed`.

        Closing the iterator, or cancelling who waits for it, frees the engine's slot.

        Raises:
            GenerationError: when the engine refuses the prompt or has failed.
            GeneratorTimeoutError: when no piece came in time.
            OverloadedError: when the engine's process has ended.
        """
        pieces = self._actor.stream.remote(prompt, sampling, streamed)
        finished = False
        try:
            while not finished:
                update = await self._next_update(pieces)
                finished = update.finished
                yield update
        finally:
            if not finished:
                ray.cancel(pieces)

    def failure(self) -> str | None:
        """Why no request can be answered any more; None while the engine works. Never waits."""
        if self._silence is not None or not self._watch.done():
            return self._silence
        error = self._watch.exception()
        return f"its process has ended: {error}" if error else self._watch.result()

    async def num_unfinished(self) -> int:
        """Requests that wait or are being answered.

        Raises:
            OverloadedError: when the engine's process has ended or does not answer.
        """
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await self._actor.num_unfinished.remote()
        except (RayError, TimeoutError) as error:
            raise self._gone() from error

    def close(self) -> None:
        """End the process."""
        _end(self._actor, self._name)

    async def _next_update(self, pieces: Any) -> Update:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await (await anext(pieces))
        except RayTaskError as error:  # before TimeoutError, which it may be as well
            _raise_cause(error, self._name)
        except TimeoutError as error:
            self._silence = f"its process sent nothing for {self._timeout_s:g} s"
            raise GeneratorTimeoutError(f"{self._name} does not answer: {self._silence}") from error
        except ACTOR_ENDED as error:
            raise self._gone() from error

    def _gone(self) -> OverloadedError:
        return OverloadedError(f"{self._name} has ended and is being replaced; try again")


def open_engine_process(
    config: GeneratorConfig, model_dir: Path, prefix_ids: tuple[int, ...]
) -> EngineClient:
    """Start an engine in a Ray actor of this cluster and wait until it answers.

    The actor is not restarted when it dies: whoever opened it sees that and opens another.

    Args:
        config: The engine; `backend` must be decided.
        model_dir: The weights, where the actor can read them.
        prefix_ids: Token ids that most prompts start with.

    Raises:
        SetupError, GenerationError: what kept the engine from starting.
        GeneratorTimeoutError: when it was not ready within `start_timeout_s`.
    """
    variables = {
        "OMP_NUM_THREADS": str(config.threads_per_actor),
        # Threads that spin while they wait starve the other processes of the machine.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if config.backend == "vllm":
        from rlrag.generation.backends.vllm import vllm_environment

        variables |= vllm_environment(config)
    make = ray.remote(EngineProcess).options(
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        max_restarts=0,
        max_concurrency=_MAX_CALLS,
        runtime_env={"env_vars": variables},
    )
    actor: Any = make.remote(config, model_dir, prefix_ids)
    name = f"the engine of {model_dir}"
    started: Future[None] = actor.start.remote().future()
    try:
        started.result(config.start_timeout_s)
    except RayTaskError as error:  # before TimeoutError, which it may be as well
        _end(actor, name)
        _raise_cause(error, name)
    except TimeoutError as error:
        _end(actor, name)
        raise GeneratorTimeoutError(
            f"{name} was not ready within {config.start_timeout_s:g} s; it asks for "
            f"{config.cpus_per_actor:g} CPUs and {config.gpus_per_actor:g} GPUs of the cluster; "
            "free them, or raise start_timeout_s"
        ) from error
    except ACTOR_ENDED as error:
        raise GenerationError(
            f"the process of {name} ended while it loaded (memory is the usual cause); look for "
            f"its last messages in Ray's logs: {error}"
        ) from error
    return EngineClient(actor, name, config.request_timeout_s)


def _end(actor: Any, name: str) -> None:
    try:
        ray.kill(actor)
    except RayError as error:
        logger.warning("%s could not be ended: %s", name, error)


def _raise_cause(error: RayTaskError, name: str) -> NoReturn:
    cause = error.cause
    if isinstance(cause, RlragError):
        raise cause from error
    raise GenerationError(f"{name} failed: {type(cause).__name__}: {cause}") from error
