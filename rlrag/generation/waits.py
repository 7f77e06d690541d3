"""Registers pending waits of this process for the watchdog to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_waits: dict[object, Callable[[], list[str]]] = {}
_num_answers = 0


@contextmanager
def awaiting(describe: Callable[[], list[str]]) -> Iterator[None]:
    """Name what is waited for in the block; `describe` is called from another thread."""
    key = object()
    _waits[key] = describe
    try:
        yield
    finally:
        del _waits[key]


def note_answer() -> None:
    """Something that was waited for has come."""
    global _num_answers
    _num_answers += 1


def num_answers() -> int:
    """A number that rises while answers come."""
    return _num_answers


def current_waits() -> list[str]:
    """One line for each thing that some thread of this process waits for now."""
    return [line for describe in list(_waits.values()) for line in describe()]
