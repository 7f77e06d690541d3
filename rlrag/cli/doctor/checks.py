"""A check: a function with a time limit that returns ok, warning or failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlrag.cli.command_line import exit_code
from rlrag.errors import RlragError

Status = Literal["ok", "warning", "failed"]
Kind = Literal["environment", "data", "config"]
_KIND_OF_CODE: dict[int, Kind] = {2: "config", 3: "data"}


@dataclass(frozen=True)
class Answer:
    """What a check found; what failed or may fail says what to do."""

    status: Status
    found: str
    advice: str = ""
    kind: Kind = "environment"


@dataclass(frozen=True)
class Finding:
    """The answer of the check with this name."""

    name: str
    status: Status
    found: str
    advice: str
    kind: Kind

    def line(self) -> str:
        """The finding in one line."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.status:8} {self.name:16} {self.found}{advice}"


def ok(found: str) -> Answer:
    """Nothing to do."""
    return Answer("ok", found)


def warning(found: str, advice: str) -> Answer:
    """A run may work, or work worse than it could."""
    return Answer("warning", found, advice)


def failed(found: str, advice: str, kind: Kind = "environment") -> Answer:
    """A run cannot work."""
    return Answer("failed", found, advice, kind)


def run_check(name: str, check: Callable[[], Answer], timeout_s: float) -> Finding:
    """Run a check; an error of it is its answer, and so is that it did not answer in time.

    A check that hangs, on storage that does not answer, is left behind in its thread.
    """
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(_answer(check)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    answer = (
        answers[0]
        if answers
        else failed(
            f"no answer within {timeout_s:g} s",
            "check whether its storage or network hangs, or raise --check-timeout-s",
        )
    )
    return Finding(name, answer.status, answer.found, answer.advice, answer.kind)


def _answer(check: Callable[[], Answer]) -> Answer:
    try:
        return check()
    except RlragError as error:
        found, _, advice = str(error).rpartition("; ")
        kind = _KIND_OF_CODE.get(exit_code(error), "environment")
        return failed(found, advice, kind) if found else failed(advice, "", kind)
    except Exception as error:  # noqa: BLE001 - whatever keeps a check from its answer is an answer
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return failed(f"could not be checked: {reason}", "fix the cause that the error names")
