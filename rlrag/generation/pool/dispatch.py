"""Dispatches chunks to the actors of a pool and collects their results.

Each actor works on one chunk at a time and takes the next when it is free. Ray restarts an actor
that dies, so handles stay valid; its engine is started again and what was lost is sent again
(`Losses`). An actor that does not come back is done without while others answer.

When no chunk is left to give out, a free actor repeats a late one: one that has taken twice as long
a token as the fastest answer of the call. The first answer counts; both actors hold the same
weights, and the chunk is the same, so that the result does not tell who gave it. A chunk is
repeated once, and counts as lost when the last actor that was asked for it lost it.

An actor that still works on what nobody needs when a call ends is behind: later calls do without it
until it answers, or is restarted at its deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError, GeneratorTimeoutError, RlragError
from rlrag.generation.pool.actor import Member, Refusal, Standing
from rlrag.generation.pool.calls import DIED, HUNG, RAISED, Flight, Losses, Work
from rlrag.generation.waits import awaiting, note_answer

logger = logging.getLogger(__name__)

ACTOR_ENDED = (RayActorError, OutOfMemoryError)
"""What Ray raises for a call to an actor that has ended, the second where it ended the actor itself
because the node ran out of memory."""

_RETRY_PAUSE_S = 0.2
_FETCH_TIMEOUT_S = 60.0


class Dispatcher:
    """What one client knows of the actors of a pool, and how it gets answers from them."""

    def __init__(self, identity: str) -> None:
        self._identity = identity
        self._started: set[str] = set()
        self._seen_ready: set[str] = set()
        self._processes: dict[str, str] = {}  # by actor, as it last said
        self._ended: set[str] = set()
        self._lost: set[str] = set()
        self._behind: dict[Any, Flight] = {}
        self._guard = threading.Lock()  # of `_behind`: calls come from several threads
        self.losses = Losses()

    def answer(self, work: Work) -> None:
        """Give out the chunks until every prompt has its result."""
        with self._going_on(work):
            if work.waiting:
                self._ask_lost(work)
            while len(work.results) < len(work.prompts):
                self._dispatch(work)
                self._collect(work)

    def ask_all(self, work: Work) -> None:
        """Have every actor prepare itself, once, until each has answered.

        One that is behind is not waited for while there are others: should it lack the wanted
        weights when it is asked for prompts again, it refuses and is told to take them first.
        """
        with self._going_on(work):
            behind = {flight.member.name for flight in work.flights.values()}
            members = [m for m in work.members if m.name not in work.left_out]
            for member in [m for m in members if m.name not in behind] or members:
                self._ask_to_prepare(work, member)
            while not all(flight.is_behind for flight in work.flights.values()):
                self._collect(work)

    @contextmanager
    def _going_on(self, work: Work) -> Iterator[None]:
        """Take over the actors that are behind, and leave those that are in the end."""
        work.left_out |= self._lost
        with self._guard:
            work.flights |= self._behind
            self._behind = {}
        try:
            with awaiting(work.describe_flights):
                for ref in _answered(list(work.flights)):
                    self._land(work, ref)
                yield
        finally:
            behind = {
                ref: replace(flight, chunk=None, is_behind=True)
                for ref, flight in work.flights.items()
                if flight.chunk is not None or flight.is_behind
            }
            with self._guard:
                self._behind |= behind

    def _ask_lost(self, work: Work) -> None:
        """Ask actors that were lost whether they are back; nobody waits for them."""
        for member in work.members:
            if member.name in work.left_out:
                self._ask_to_prepare(work, member)

    def _ask_to_prepare(self, work: Work, member: Member) -> None:
        deadline = time.monotonic() + work.config.start_timeout_s
        work.flights[work.prepare(member.handle)] = Flight(member, None, deadline)

    def _dispatch(self, work: Work) -> None:
        """Give every free actor something to do: its start, the next chunk, or a late one."""
        for member in self._free(work):
            now = time.monotonic()
            late_at, chunk = work.next_late()
            if not work.waiting and (chunk is None or late_at > now):
                return
            if member.name not in self._started:
                self._ask_to_prepare(work, member)
                continue
            if work.waiting:
                chunk = work.waiting.popleft()
            else:
                assert chunk is not None
                chunk.is_repeated = True
                what = work.describe(chunk.places)
                logger.warning("%s repeats what another actor is late with: %s", member.name, what)
            ref = work.send(member.handle, chunk.places)
            work.flights[ref] = Flight(member, chunk, now + work.config.request_timeout_s, now)

    def _free(self, work: Work) -> list[Member]:
        unable = work.left_out | {flight.member.name for flight in work.flights.values()}
        return [member for member in work.members if member.name not in unable]

    def _collect(self, work: Work) -> None:
        """Wait for one answer, a deadline, or until there is a late chunk for a free actor."""
        until = min(flight.deadline for flight in work.flights.values())
        if self._free(work):
            until = min(until, work.next_late()[0])
        ready, _ = ray.wait(
            list(work.flights), num_returns=1, timeout=max(0.0, until - time.monotonic())
        )
        now = time.monotonic()
        due = [ref for ref, flight in work.flights.items() if flight.deadline <= now]
        # `ray.wait` told of one answer; what else has come is in time.
        for ref in dict.fromkeys([*ready, *_answered(due)]):
            self._land(work, ref)
        for ref in due:
            if ref in work.flights:
                self._time_out(work, work.flights.pop(ref))

    def _land(self, work: Work, ref: Any) -> None:
        """Take an answer, or the news that there will be none."""
        flight = work.flights.pop(ref)
        try:
            result = ray.get(ref, timeout=_FETCH_TIMEOUT_S)
        except ActorUnavailableError:
            self._restarting(work, flight)
        except RayTaskError as error:
            self._failed(work, flight, error)
        except GetTimeoutError as error:
            raise GeneratorTimeoutError(
                f"the answer of {flight.member.name} to {work.asked(flight)} could not "
                f"be fetched within {_FETCH_TIMEOUT_S:.0f} s; check the cluster's network"
            ) from error
        except ACTOR_ENDED as error:
            self._gone(work, flight, error)
        else:
            self._landed(work, flight, result)

    def _landed(self, work: Work, flight: Flight, result: Any) -> None:
        name, chunk = flight.member.name, flight.chunk
        if isinstance(result, Standing):
            self._ready_or_waiting(work, flight, result)
        elif isinstance(result, Refusal):
            self._started.discard(name)
            if chunk is not None and not work.is_settled(chunk):
                work.waiting.appendleft(chunk)
        elif chunk is not None or flight.is_behind:
            note_answer()
            self.losses.answered()
            if chunk is not None:
                _check_versions(work, flight, result)
                work.answered(flight)
                if not work.is_answered(chunk):
                    work.results.update(zip(chunk.places, result, strict=True))

    def _ready_or_waiting(self, work: Work, flight: Flight, standing: Standing) -> None:
        """Note that an actor is ready, or ask again until its weights have been pushed."""
        name, wanted, newest = flight.member.name, work.wanted, standing.newest
        if standing.identity != self._identity:
            raise GenerationError(
                f"{name} loaded generator {standing.identity} where {self._identity} was "
                "expected; the model files, or the module of your own generator, on its node "
                "differ from those on this one"
            )
        if standing.process in self._ended:  # Ray ends a process some time after it is told to
            self._ask_again(work, flight)
            return
        self._processes[name] = standing.process
        if standing.tag == wanted:
            self._started.add(name)
            self._seen_ready.add(name)
            self._lost.discard(name)
            work.left_out.discard(name)
            return
        if newest is not None and newest.version > wanted.version:
            raise GenerationError(
                f"the pool already has weights of {newest}, but this client expects {wanted}; "
                "call expect_weights with the version and digest that were pushed last"
            )
        flight.waiting = standing
        self._ask_again(work, flight)

    def _ask_again(self, work: Work, flight: Flight) -> None:
        time.sleep(_RETRY_PAUSE_S)
        work.flights[work.prepare(flight.member.handle)] = flight

    def _restarting(self, work: Work, flight: Flight) -> None:
        """Ray is restarting the actor: ask for its start, and hand its chunk out again."""
        member, now = flight.member, time.monotonic()
        self._started.discard(member.name)
        if member.name in work.left_out:
            return
        deadline = flight.deadline
        if flight.chunk is not None or flight.is_behind:
            deadline = now + work.config.start_timeout_s
        if flight.chunk is not None:
            died = GenerationError(f"{member.name} died on {work.asked(flight)}")
            self._lose(work, flight, DIED, died)
        if now >= deadline:
            self._time_out(work, Flight(member, None, deadline))
            return
        time.sleep(_RETRY_PAUSE_S)  # while Ray restarts an actor, calls to it fail at once
        work.flights[work.prepare(member.handle)] = Flight(member, None, deadline)

    def _failed(self, work: Work, flight: Flight, error: RayTaskError) -> None:
        """An engine raised; one that failed on prompts is started anew, whatever state it is in."""
        name, cause = flight.member.name, error.cause
        failed = GenerationError(
            f"{name} failed on {work.asked(flight)}: {type(cause).__name__}: {cause}"
        )
        failed.__cause__ = error
        if flight.is_behind:
            logger.warning("%s", failed)
            self._restart(flight.member)
            return
        if isinstance(cause, RlragError) and not (
            flight.chunk and isinstance(cause, GenerationError)
        ):
            raise cause from error
        if flight.chunk is None:
            raise failed
        self._restart(flight.member)
        self._lose(work, flight, RAISED, failed)

    def _time_out(self, work: Work, flight: Flight) -> None:
        name, config = flight.member.name, work.config
        if flight.waiting is not None:
            raise GeneratorTimeoutError(
                f"{name} holds weights of {flight.waiting.tag} but {work.wanted} is expected, "
                "which was not pushed within generator.start_timeout_s = "
                f"{config.start_timeout_s:g} s (the weight store has "
                f"{flight.waiting.newest or 'no complete set'}); push that version again"
            )
        # Without this, every later call would queue behind the one that hangs.
        self._restart(flight.member)
        late = GeneratorTimeoutError(
            f"{name} did not answer within generator.request_timeout_s = "
            f"{config.request_timeout_s:g} s: {work.asked(flight)}; raise it, or "
            "lower generator.batch_size"
        )
        if flight.is_behind:
            logger.warning("%s", late)
        elif flight.chunk is not None:
            self._lose(work, flight, HUNG, late)
        else:
            self._leave_out(
                work,
                flight.member,
                GeneratorTimeoutError(
                    f"{name} was not ready within generator.start_timeout_s = "
                    f"{config.start_timeout_s:g} s ({work.asked(flight)}); it asks "
                    f"for {config.cpus_per_actor:g} CPUs and {config.gpus_per_actor:g} GPUs"
                    f"{_placement(config)}, and of the cluster's {_resources()}"
                ),
            )

    def _gone(self, work: Work, flight: Flight, error: RayError) -> None:
        """Ray does not restart the actor any more."""
        name = flight.member.name
        self._started.discard(name)
        gone = GenerationError(
            f"{name} died on {work.asked(flight)} and was restarted too often before; look for its "
            f"last messages in Ray's logs (memory is the usual cause): {error}"
        )
        gone.__cause__ = error
        self._leave_out(work, flight.member, gone)
        if flight.chunk is not None:
            self._lose(work, flight, DIED, gone)

    def _lose(self, work: Work, flight: Flight, count: int, error: GenerationError) -> None:
        """Send again what an actor did not answer, or let the error be the result."""
        chunk = flight.chunk
        assert chunk is not None
        if work.is_settled(chunk):
            logger.warning("%s; another actor has the same prompts", error)
            return
        prompts = [work.prompts[place] for place in chunk.places]
        again = self.losses.lost(chunk, count, error, prompts, len(work.members))
        work.waiting.extendleft(reversed(again))
        if not again:
            work.results[chunk.places[0]] = error
        work.refuse(self.losses.refusal)

    def _leave_out(self, work: Work, member: Member, error: GenerationError) -> None:
        """Go on without an actor that was ready once, if another one is ready."""
        self._started.discard(member.name)
        if member.name in self._lost:
            return
        if member.name not in self._seen_ready or not self._started:
            raise error
        logger.warning("%s; continuing with the other actors", error)
        self._lost.add(member.name)
        work.left_out.add(member.name)

    def _restart(self, member: Member) -> None:
        ray.kill(member.handle, no_restart=False)
        self._started.discard(member.name)
        if member.name in self._processes:
            self._ended.add(self._processes.pop(member.name))


def _answered(refs: list[Any]) -> list[Any]:
    """Those that need no waiting for."""
    if not refs:
        return []
    return list(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0])


def _check_versions(work: Work, flight: Flight, results: Sequence[Any]) -> None:
    versions = {r.version for r in results if not isinstance(r, GenerationError)}
    strange = versions - {work.wanted.version}
    if strange:
        raise GenerationError(
            f"{flight.member.name} answered {work.asked(flight)} with results of version "
            f"{sorted(strange)} but {work.wanted} was requested; its engine does not tag results "
            "with the version that made them"
        )


def _placement(config: GeneratorConfig) -> str:
    if config.placement is None:
        return ""
    return f" (with {config.num_actors - 1} more, generator.placement = {config.placement})"


def _resources() -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = (f"{total.get(k, 0):g} {k}s {free.get(k, 0):g} are free" for k in ("CPU", "GPU"))
    return " and of its ".join(parts)
