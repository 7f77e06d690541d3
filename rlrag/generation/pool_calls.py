"""Calls of a pool's client that are on their way: what was asked of whom, what is left to ask."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrag.generation.engine_actor import Member, Standing
from rlrag.generation.losses import Chunk
from rlrag.generation.weight_store import WeightsTag
from rlrag.records import Prompt


@dataclass(slots=True)
class Flight:
    """One call that an actor has not answered; `chunk` is None while it prepares itself.

    `waiting` is what the actor said when it was ready but for weights that nobody had pushed.
    """

    member: Member
    chunk: Chunk | None
    deadline: float
    waiting: Standing | None = None


@dataclass(slots=True)
class Work:
    """One batch on its way through the pool, or one demand on every actor.

    `prepare` is asked of an actor that is not ready, `wanted` are the weights that must answer.
    """

    wanted: WeightsTag
    prepare: Callable[[Any], Any]
    send: Callable[[Any, list[int]], Any]
    describe: Callable[[list[int] | None], str]
    prompts: Sequence[Prompt] = ()
    waiting: deque[Chunk] = field(default_factory=deque)
    results: dict[int, Any] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def asked(self, flight: Flight) -> str:
        """What an actor was asked, for an error."""
        return self.describe(None if flight.chunk is None else flight.chunk.places)


def describe_prompts(what: str, prompts: Sequence[Prompt], places: Sequence[int]) -> str:
    """What was asked of some prompts, by the ends of the first of them."""
    tails = "; ".join(repr(prompts[place].text[-60:]) for place in places[:3])
    number = "1 prompt, which ends" if len(places) == 1 else f"{len(places)} prompts, which end"
    return f"{what} of {number} with {tails}"
