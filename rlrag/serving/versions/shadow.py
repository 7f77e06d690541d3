"""Compares the answers of a shadow version with those of the active version."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from rlrag.serving.http.metrics import Metrics
from rlrag.serving.http.replies import ComparisonReport, Difference
from rlrag.serving.questions import Ask
from rlrag.serving.records import Routing, VersionDesk
from rlrag.serving.stages import Computed

_MAX_DIFFERENCES = 50
_LOG = logging.getLogger("rlrag.serve")

Compute = Callable[[str, Ask], Awaitable[tuple[Computed, bool]]]


@dataclass
class _Comparison:
    active: str | None = None
    shadow: str | None = None
    num_compared: int = 0
    num_failed: int = 0
    num_dropped: int = 0
    num_equal_answers: int = 0
    num_equal_selections: int = 0
    num_timed: int = 0
    active_ms: float = 0.0
    shadow_ms: float = 0.0
    differences: deque[Difference] = field(default_factory=lambda: deque(maxlen=_MAX_DIFFERENCES))

    def report(self) -> ComparisonReport:
        return ComparisonReport(
            active=self.active,
            shadow=self.shadow,
            num_compared=self.num_compared,
            num_failed=self.num_failed,
            num_dropped=self.num_dropped,
            equal_answers=_mean(self.num_equal_answers, self.num_compared),
            equal_selections=_mean(self.num_equal_selections, self.num_compared),
            active_mean_ms=_mean(self.active_ms, self.num_timed),
            shadow_mean_ms=_mean(self.shadow_ms, self.num_timed),
            differences=list(self.differences),
        )


class ShadowRuns:
    """Answers of the shadow version, computed in the background and compared.

    The questions are those that the active version answered, whose answers repeat and whose
    selection was not explored: otherwise chance alone would make the two differ. The counts begin
    anew when either version changes.

    Args:
        compute: Answers a question with a version; tells whether a cache had the answer.
        desk: Told of every run, so that the shadow is not freed under it.
        max_runs: Runs at once; a question that comes on top of them is left out.
        timeout_s: Longest time of a run.
        metrics: Counts the results.
    """

    def __init__(
        self,
        compute: Compute,
        desk: VersionDesk,
        max_runs: int,
        timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._compute = compute
        self._desk = desk
        self._max_runs = max_runs
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._comparison = _Comparison()
        self._runs: set[asyncio.Task[None]] = set()

    def offer(
        self,
        routing: Routing,
        ask: Ask,
        request_id: str,
        version: str,
        answer: Computed,
        active_ms: float | None,
    ) -> None:
        """Have the shadow, if there is one, answer what the active version has answered.

        Args:
            routing: The versions in use now.
            ask: The question.
            request_id: The request that it came with.
            version: The version that answered it.
            answer: Its answer.
            active_ms: How long that took; None where a cache had it.
        """
        if routing.shadow is None or version != routing.active:
            return
        self._turn_to(routing.active, routing.shadow)
        if len(self._runs) >= self._max_runs:
            self._comparison.num_dropped += 1
            self._metrics.shadowed("dropped")
            return
        # Held from now on, since the shadow may be dropped before the task begins.
        self._desk.begin(routing.shadow)
        run = asyncio.ensure_future(
            self._run(routing.shadow, ask, request_id, answer, active_ms, self._comparison)
        )
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        run.add_done_callback(lambda _: self._desk.end(routing.shadow or ""))

    def report(self, routing: Routing) -> ComparisonReport:
        """The comparison of the versions in use, or the last one where there is no shadow now."""
        if routing.shadow is not None:
            self._turn_to(routing.active, routing.shadow)
        return self._comparison.report()

    async def settle(self) -> None:
        """Wait for the runs that are under way; each has its own bound."""
        if self._runs:
            await asyncio.wait(set(self._runs))

    async def close(self) -> None:
        """End all runs."""
        for run in self._runs:
            run.cancel()
        await self.settle()

    def _turn_to(self, active: str, shadow: str) -> None:
        if (self._comparison.active, self._comparison.shadow) != (active, shadow):
            self._comparison = _Comparison(active, shadow)

    async def _run(
        self,
        shadow: str,
        ask: Ask,
        request_id: str,
        answer: Computed,
        active_ms: float | None,
        comparison: _Comparison,
    ) -> None:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                other, cached = await self._compute(shadow, replace(ask, assigned=None))
        except Exception:  # noqa: BLE001 - a version under trial may fail in any way
            _LOG.exception("shadow %s did not answer request %s", shadow, request_id)
            comparison.num_failed += 1
            self._metrics.shadowed("failed")
            return
        comparison.num_compared += 1
        equal_answers = other.text == answer.text
        ids = [[passage.id for passage in one.chosen.passages] for one in (answer, other)]
        comparison.num_equal_answers += equal_answers
        comparison.num_equal_selections += ids[0] == ids[1]
        if active_ms is not None and not cached:
            comparison.num_timed += 1
            comparison.active_ms += active_ms
            comparison.shadow_ms += 1000 * (time.perf_counter() - began)
        equal = equal_answers and ids[0] == ids[1]
        self._metrics.shadowed("equal" if equal else "different")
        if not equal:
            comparison.differences.appendleft(
                Difference(
                    request_id=request_id,
                    question=ask.question,
                    active_answer=answer.text,
                    shadow_answer=other.text,
                    active_passages=ids[0],
                    shadow_passages=ids[1],
                )
            )


def _mean(total: float, number: int) -> float | None:
    return total / number if number else None
