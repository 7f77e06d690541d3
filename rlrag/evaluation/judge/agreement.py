"""Agreement between two sets of labels of the same answers, with Cohen's kappa."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """The four counts of two yes-or-no judgements, the first against the second.

    Example:
        Cohen's own kind of table: 20 both yes, 15 both no, 5 and 10 where they differ. They agree
        in 35 of 50 = 0.7; by chance they would in 0.5 * 0.6 + 0.5 * 0.4 = 0.5 of the cases.

        >>> found = Agreement(both=20, first_only=5, second_only=10, neither=15)
        >>> found.raw, round(found.kappa, 6)
        (0.7, 0.4)
    """

    both: int
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> Agreement:
        """Count pairs of judgements."""
        counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
        for first, second in pairs:
            counts[bool(first), bool(second)] += 1
        return cls(*counts.values())

    @property
    def num(self) -> int:
        """How many answers both judged."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def raw(self) -> float | None:
        """Share of answers that both judge alike; None where there are none."""
        return (self.both + self.neither) / self.num if self.num else None

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, (p_o - p_e) / (1 - p_e) (Cohen 1960, A coefficient of agreement).

        p_o is the share judged alike and p_e what it would be if each judged by its own share of
        yes, and by chance. 1 is full agreement, 0 what chance gives.

        Edges: None without answers, and where both give one and the same judgement throughout:
        chance alone then agrees always (p_e = 1), and nothing can be said. 0 where one of them
        always says yes and the other always no, or only one of them is constant.
        """
        if not self.num:
            return None
        first_yes, second_yes = self.both + self.first_only, self.both + self.second_only
        # In whole numbers, all multiplied by num squared, so that p_e = 1 is found exactly.
        by_chance = first_yes * second_yes + (self.num - first_yes) * (self.num - second_yes)
        room = self.num**2 - by_chance
        alike = (self.both + self.neither) * self.num
        return (alike - by_chance) / room if room else None

    def to_json(self, first: str, second: str) -> dict[str, Any]:
        """Values that `json.dumps` takes; the judgements have these names."""
        return {
            "num": self.num,
            "raw": self.raw,
            "kappa": self.kappa,
            "both": self.both,
            f"{first}_only": self.first_only,
            f"{second}_only": self.second_only,
            "neither": self.neither,
        }
