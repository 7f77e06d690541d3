"""Calls of a pool's client that are on their way: what was asked of whom, what is left to ask."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError
from rlrag.generation.pool.actor import Member, Standing
from rlrag.generation.pool.late_requests import Pace
from rlrag.generation.pool.retries import Chunk
from rlrag.generation.pool.weights import WeightsTag
from rlrag.records import Prompt


@dataclass(slots=True)
class Flight:
    """One call that an actor has not answered; `chunk` is None while it prepares itself.

    Attributes:
        member: Who was asked.
        chunk: What it was asked for.
        deadline: When it is given up.
        sent: When it was asked.
        num_tokens: Of the prompts.
        pace: That of the call which asked, by which the actor is judged.
        waiting: What the actor said when it was ready but for weights that nobody had pushed.
        is_behind: Nobody needs the answer any more, but the actor is busy until it comes; `chunk`
            is None.
    """

    member: Member
    chunk: Chunk | None
    deadline: float
    sent: float = field(default_factory=time.monotonic)
    num_tokens: int = 0
    pace: Pace = field(default_factory=Pace)
    waiting: Standing | None = None
    is_behind: bool = False


@dataclass(slots=True)
class Work:
    """One batch on its way through the pool, or one demand on every actor.

    Attributes:
        config: The waits.
        members: The actors.
        wanted: The weights that must answer.
        prepare: Asked of an actor that is not ready.
        send: Asks an actor for a chunk.
        describe: What was asked, for an error.
        prompts: Of the batch.
        waiting: Chunks to ask for.
        results: By place in the batch.
        left_out: Actors to do without.
        flights: What was asked and not answered.
        waits: From asking to the answer, which also waits behind other clients' chunks.
        pace: The actors' own time.
        unjudged: Actor, tokens and seconds of answers that came before there was a pace.
        probed: Slow actors that had their one chunk.
    """

    config: GeneratorConfig
    members: tuple[Member, ...]
    wanted: WeightsTag
    prepare: Callable[[Any], Any]
    send: Callable[[Any, list[int]], Any]
    describe: Callable[[list[int] | None], str]
    prompts: Sequence[Prompt] = ()
    waiting: deque[Chunk] = field(default_factory=deque)
    results: dict[int, Any] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    flights: dict[Any, Flight] = field(default_factory=dict)
    waits: Pace = field(init=False)
    pace: Pace = field(init=False)
    unjudged: list[tuple[str, int, float]] = field(default_factory=list)
    probed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        num_needed = max(1, min(len(self.members), len(self.waiting)) // 2)
        self.waits, self.pace = Pace(num_needed), Pace(num_needed)

    def is_answered(self, chunk: Chunk) -> bool:
        """Whether the results of a chunk are here, from whichever actor."""
        return chunk.places[0] in self.results

    def is_settled(self, chunk: Chunk) -> bool:
        """Whether a chunk is answered, or another actor is asked for it or is going to be."""
        return (
            self.is_answered(chunk)
            or any(other is chunk for other in self.waiting)
            or any(flight.chunk is chunk for flight in self.flights.values())
        )

    def take(self, name: str, is_slow: bool) -> Chunk | None:
        """What to ask an actor for next: the first chunk that waits.

        A slow actor gets the last and smallest, once. It stays in the list too, so that nobody
        waits for that actor.
        """
        if is_slow:
            return self._take_probe(name)
        while self.waiting:
            chunk = self.waiting.popleft()
            if not self.is_answered(chunk):
                return chunk
        return None

    def _take_probe(self, name: str) -> Chunk | None:
        if name in self.probed:
            return None
        for chunk in reversed(self.waiting):
            if not chunk.is_doubled and not self.is_answered(chunk):
                self.probed.add(name)
                chunk.is_doubled = True
                return chunk
        return None

    def refuse(self, refusal: Callable[[Prompt], GenerationError | None]) -> None:
        """Give each prompt that waits and is refused its error in the place of a result.

        One that another actor is asked for as well may yet be answered.
        """
        for chunk in list(self.waiting):
            if chunk.is_doubled:
                continue
            refused = {place: refusal(self.prompts[place]) for place in chunk.places}
            self.results.update({place: error for place, error in refused.items() if error})
            chunk.places = [place for place, error in refused.items() if error is None]
            if not chunk.places:
                self.waiting.remove(chunk)

    def due(self, flight: Flight) -> float:
        """When something is to be done about a flight: at its deadline, or when it is late.

        Then another actor is asked too, if there is one, and only once for a chunk.
        """
        if (
            flight.chunk is None
            or flight.chunk.is_doubled
            or not self.waits.is_known
            or len(self.members) - len(self.left_out) < 2
        ):
            return flight.deadline
        return min(flight.deadline, flight.sent + self.waits.late_s(flight.num_tokens))

    def asked(self, flight: Flight) -> str:
        """What an actor was asked, for an error."""
        if flight.is_behind:
            return "prompts of an earlier call, which others have answered"
        return self.describe(None if flight.chunk is None else flight.chunk.places)

    def describe_flights(self) -> list[str]:
        """Whom this waits for, how long and with what; called from any thread."""
        now = time.monotonic()
        flights = sorted(list(self.flights.values()), key=lambda flight: flight.sent)
        return [f"{f.member.name} for {now - f.sent:.0f} s: {self.asked(f)}" for f in flights]


def describe_prompts(what: str, prompts: Sequence[Prompt], places: Sequence[int]) -> str:
    """What was asked of some prompts, by the ends of the first of them."""
    tails = "; ".join(repr(prompts[place].text[-60:]) for place in places[:3])
    number = "1 prompt, which ends" if len(places) == 1 else f"{len(places)} prompts, which end"
    return f"{what} of {number} with {tails}"
