"""Batches of prompts in, results of the actors of a pool out.

A call is cut into chunks (`plan_chunks`); each actor works on one chunk at a time and takes the
next when it is free. Ray restarts an actor that dies, so handles stay valid; the pool starts its
engine again and sends the lost chunk once more. Every wait has a bound and its error names the
actor.

Each chunk names the weights that must answer it. An actor that holds others refuses, is told to
take the wanted set from the pool's `WeightStore`, and gets the chunk again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError, RlragError
from rlrag.generation.call_lock import CallLock
from rlrag.generation.checks import check_answers
from rlrag.generation.chunks import plan_chunks
from rlrag.generation.engine_actor import Actors, Member, Refusal, Standing
from rlrag.generation.identity import pushed_identity
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weight_store import WeightsTag, store_weights
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights

logger = logging.getLogger(__name__)

_MAX_LOSSES = 2
_RETRY_PAUSE_S = 0.2
_FETCH_TIMEOUT_S = 60.0


@dataclass(slots=True)
class _Flight:
    """One call that an actor has not answered; `chunk` is None while it prepares itself.

    `waiting` is what the actor said when it was ready but for weights that nobody had pushed.
    """

    member: Member
    chunk: int | None
    deadline: float
    waiting: Standing | None = None


@dataclass(slots=True)
class _Work:
    """One batch on its way through the pool, or one demand on every actor.

    `prepare` is asked of an actor that is not ready, `wanted` are the weights that must answer.
    """

    wanted: WeightsTag
    chunks: list[list[int]]
    prepare: Callable[[Any], Any]
    send: Callable[[Any, list[int]], Any]
    describe: Callable[[list[int] | None], str]
    waiting: deque[int] = field(default_factory=deque)
    done: dict[int, list[Any]] = field(default_factory=dict)
    losses: dict[int, int] = field(default_factory=dict)


class PoolClient:
    """Talks to the actors of a pool that somebody else owns; implements `Generator`.

    Light and picklable: give it to Ray tasks, actors and Ray Train workers. Several clients may
    use the same actors at once; each actor then takes their chunks in turn, so that
    `request_timeout_s` must allow for one chunk of every client.
    """

    def __init__(
        self, actors: Actors, config: GeneratorConfig, expected: WeightsTag | None = None
    ) -> None:
        self._actors = actors
        self._config = config
        self._expected = expected or WeightsTag()
        self._started: set[str] = set()
        self._tokens = TokenCount()
        self._lock = CallLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return PoolClient, (self._actors, self._config, self._expected)

    @property
    def identity(self) -> str:
        """Hash of weights, dtype, device and back end; known before any engine has started."""
        digest = self._expected.digest
        first = self._actors.identity
        return first if digest is None else pushed_identity(first, digest)

    @property
    def version(self) -> int:
        """Version of the weights that answer this client."""
        return self._expected.version

    @property
    def tokens(self) -> TokenCount:
        """Tokens that this client asked for."""
        return self._tokens

    def client(self) -> PoolClient:
        """Another client of the same actors, with its own token count."""
        return PoolClient(self._actors, self._config, self._expected)

    def wait_until_ready(self) -> None:
        """Wait until every engine has started and holds the weights that this client expects.

        Otherwise the first request does.

        Raises:
            GeneratorTimeoutError: naming the first actor that was not ready in `start_timeout_s`.
            SetupError, GenerationError: what kept an engine from starting.
        """
        wanted = self._expected
        self._ask_all("the start", wanted, lambda handle: handle.start.remote(wanted))

    def load_weights(self, weights: GeneratorWeights) -> None:
        """Have all actors answer with these weights; returns when the last one does.

        Waits for calls of this client that run in other threads. Clients in other processes need
        `expect_weights`, or their next call fails rather than get results of other weights. Once
        the set is accepted, an actor that fails or restarts takes it as soon as it is back.

        Raises:
            GenerationError: when the tensors do not fit the model, and the old set goes on; or
                when an actor cannot take them.
            GeneratorTimeoutError: naming the actor that did not take them in `start_timeout_s`.
        """
        shapes, adapter = weights.shapes, weights.is_adapter
        with self._lock.change():
            self._ask_all(
                f"the check of weights of version {weights.version}",
                self._expected,
                lambda handle: handle.check_weights.remote(shapes, adapter),
            )
            self._expected = store_weights(self._actors.store, weights)
            self.wait_until_ready()

    def expect_weights(self, version: int, digest: str) -> None:
        """From now on take results of this set alone, which another client pushes.

        Call it after that client has pushed; calls that come sooner wait up to `start_timeout_s`.
        """
        with self._lock.change():
            self._expected = WeightsTag(version, digest)

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
            lambda handle, wanted, chunk: handle.generate.remote(
                wanted, [prompts[i] for i in chunk], sampling
            ),
        )

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        """Teacher-forced log p(answer | prompt); raises what `generate` raises."""
        check_answers(prompts, answers)
        return self._run(
            "score",
            prompts,
            lambda handle, wanted, chunk: handle.score.remote(
                wanted, [prompts[i] for i in chunk], [tuple(answers[i]) for i in chunk]
            ),
        )

    def close(self) -> None:
        """Nothing: the actors belong to the pool."""

    def _run(
        self,
        what: str,
        prompts: Sequence[Prompt],
        send: Callable[[Any, WeightsTag, list[int]], Any],
    ) -> list[Any]:
        ids = [prompt.token_ids for prompt in prompts]
        chunks = plan_chunks(ids, len(self._members()), self._config.batch_size)
        with self._lock.call():
            wanted = self._expected
            work = _Work(
                wanted,
                chunks,
                lambda handle: handle.start.remote(wanted),
                lambda handle, chunk: send(handle, wanted, chunk),
                lambda chunk: "the start" if chunk is None else _describe(what, prompts, chunk),
            )
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

    def _ask_all(self, what: str, wanted: WeightsTag, prepare: Callable[[Any], Any]) -> None:
        """Ask every actor once, until each has answered."""
        deadline = time.monotonic() + self._config.start_timeout_s
        work = _Work(wanted, [], prepare, lambda handle, chunk: None, lambda chunk: what)
        pending = {prepare(m.handle): _Flight(m, None, deadline) for m in self._members()}
        while pending:
            self._collect(work, pending)

    def _members(self) -> tuple[Member, ...]:
        if not self._actors.members:
            raise GenerationError("this generator pool was closed; open a new one")
        return self._actors.members

    def _dispatch(self, work: _Work, pending: dict[Any, _Flight]) -> None:
        """Give every free actor something to do: its start, or the next chunk."""
        busy = {flight.member.name for flight in pending.values()}
        now = time.monotonic()
        for member in self._members():
            if member.name in busy or not work.waiting:
                continue
            if member.name not in self._started:
                deadline = now + self._config.start_timeout_s
                pending[work.prepare(member.handle)] = _Flight(member, None, deadline)
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
                self._answered(work, pending, flight, result)
        for flight in pending.values():
            if flight.deadline <= time.monotonic():
                self._time_out(work, flight)

    def _answered(
        self, work: _Work, pending: dict[Any, _Flight], flight: _Flight, result: Any
    ) -> None:
        name = flight.member.name
        if isinstance(result, Standing):
            self._ready_or_waiting(work, pending, flight, result)
        elif isinstance(result, Refusal):
            self._started.discard(name)
            if flight.chunk is not None:
                work.waiting.appendleft(flight.chunk)
        elif flight.chunk is not None:
            strange = {r.version for r in result} - {work.wanted.version}
            if strange:
                raise GenerationError(
                    f"{name} answered {self._asked(work, flight)} with results of version "
                    f"{sorted(strange)} where {work.wanted} was asked for; its engine does not "
                    "tag results with the version that made them"
                )
            work.done[flight.chunk] = result

    def _ready_or_waiting(
        self, work: _Work, pending: dict[Any, _Flight], flight: _Flight, standing: Standing
    ) -> None:
        """Note that an actor is ready, or ask again until its weights have been pushed."""
        name, wanted, newest = flight.member.name, work.wanted, standing.newest
        if standing.identity != self._actors.identity:
            raise GenerationError(
                f"{name} loaded generator {standing.identity} where {self._actors.identity} was "
                "expected; its node has other model files than this one"
            )
        if standing.tag == wanted:
            self._started.add(name)
            return
        if newest is not None and newest.version > wanted.version:
            raise GenerationError(
                f"the pool went on to weights of {newest} while this client expects {wanted}; "
                "call expect_weights with what was pushed last"
            )
        flight.waiting = standing
        time.sleep(_RETRY_PAUSE_S)
        pending[work.prepare(flight.member.handle)] = flight

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
        pending[work.prepare(member.handle)] = _Flight(member, None, deadline)

    def _time_out(self, work: _Work, flight: _Flight) -> NoReturn:
        name = flight.member.name
        if flight.waiting is not None:
            raise GeneratorTimeoutError(
                f"{name} holds weights of {flight.waiting.tag} where {work.wanted} is expected, "
                "which nobody pushed within generator.start_timeout_s = "
                f"{self._config.start_timeout_s:g} s (the weight store has "
                f"{flight.waiting.newest or 'no complete set'}); push it, again if it was"
            )
        # Without this, every later call would queue behind the one that hangs.
        ray.kill(flight.member.handle, no_restart=False)
        self._started.discard(name)
        if flight.chunk is None:
            raise GeneratorTimeoutError(
                f"{name} was not ready within generator.start_timeout_s = "
                f"{self._config.start_timeout_s:g} s ({self._asked(work, flight)}); it asks for "
                f"{self._config.cpus_per_actor:g} CPUs and {self._config.gpus_per_actor:g} GPUs, "
                f"and of the cluster's {_resources()}"
            )
        raise GeneratorTimeoutError(
            f"{name} did not answer within generator.request_timeout_s = "
            f"{self._config.request_timeout_s:g} s: {self._asked(work, flight)}; raise it, or "
            "lower generator.batch_size"
        )

    def _asked(self, work: _Work, flight: _Flight) -> str:
        return work.describe(None if flight.chunk is None else work.chunks[flight.chunk])


def _describe(what: str, prompts: Sequence[Prompt], chunk: list[int]) -> str:
    tails = "; ".join(repr(prompts[i].text[-60:]) for i in chunk[:3])
    return f"{what} of {len(chunk)} prompts, which end with {tails}"


def _raise_cause(error: RayTaskError, member: Member, asked: str) -> NoReturn:
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
