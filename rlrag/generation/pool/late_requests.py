"""Decides when a request is late enough to be sent to a second actor."""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field

# An engine's time a token differs between a full chunk and a short one, and with the load.
_LATE_FACTOR = 3.0
_LEAST_LATE_S = 2.0


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
