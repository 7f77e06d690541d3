"""Calls of a pool's client in progress: chunks of prompts, their timing and what failed.

A lost chunk is sent again, split, or given up:

    lost once    the chunk is sent again as it was: most actors die of something else
    lost twice   its prompts are sent one by one
    alone        a prompt that is lost twice is given up, and refused from then on
    a question   of which two prompts were given up is refused in every other prompt too

An answer that does not come in time and an engine that raises count as two losses at once: both
would most likely happen again. Where actors answer nothing at all, the fault is not a prompt's:
after some losses without an answer between them the call fails.

With several clients, a chunk that waits behind another client's prompt is lost with it; in the
worst case its prompts are given up too.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError
from rlrag.generation.pool.actor import Member, Standing
from rlrag.generation.pool.weight_store import WeightsTag
from rlrag.records import Prompt

# An engine's time a token differs between a full chunk and a short one, and with the load.
_LATE_FACTOR = 3.0
_LEAST_LATE_S = 2.0
DIED, HUNG, RAISED = 1, 2, 2
"""How many losses each kind counts for."""

_MAX_LOSSES = 2
_MAX_PROMPTS = 2
_MAX_IN_A_ROW = 8
"""For each actor, as each may lose a prompt of the same question at the same time."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Chunk:
    """The places of some prompts in a call, and how often they were lost together.

    `is_doubled` says that two actors may be asked for it; it is lost when both lost it.
    """

    places: list[int]
    losses: int = 0
    is_doubled: bool = False


@dataclass(slots=True)
class Pace:
    """Seconds a token of the chunks of one call; those of other calls may be other work.

    `num_needed` answers make a pace; before, nothing is late. `late_rate` is three times the
    median, the lower one, so that of two actors the faster one counts.

    Example:
        >>> pace = Pace(num_needed=1)
        >>> pace.late_s(1000)
        inf
        >>> pace.add(500, 1.0)
        >>> pace.late_s(1000)
        6.0
    """

    num_needed: int = 1
    late_rate: float = field(default=math.inf, init=False)
    _rates: list[float] = field(default_factory=list)

    def add(self, num_tokens: int, seconds: float) -> None:
        """An actor answered."""
        insort(self._rates, seconds / max(1, num_tokens))
        if len(self._rates) >= self.num_needed:
            self.late_rate = _LATE_FACTOR * self._rates[(len(self._rates) - 1) // 2]

    @property
    def is_known(self) -> bool:
        """Whether enough actors have answered."""
        return self.late_rate < math.inf

    def late_s(self, num_tokens: int) -> float:
        """The longest time that so many tokens may take; short waits are never late."""
        return max(_LEAST_LATE_S, self.late_rate * num_tokens)

    def is_slow(self, num_tokens: int, seconds: float) -> bool | None:
        """Whether an actor that took so long is slow; None where that cannot be told.

        Example:
            >>> pace = Pace(num_needed=1)
            >>> pace.add(100, 0.1)
            >>> pace.is_slow(100, 2.5), pace.is_slow(100, 0.3), pace.is_slow(100, 1.0)
            (True, False, None)
        """
        if self.is_known and seconds <= self.late_rate * num_tokens:
            return False
        return True if seconds > self.late_s(num_tokens) else None


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


class Losses:
    """What one client remembers of prompts that actors did not survive."""

    def __init__(self) -> None:
        self._given_up: dict[tuple[int, ...], GenerationError] = {}
        self._of_question: Counter[str] = Counter()
        self._in_a_row = 0

    def refusal(self, prompt: Prompt) -> GenerationError | None:
        """Why a prompt is not asked any more."""
        if prompt.question and self._of_question[prompt.question] >= _MAX_PROMPTS:
            return self._given_up.get(prompt.token_ids) or GenerationError(
                f"not sent, since {_MAX_PROMPTS} other prompts of the question "
                f"{prompt.question[:80]!r} failed on every actor they were sent to"
            )
        return self._given_up.get(prompt.token_ids)

    def answered(self) -> None:
        """Some actor answered: the pool works."""
        self._in_a_row = 0

    def lost(
        self,
        chunk: Chunk,
        count: int,
        error: GenerationError,
        prompts: list[Prompt],
        num_actors: int = 1,
    ) -> list[Chunk]:
        """What to send in place of a lost chunk; nothing when its one prompt is given up.

        Args:
            chunk: What was lost.
            count: `DIED`, `HUNG` or `RAISED`.
            error: Says who lost it and how.
            prompts: The prompts of the chunk.
            num_actors: How many there are to lose chunks.

        Raises:
            GenerationError: after too many losses with no answer between them; of the class of
                `error`.
        """
        self._in_a_row += count
        chunk.losses += count
        if self._in_a_row >= _MAX_IN_A_ROW * num_actors:
            self._fail(error)
        if chunk.losses < _MAX_LOSSES:
            logger.warning("%s; sending its prompts again", error)
            return [chunk]
        if len(prompts) > 1:
            logger.warning("%s; sending its prompts one by one", error)
            return [Chunk([place]) for place in chunk.places]
        logger.warning("%s; this prompt will not be sent again", error)
        self._given_up[prompts[0].token_ids] = error
        self._of_question[prompts[0].question] += 1
        return []

    def _fail(self, error: GenerationError) -> NoReturn:
        self._in_a_row = 0
        raise type(error)(
            f"{error}; several chunks in a row were lost, so the engines, not a prompt, are at "
            "fault: read Ray's logs of the actors; if memory ran out, lower generator.batch_size "
            "or prompt.max_prompt_tokens"
        ) from error
