"""State and functions that the HTTP routes of an application share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlrag.errors import RequestError
from rlrag.serving.answering import Answered, Answering, Found
from rlrag.serving.feedback_log import FeedbackLog
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.http.schemas import PassageFilter
from rlrag.serving.http.traffic import RequestRecord, Traffic
from rlrag.serving.questions import Ask
from rlrag.serving.records import Filters, VersionDesk
from rlrag.serving.settings import ServeSettings

_QUESTIONS_AT_ONCE = 16

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Service:
    """The parts behind the routes; `feedback` is None where none is recorded."""

    answering: Answering
    desk: VersionDesk
    settings: ServeSettings
    metrics: Metrics
    traffic: Traffic
    feedback: FeedbackLog | None


def filters_of(given: PassageFilter | None) -> Filters:
    """A request's filters; equal ones are equal whatever their order, so that caches know them."""
    if given is None:
        return Filters()
    return Filters(
        tuple(sorted(set(given.ids))), tuple(sorted(set(given.exclude_ids))), given.title_contains
    )


def note_outcome(record: RequestRecord, outcome: Answered | Found) -> None:
    """Write down which version answered a request and what the stages took."""
    record.version = outcome.version
    if isinstance(outcome, Answered):
        record.timings_ms = outcome.timings_ms
    else:
        record.timings_ms = {
            "wait": outcome.wait_ms,
            "retrieve": outcome.retrieve_ms,
            "total": outcome.total_ms,
        }


def check_number(name: str, number: int, most: int) -> None:
    """Refuse a request of too many questions.

    Raises:
        RequestError: naming the bound.
    """
    if number > most:
        raise RequestError.about(name, f"has {number} entries, more than the {most} of one request")


async def work_on_all(
    asks: Sequence[Ask], work: Callable[[int, Ask, bool], Awaitable[R]]
) -> list[R]:
    """Work on the questions of one request, a few at once, and return the results in their order.

    The first question comes in like any request and so may be refused; the others then wait for
    room as long as it takes.

    Args:
        asks: The questions.
        work: Called with a question's number, the question, and whether it waits patiently. What
            it raises ends the others.
    """
    results: dict[int, R] = {}
    rest = iter(enumerate(asks))

    async def take() -> None:
        for number, ask in rest:
            results[number] = await work(number, ask, number > 0)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(len(asks), _QUESTIONS_AT_ONCE)):
                group.create_task(take())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[number] for number in range(len(asks))]
