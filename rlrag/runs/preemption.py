"""Ends a run between two steps on SIGTERM, so that it can resume later.

Whoever takes a machine away says so first, by SIGTERM, and gives some seconds. While a loop runs,
the signal becomes a sign in the run directory: rank 0 looks at it before each step, wherever it
runs, and all workers end together with a checkpoint. At any other time the program ends at once, as
it does at Ctrl-C: what indexes, caches and checkpoints hold is kept. A second SIGTERM kills.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlrag.errors import PreemptedError
from rlrag.runs.directory import RunDirectory

_AT_ONCE = b"error: ended at once by a second SIGTERM; run the same command to continue\n"


@contextmanager
def ended_by_sigterm() -> Iterator[Callable[[], None]]:
    """Let SIGTERM end the block.

    Yields:
        What to call when a library has put its own handler in place, as `ray.init` (2.60) does.

    Raises:
        PreemptedError: when the signal came.
    """
    asked = threading.Event()

    def end() -> None:
        asked.set()
        # Ray (2.60) lets no other exception of a handler out of the calls that it waits in.
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    _at_sigterm(end)
    try:
        yield lambda: _at_sigterm(end)
    except KeyboardInterrupt:
        if not asked.is_set():
            raise
        raise PreemptedError(
            "preempted outside the training steps; run the same command to continue"
        ) from None
    finally:
        _handle(before)


@contextmanager
def ended_between_steps(run_dir: RunDirectory) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM ask the loop that the block runs to end after its present step.

    Where the signal came, the next one kills, also after the block while the run is taken down.

    Yields:
        Whether the signal came.

    Raises:
        PreemptedError: when it came and the loop was done all the same.
    """
    asked = threading.Event()

    def ask() -> None:
        asked.set()
        run_dir.ask_to_stop()

    before = signal.getsignal(signal.SIGTERM)
    run_dir.allow_to_run()
    _at_sigterm(ask)
    try:
        yield asked.is_set
        if asked.is_set():
            raise PreemptedError(
                "preempted after the last training step; run the same command to continue"
            )
    finally:
        if not asked.is_set():
            _handle(before)
        run_dir.forget_stop()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block as it does elsewhere, whatever a library makes of it.

    Ray Train (2.60) ends the program with code 0, and leaves its handler in place.

    Raises:
        KeyboardInterrupt: when the block ends the program.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as ending:
        raise KeyboardInterrupt from ending
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _at_sigterm(act: Callable[[], None]) -> None:
    """Call `act` at the next SIGTERM and end the process at the one after it."""

    def handle(signum: int, frame: FrameType | None) -> None:
        _handle(_end_at_once)
        act()

    _handle(handle)


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    os.write(2, _AT_ONCE)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def _handle(handler: Any) -> None:
    """Install a handler, where Python allows it: signals reach the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
