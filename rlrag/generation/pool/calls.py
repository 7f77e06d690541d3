"""Calls of a pool's client in progress: chunks of prompts, and what was lost.

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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from rlrag.config import GeneratorConfig
from rlrag.errors import GenerationError
from rlrag.generation.pool.actor import Member, Standing
from rlrag.generation.pool.weight_store import WeightsTag
from rlrag.records import Prompt

# Equal actors differ by less; what is repeated all the same costs only actors that have no other
# work. Chunks of less than two seconds are left alone: their times are mostly chance.
_LATE_FACTOR = 2.0
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

    `is_repeated` says that a second actor was asked for it; it is lost when both lost it.
    """

    places: list[int]
    losses: int = 0
    is_repeated: bool = False


@dataclass(slots=True)
class Flight:
    """One call that an actor has not answered; `chunk` is None while it prepares itself.

    Attributes:
        member: Who was asked.
        chunk: What it was asked for.
        deadline: When it is given up.
        sent: When it was asked.
        waiting: What the actor said when it was ready but for weights that nobody had pushed.
        is_behind: Nobody needs the answer any more, but the actor is busy until it comes; `chunk`
            is None.
    """

    member: Member
    chunk: Chunk | None
    deadline: float
    sent: float = field(default_factory=time.monotonic)
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
        s_per_token: That of the fastest answer so far; before the first one nothing is late.
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
    s_per_token: float = math.inf

    def is_answered(self, chunk: Chunk) -> bool:
        """Whether the results of a chunk are here, from whichever actor."""
        return chunk.places[0] in self.results

    def is_settled(self, chunk: Chunk) -> bool:
        """Whether a chunk is answered, or another actor works on it."""
        return self.is_answered(chunk) or any(
            flight.chunk is chunk for flight in self.flights.values()
        )

    def _num_tokens(self, chunk: Chunk) -> int:
        return max(1, sum(len(self.prompts[place].token_ids) for place in chunk.places))

    def answered(self, flight: Flight) -> None:
        """Note how long an actor took."""
        assert flight.chunk is not None
        seconds = time.monotonic() - flight.sent
        self.s_per_token = min(self.s_per_token, seconds / self._num_tokens(flight.chunk))

    def next_late(self) -> tuple[float, Chunk | None]:
        """The chunk that a free actor repeats next, and from when on."""
        late = (
            (
                flight.sent
                + max(_LEAST_LATE_S, _LATE_FACTOR * self.s_per_token * self._num_tokens(chunk)),
                chunk,
            )
            for flight in self.flights.values()
            if (chunk := flight.chunk) is not None and not chunk.is_repeated
        )
        return min(late, key=lambda found: found[0], default=(math.inf, None))

    def refuse(self, refusal: Callable[[Prompt], GenerationError | None]) -> None:
        """Give each prompt that waits and is refused its error in the place of a result."""
        for chunk in list(self.waiting):
            refused = {place: refusal(self.prompts[place]) for place in chunk.places}
            self.results.update({place: error for place, error in refused.items() if error})
            chunk.places = [place for place, error in refused.items() if error is None]
            if not chunk.places:
                self.waiting.remove(chunk)

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
