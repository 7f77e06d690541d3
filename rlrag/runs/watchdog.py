"""Warns when a run makes no progress, and says what it waits for.

A report is a warning, which says what is under way, for how long, and whom it waits for, and a line
of the log with the stacks of all threads. Nothing is ended: every wait has a bound of its own, and
what looks like a stall may be a long step.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from rlrag.generation.waits import current_waits, num_answers

logger = logging.getLogger(__name__)

PERIOD_S = 300.0
"""Longer than nearly every step; whoever looks into the log of one that hangs finds a report."""
_CHECKS_A_PERIOD = 10
_JOIN_TIMEOUT_S = 10.0
_MOST_WAITS = 5

_current: ContextVar[Watchdog | None] = ContextVar("watchdog", default=None)


class Watchdog:
    """Reports, during its block, each period of `period_s` in which there was no progress.

    Progress is what `progress` is told, and any change of `sign`.
    """

    def __init__(
        self,
        what: str,
        sign: Callable[[], object] = num_answers,
        clock: Callable[[], float] = time.monotonic,
        period_s: float = PERIOD_S,
    ) -> None:
        """Watch nothing yet.

        Args:
            what: What is under way at first.
            sign: Changes while things go on; by default whenever an engine has answered.
            clock: Seconds that go forward.
            period_s: Longest time without progress.
        """
        self._period_s = period_s
        self._sign = sign
        self._clock = clock
        self._phase = (what, clock())
        self._seen: tuple[object, ...] = ()
        self._since = clock()
        self._num_reports = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._token: Token[Watchdog | None] | None = None

    def __enter__(self) -> Self:
        """Start to watch; `under_way` of this thread comes here."""
        self._token = _current.set(self)
        self._phase = (self._phase[0], self._clock())
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop to watch, whatever ended the block."""
        self._stop.set()
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._token is not None:
            _current.reset(self._token)

    def progress(self, what: str) -> None:
        """Something has ended, and this is under way now."""
        self._phase = (what, self._clock())

    def check(self) -> bool:
        """Report if there was no progress for another period; True if so."""
        now, phase = self._clock(), self._phase
        seen = (phase, self._sign())
        if seen != self._seen:
            # Others than a phase, which knows when it began, are first seen now.
            self._since = phase[1] if not self._seen or seen[0] != self._seen[0] else now
            self._seen, self._num_reports = seen, 0
        idle_s = now - self._since
        if idle_s < self._period_s * (self._num_reports + 1):
            return False
        self._num_reports = int(idle_s / self._period_s)
        self._report(phase[0], idle_s)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s / _CHECKS_A_PERIOD):
            self.check()

    def _report(self, what: str, idle_s: float) -> None:
        waits = current_waits()
        more = f" and {len(waits) - _MOST_WAITS} more" if len(waits) > _MOST_WAITS else ""
        logger.warning(
            "no progress for %.0f s during %s%s; the run was not stopped, and the log has the "
            "stacks of all threads",
            idle_s,
            what,
            f", waiting for {'; '.join(waits[:_MOST_WAITS])}{more}" if waits else "",
        )
        logger.info("no progress; stacks of all threads:\n%s", _stacks())


def under_way(what: str) -> None:
    """Tell the watchdog in whose block this thread is, if there is one."""
    watchdog = _current.get()
    if watchdog is not None:
        watchdog.progress(what)


def _stacks() -> str:
    """Where every thread of this process is, but for the one that asks."""
    frames, own = sys._current_frames(), threading.get_ident()
    return "\n".join(
        f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threading.enumerate()
        if thread.ident in frames and thread.ident != own
    )
