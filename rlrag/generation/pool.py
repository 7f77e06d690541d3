"""Batches of prompts in, results out, computed by Ray actors that each hold one engine.

A call is cut into chunks (`plan_chunks`); each actor works on one chunk at a time and takes the
next when it is free. Ray restarts an actor that dies, so handles stay valid; the pool starts its
engine again and sends the lost chunk once more. Every wait has a bound and its error names the
actor.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError, RlragError
from rlrag.generation.checks import check_answers
from rlrag.generation.chunks import plan_chunks
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.records import Generation, Prompt, Score

logger = logging.getLogger(__name__)

_MAX_LOSSES = 2
_RETRY_PAUSE_S = 0.2
_FETCH_TIMEOUT_S = 60.0

Engine = Callable[[], Generator]


class EngineActor:
    """What runs in an actor: one engine, loaded by the first `start`."""

    def __init__(self, engine: Engine) -> None:
        """Remember how to make the engine; a constructor that failed would hide its error."""
        self._make = engine
        self._generator: Generator | None = None

    def start(self) -> str:
        """Load the engine if it is not loaded; returns its identity."""
        if self._generator is None:
            self._generator = self._make()
        return self._generator.identity

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Generation]:
        """Decode one answer a prompt."""
        return self._engine().generate(prompts, sampling)

    def score(self, prompts: list[Prompt], answers: list[tuple[int, ...]]) -> list[Score]:
        """Teacher-forced log p(answer | prompt)."""
        return self._engine().score(prompts, answers)

    def _engine(self) -> Generator:
        self.start()
        assert self._generator is not None
        return self._generator


@dataclass(frozen=True, slots=True)
class _Member:
    """One actor as clients know it."""

    name: str
    handle: Any


@dataclass(slots=True)
class _Flight:
    """One call that an actor has not answered; `chunk` is None while its engine starts."""

    member: _Member
    chunk: int | None
    deadline: float


@dataclass(slots=True)
class _Work:
    """One batch on its way through the pool."""

    what: str
    chunks: list[list[int]]
    send: Callable[[Any, list[int]], Any]
    describe: Callable[[list[int]], str]
    waiting: deque[int] = field(default_factory=deque)
    done: dict[int, list[Any]] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)


class PoolClient:
    """Talks to the actors of a pool that somebody else owns; implements `Generator`.

    Light and picklable: give it to Ray tasks, actors and Ray Train workers. Several clients may
    use the same actors at once; each actor then takes their chunks in turn, so that
    `request_timeout_s` must allow for one chunk of every client.
    """

    def __init__(self, members: Sequence[_Member], config: GeneratorConfig, identity: str) -> None:
        self._members = list(members)
        self._config = config
        self._identity = identity
        self._started: set[str] = set()
        self._tokens = TokenCount()

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolClient, (self._members, self._config, self._identity)

    @property
    def identity(self) -> str:
        """Hash of weights, dtype, device and back end; known before any engine has started."""
        return self._identity

    @property
    def tokens(self) -> TokenCount:
        """Tokens that this client asked for."""
        return self._tokens

    def client(self) -> PoolClient:
        """Another client of the same actors, with its own token count."""
        return PoolClient(self._members, self._config, self._identity)

    def wait_until_ready(self) -> None:
        """Wait until every engine has started; otherwise the first request does.

        Raises:
            GeneratorTimeoutError: naming the first actor that was not ready in `start_timeout_s`.
            SetupError, GenerationError: what kept an engine from starting.
        """
        deadline = time.monotonic() + self._config.start_timeout_s
        pending = {m.handle.start.remote(): _Flight(m, None, deadline) for m in self._members}
        work = _Work("start", [], lambda handle, chunk: None, lambda chunk: "the start")
        while pending:
            self._collect(work, pending)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        """Decode one answer a prompt.

        Raises:
            GeneratorTimeoutError: when an actor does not answer in time; it is restarted.
            GenerationError: when an actor cannot be restarted any more, a chunk has killed two
                actors, or an engine failed.
        """
        return self._run(
            "generate",
            prompts,
            lambda handle, chunk: handle.generate.remote([prompts[i] for i in chunk], sampling),
        )

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """Teacher-forced log p(answer | prompt); raises what `generate` raises."""
        check_answers(prompts, answers)
        return self._run(
            "score",
            prompts,
            lambda handle, chunk: handle.score.remote(
                [prompts[i] for i in chunk], [tuple(answers[i]) for i in chunk]
            ),
        )

    def close(self) -> None:
        """Nothing: the actors belong to the pool."""

    def _run(
        self, what: str, prompts: Sequence[Prompt], send: Callable[[Any, list[int]], Any]
    ) -> list[Any]:
        ids = [prompt.token_ids for prompt in prompts]
        if not self._members:
            raise GenerationError("this generator pool was closed; open a new one")
        chunks = plan_chunks(ids, len(self._members), self._config.batch_size)
        work = _Work(what, chunks, send, lambda chunk: _describe(what, prompts, chunk))
        work.waiting.extend(range(len(chunks)))
        pending: dict[Any, _Flight] = {}
        while len(work.done) < len(chunks):
            self._dispatch(work, pending)
            self._collect(work, pending)
        results: list[Any] = [None] * len(prompts)
        for number, chunk in enumerate(chunks):
            for i, result in zip(chunk, work.done[number], strict=True):
                results[i] = result
        self._tokens.num_requests += len(results)
        self._tokens.spent += sum(r.num_prompt_tokens + r.num_tokens for r in results)
        return results

    def _dispatch(self, work: _Work, pending: dict[Any, _Flight]) -> None:
        """Give every free actor something to do: its start, or the next chunk."""
        busy = {flight.member.name for flight in pending.values()}
        now = time.monotonic()
        for member in self._members:
            if member.name in busy or not work.waiting:
                continue
            if member.name not in self._started:
                deadline = now + self._config.start_timeout_s
                pending[member.handle.start.remote()] = _Flight(member, None, deadline)
            else:
                number = work.waiting.popleft()
                deadline = now + self._config.request_timeout_s
                ref = work.send(member.handle, work.chunks[number])
                pending[ref] = _Flight(member, number, deadline)

    def _collect(self, work: _Work, pending: dict[Any, _Flight]) -> None:
        """Wait for one answer, or for the first deadline."""
        first = min(flight.deadline for flight in pending.values())
        ready, _ = ray.wait(
            list(pending), num_returns=1, timeout=max(0.0, first - time.monotonic())
        )
        for ref in ready:
            flight = pending.pop(ref)
            try:
                result = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
            except ActorUnavailableError:
                self._restarting(work, pending, flight)
            except RayTaskError as error:
                _raise_cause(error, flight.member, self._asked(work, flight))
            except GetTimeoutError as error:
                raise GeneratorTimeoutError(
                    f"the answer of {flight.member.name} to {self._asked(work, flight)} could not "
                    f"be fetched within {_FETCH_TIMEOUT_S:.0f} s; check the cluster's network"
                ) from error
            except RayActorError as error:
                raise GenerationError(
                    f"{flight.member.name} died on {self._asked(work, flight)} and was already "
                    f"restarted generator.max_restarts = {self._config.max_restarts} times; look "
                    f"for its last words in Ray's logs (memory is the usual cause): {error}"
                ) from error
            else:
                if flight.chunk is None:
                    self._check_identity(flight.member, result)
                    self._started.add(flight.member.name)
                else:
                    work.done[flight.chunk] = result
        for flight in pending.values():
            if flight.deadline <= time.monotonic():
                self._time_out(work, flight)

    def _restarting(self, work: _Work, pending: dict[Any, _Flight], flight: _Flight) -> None:
        """Ray is restarting the actor: ask for its start, and hand its chunk out again."""
        member, now = flight.member, time.monotonic()
        deadline = flight.deadline
        if flight.chunk is not None:
            logger.warning("%s died; it is restarted and its chunk is sent again", member.name)
            deadline = now + self._config.start_timeout_s
            losses = work.losses[flight.chunk] = work.losses.get(flight.chunk, 0) + 1
            if losses >= _MAX_LOSSES:
                raise GenerationError(
                    f"{losses} actors died on the same chunk, last {member.name}: "
                    f"{self._asked(work, flight)}; if memory ran out, lower generator.batch_size "
                    "or prompt.max_prompt_tokens"
                )
            work.waiting.appendleft(flight.chunk)
        self._started.discard(member.name)
        if now >= deadline:
            self._time_out(work, _Flight(member, None, deadline))
        time.sleep(_RETRY_PAUSE_S)  # while Ray restarts an actor, calls to it fail at once
        pending[member.handle.start.remote()] = _Flight(member, None, deadline)

    def _time_out(self, work: _Work, flight: _Flight) -> NoReturn:
        name = flight.member.name
        # Without this, every later call would queue behind the one that hangs.
        ray.kill(flight.member.handle, no_restart=False)
        self._started.discard(name)
        if flight.chunk is None:
            raise GeneratorTimeoutError(
                f"{name} was not ready within generator.start_timeout_s = "
                f"{self._config.start_timeout_s:g} s; it asks for "
                f"{self._config.cpus_per_actor:g} CPUs and {self._config.gpus_per_actor:g} GPUs, "
                f"and of the cluster's {_resources()}"
            )
        raise GeneratorTimeoutError(
            f"{name} did not answer within generator.request_timeout_s = "
            f"{self._config.request_timeout_s:g} s: {self._asked(work, flight)}; raise it, or "
            "lower generator.batch_size"
        )

    def _check_identity(self, member: _Member, identity: str) -> None:
        if identity != self._identity:
            raise GenerationError(
                f"{member.name} loaded generator {identity} where {self._identity} was expected; "
                "its node has other model files than this one"
            )

    def _asked(self, work: _Work, flight: _Flight) -> str:
        return "the start" if flight.chunk is None else work.describe(work.chunks[flight.chunk])


class GeneratorPool(PoolClient):
    """Makes the actors and owns them: they end with `close` or with this process.

    A pickled pool arrives as a client.
    """

    def __init__(
        self, config: GeneratorConfig, engine: Engine, identity: str, environment: dict[str, str]
    ) -> None:
        """Ask Ray for the actors and return at once; engines load while the caller goes on.

        Args:
            config: Numbers of actors, their resources, waits and restarts.
            engine: Makes the generator inside an actor; must be picklable.
            identity: What that generator's `identity` will be.
            environment: Variables set before an actor's process starts, besides the thread count.
        """
        variables = {
            "OMP_NUM_THREADS": str(config.threads_per_actor),
            # Threads that spin while they wait starve the other processes of the machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            **environment,
        }
        make = ray.remote(
            num_cpus=config.cpus_per_actor,
            num_gpus=config.gpus_per_actor,
            max_restarts=config.max_restarts,
            max_task_retries=0,  # the pool sends again itself, and counts
            runtime_env={"env_vars": variables},
        )(EngineActor)
        pool = uuid.uuid4().hex[:6]
        members = []
        for number in range(config.num_actors):
            name = f"generator-{pool}-{number}"
            members.append(_Member(name, make.options(name=name).remote(engine)))
        super().__init__(members, config, identity)
        for member in members:
            member.handle.start.remote()

    def close(self) -> None:
        """Kill the actors that this pool made."""
        for member in self._members:
            try:
                ray.kill(member.handle)
            except RayError as error:
                logger.warning("%s could not be ended: %s", member.name, error)
        self._members = []


def _describe(what: str, prompts: Sequence[Prompt], chunk: list[int]) -> str:
    tails = "; ".join(repr(prompts[i].text[-60:]) for i in chunk[:3])
    return f"{what} of {len(chunk)} prompts, which end with {tails}"


def _raise_cause(error: RayTaskError, member: _Member, asked: str) -> NoReturn:
    cause = error.cause
    if isinstance(cause, RlragError):
        raise cause from error
    raise GenerationError(
        f"{member.name} failed on {asked}: {type(cause).__name__}: {cause}"
    ) from error


def _resources() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = (f"{total.get(k, 0):g} {k}s {free.get(k, 0):g} are free" for k in ("CPU", "GPU"))
    return " and of its ".join(parts)
