"""Batches of prompts in, results of the actors of a pool out.

A call is cut into chunks (`plan_chunks`); each actor works on one chunk at a time and takes the
next when it is free. Ray restarts an actor that dies, so handles stay valid; the pool starts its
engine again and sends what was lost again (`losses`). A prompt that no engine survives gets an
error in the place of its result. An actor that does not come back is done without while others
answer. Every wait has a bound and its error names the actor.

Each chunk names the weights that must answer it. An actor that holds others refuses, is told to
take the wanted set from the pool's `WeightStore`, and gets the chunk again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

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
from rlrag.generation.losses import DIED, HUNG, RAISED, Chunk, Losses
from rlrag.generation.pool_calls import Flight, Work, describe_prompts
from rlrag.generation.protocol import Sampling, TokenCount
from rlrag.generation.weight_store import WeightsTag, store_weights
from rlrag.records import Generation, Prompt, Score

if TYPE_CHECKING:
    from rlrag.generation.weights import GeneratorWeights

logger = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.2
_FETCH_TIMEOUT_S = 60.0


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
        self._seen_ready: set[str] = set()
        self._lost: set[str] = set()
        self._losses = Losses()
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

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> list[Generation | GenerationError]:
        """Decode one answer a prompt.

        A prompt that engines die of, hang on or fail with, also alone, gets the error as its
        result, and gets it again without being asked.

        Raises:
            GeneratorTimeoutError, GenerationError: when no actor can be restarted any more, or
                chunk after chunk is lost.
        """
        return self._run(
            "generate",
            prompts,
            lambda handle, wanted, chunk: handle.generate.remote(
                wanted, [prompts[i] for i in chunk], sampling
            ),
        )

    def score(
        self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]
    ) -> list[Score | GenerationError]:
        """Teacher-forced log p(answer | prompt); gives and raises errors as `generate` does."""
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
        results: dict[int, Any] = {}
        for place, prompt in enumerate(prompts):
            refusal = self._losses.refusal(prompt)
            if refusal is not None:
                results[place] = refusal
        asked = [place for place in range(len(prompts)) if place not in results]
        ids = [prompts[place].token_ids for place in asked]
        chunks = plan_chunks(ids, len(self._members()), self._config.batch_size)
        with self._lock.call():
            wanted = self._expected
            work = Work(
                wanted,
                lambda handle: handle.start.remote(wanted),
                lambda handle, places: send(handle, wanted, places),
                lambda places: (
                    "the start" if places is None else describe_prompts(what, prompts, places)
                ),
                prompts,
                deque(Chunk([asked[i] for i in chunk]) for chunk in chunks),
                results,
                set(self._lost),
            )
            pending = self._ask_lost(work)
            while len(results) < len(prompts):
                self._dispatch(work, pending)
                self._collect(work, pending)
        found = [results[place] for place in range(len(prompts))]
        self._tokens.num_requests += len(asked)
        self._tokens.spent += sum(
            r.num_prompt_tokens + r.num_tokens for r in found if not isinstance(r, GenerationError)
        )
        return found

    def _ask_lost(self, work: Work) -> dict[Any, Flight]:
        """Ask actors that were lost whether they are back; nobody waits for them."""
        deadline = time.monotonic() + self._config.start_timeout_s
        lost = [member for member in self._members() if member.name in work.left_out]
        return {work.prepare(m.handle): Flight(m, None, deadline) for m in lost if work.waiting}

    def _ask_all(self, what: str, wanted: WeightsTag, prepare: Callable[[Any], Any]) -> None:
        """Ask every actor once, until each has answered."""
        deadline = time.monotonic() + self._config.start_timeout_s
        work = Work(wanted, prepare, lambda handle, places: None, lambda places: what)
        work.left_out |= self._lost
        members = [member for member in self._members() if member.name not in self._lost]
        pending = {prepare(m.handle): Flight(m, None, deadline) for m in members}
        while pending:
            self._collect(work, pending)

    def _members(self) -> tuple[Member, ...]:
        if not self._actors.members:
            raise GenerationError("this generator pool was closed; open a new one")
        return self._actors.members

    def _dispatch(self, work: Work, pending: dict[Any, Flight]) -> None:
        """Give every free actor something to do: its start, or the next chunk."""
        if not work.waiting:
            return
        unable = work.left_out | {flight.member.name for flight in pending.values()}
        now = time.monotonic()
        for member in self._members():
            if member.name in unable or not work.waiting:
                continue
            if member.name not in self._started:
                deadline = now + self._config.start_timeout_s
                pending[work.prepare(member.handle)] = Flight(member, None, deadline)
            else:
                chunk = work.waiting.popleft()
                deadline = now + self._config.request_timeout_s
                ref = work.send(member.handle, chunk.places)
                pending[ref] = Flight(member, chunk, deadline)

    def _collect(self, work: Work, pending: dict[Any, Flight]) -> None:
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
                self._failed(work, flight, error)
            except GetTimeoutError as error:
                raise GeneratorTimeoutError(
                    f"the answer of {flight.member.name} to {work.asked(flight)} could not "
                    f"be fetched within {_FETCH_TIMEOUT_S:.0f} s; check the cluster's network"
                ) from error
            except RayActorError as error:
                self._gone(work, flight, error)
            else:
                self._answered(work, pending, flight, result)
        for ref in [r for r, f in pending.items() if f.deadline <= time.monotonic()]:
            self._time_out(work, pending.pop(ref))

    def _answered(
        self, work: Work, pending: dict[Any, Flight], flight: Flight, result: Any
    ) -> None:
        name = flight.member.name
        if isinstance(result, Standing):
            self._ready_or_waiting(work, pending, flight, result)
        elif isinstance(result, Refusal):
            self._started.discard(name)
            if flight.chunk is not None:
                work.waiting.appendleft(flight.chunk)
        elif flight.chunk is not None:
            self._losses.answered()
            versions = {r.version for r in result if not isinstance(r, GenerationError)}
            strange = versions - {work.wanted.version}
            if strange:
                raise GenerationError(
                    f"{name} answered {work.asked(flight)} with results of version "
                    f"{sorted(strange)} where {work.wanted} was asked for; its engine does not "
                    "tag results with the version that made them"
                )
            work.results.update(zip(flight.chunk.places, result, strict=True))

    def _ready_or_waiting(
        self, work: Work, pending: dict[Any, Flight], flight: Flight, standing: Standing
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
            self._seen_ready.add(name)
            self._lost.discard(name)
            work.left_out.discard(name)
            return
        if newest is not None and newest.version > wanted.version:
            raise GenerationError(
                f"the pool went on to weights of {newest} while this client expects {wanted}; "
                "call expect_weights with what was pushed last"
            )
        flight.waiting = standing
        time.sleep(_RETRY_PAUSE_S)
        pending[work.prepare(flight.member.handle)] = flight

    def _restarting(self, work: Work, pending: dict[Any, Flight], flight: Flight) -> None:
        """Ray is restarting the actor: ask for its start, and hand its chunk out again."""
        member, now = flight.member, time.monotonic()
        self._started.discard(member.name)
        if member.name in work.left_out:
            return
        deadline = flight.deadline
        if flight.chunk is not None:
            deadline = now + self._config.start_timeout_s
            died = GenerationError(f"{member.name} died on {work.asked(flight)}")
            self._lose(work, flight, DIED, died)
        if now >= deadline:
            self._time_out(work, Flight(member, None, deadline))
            return
        time.sleep(_RETRY_PAUSE_S)  # while Ray restarts an actor, calls to it fail at once
        pending[work.prepare(member.handle)] = Flight(member, None, deadline)

    def _failed(self, work: Work, flight: Flight, error: RayTaskError) -> None:
        """An engine raised; one that failed on prompts is started anew, whatever state it is in."""
        name, cause = flight.member.name, error.cause
        failed = GenerationError(
            f"{name} failed on {work.asked(flight)}: {type(cause).__name__}: {cause}"
        )
        failed.__cause__ = error
        if isinstance(cause, RlragError) and not (
            flight.chunk and isinstance(cause, GenerationError)
        ):
            raise cause from error
        if flight.chunk is None:
            raise failed
        self._restart(flight.member)
        self._lose(work, flight, RAISED, failed)

    def _time_out(self, work: Work, flight: Flight) -> None:
        name = flight.member.name
        if flight.waiting is not None:
            raise GeneratorTimeoutError(
                f"{name} holds weights of {flight.waiting.tag} where {work.wanted} is expected, "
                "which nobody pushed within generator.start_timeout_s = "
                f"{self._config.start_timeout_s:g} s (the weight store has "
                f"{flight.waiting.newest or 'no complete set'}); push it, again if it was"
            )
        # Without this, every later call would queue behind the one that hangs.
        self._restart(flight.member)
        if flight.chunk is None:
            self._leave_out(
                work,
                flight.member,
                GeneratorTimeoutError(
                    f"{name} was not ready within generator.start_timeout_s = "
                    f"{self._config.start_timeout_s:g} s ({work.asked(flight)}); it asks "
                    f"for {self._config.cpus_per_actor:g} CPUs and "
                    f"{self._config.gpus_per_actor:g} GPUs, and of the cluster's {_resources()}"
                ),
            )
            return
        late = GeneratorTimeoutError(
            f"{name} did not answer within generator.request_timeout_s = "
            f"{self._config.request_timeout_s:g} s: {work.asked(flight)}; raise it, or "
            "lower generator.batch_size"
        )
        self._lose(work, flight, HUNG, late)

    def _gone(self, work: Work, flight: Flight, error: RayActorError) -> None:
        """Ray does not restart the actor any more."""
        name = flight.member.name
        self._started.discard(name)
        gone = GenerationError(
            f"{name} died on {work.asked(flight)} and was already restarted "
            f"generator.max_restarts = {self._config.max_restarts} times; look for its last words "
            f"in Ray's logs (memory is the usual cause): {error}"
        )
        gone.__cause__ = error
        self._leave_out(work, flight.member, gone)
        if flight.chunk is not None:
            self._lose(work, flight, DIED, gone)

    def _lose(self, work: Work, flight: Flight, count: int, error: GenerationError) -> None:
        """Send again what an actor did not answer, or let the error be the result."""
        chunk = flight.chunk
        assert chunk is not None
        prompts = [work.prompts[place] for place in chunk.places]
        again = self._losses.lost(chunk, count, error, prompts)
        work.waiting.extendleft(reversed(again))
        if not again:
            work.results[chunk.places[0]] = error

    def _leave_out(self, work: Work, member: Member, error: GenerationError) -> None:
        """Go on without an actor that was ready once, if another one is ready."""
        self._started.discard(member.name)
        if member.name in self._lost:
            return
        if member.name not in self._seen_ready or not self._started:
            raise error
        logger.warning("%s; the other actors go on without it", error)
        self._lost.add(member.name)
        work.left_out.add(member.name)

    def _restart(self, member: Member) -> None:
        ray.kill(member.handle, no_restart=False)
        self._started.discard(member.name)


def _resources() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = (f"{total.get(k, 0):g} {k}s {free.get(k, 0):g} are free" for k in ("CPU", "GPU"))
    return " and of its ".join(parts)
