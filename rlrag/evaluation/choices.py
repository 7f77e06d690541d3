"""Statistics of the retriever ranks that a policy picks.

A policy can gain by choosing other passages than the retriever's first K, by showing the same ones
in another order, or by both. One that does nearly the same with every question has learned an
order: a person can have that without training, by a setting of the prompt. Positions count from 1,
in the retriever's order.

Shape letters: Q questions, N candidates, K selected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlrag.errors import DataError

CONSTANT_SHARE = 0.95
"""What a policy does with at least this share of the questions is constant."""
MIN_QUESTIONS = 20
"""Fewer questions tell nothing about that."""


@dataclass(frozen=True)
class Choices:
    """A policy's picks for a set of questions, counted.

    Attributes:
        num_questions: Q.
        num_selected: K.
        num_other_set: Questions with another set than the retriever's first K.
        num_other_order: Those with that set in another order.
        first: By position, the questions where it was picked first (N).
        last: By position, the questions where it was picked last (N).
        usual: The positions that were picked for most questions, in that order (K).
        num_usual: How many questions these are.
    """

    num_questions: int
    num_selected: int
    num_other_set: int
    num_other_order: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    usual: tuple[int, ...]
    num_usual: int

    @classmethod
    def of(cls, picks: Sequence[Sequence[int]], num_candidates: int, num_selected: int) -> Choices:
        """Count picks: for each question positions from 0, of which there may be fewer than K."""
        kept = tuple(range(num_selected))
        usual, num_usual = Counter(map(tuple, picks)).most_common(1)[0]
        first = Counter(found[0] for found in picks if len(found))
        last = Counter(found[-1] for found in picks if len(found))
        return cls(
            num_questions=len(picks),
            num_selected=num_selected,
            num_other_set=sum(set(found) != set(kept) for found in picks),
            num_other_order=sum(
                set(found) == set(kept) and tuple(found) != kept for found in picks
            ),
            first=tuple(first[n] for n in range(num_candidates)),
            last=tuple(last[n] for n in range(num_candidates)),
            usual=tuple(int(position) + 1 for position in usual),
            num_usual=num_usual,
        )

    @property
    def keeps_order(self) -> bool:
        """Whether most questions keep the retriever's order."""
        return self.usual == tuple(range(1, self.num_selected + 1))

    @property
    def constant(self) -> str | None:
        """What it does with nearly every question, None where that differs."""
        if self.num_questions < MIN_QUESTIONS or len(self.first) == 1:
            return None
        if self._is_nearly_all(self.num_usual):
            positions = ", ".join(map(str, self.usual))
            told = (
                "it keeps the retriever's order and has learned no choice"
                if self.keeps_order
                else "it has learned an order, not a choice"
            )
            return (
                f"the policy picks positions ({positions}) for {self._of(self.num_usual)}: {told}"
            )
        for place, counts in (("first", self.first), ("last", self.last)):
            if self.num_selected > 1 and self._is_nearly_all(max(counts)):
                position = counts.index(max(counts)) + 1
                return (
                    f"the policy picks position {position} {place} for {self._of(max(counts))}: in "
                    "that place it has learned an order, not a choice"
                )
        return None

    def describe(self) -> list[str]:
        """What the gain can come from, a sentence a line; without what is constant."""
        shown = [self._shares("picked first", self.first)]
        if self.num_selected > 1:
            shown.append(self._shares("last", self.last))
        order = (
            f", the same in another order for {self.num_other_order:,}"
            if self.num_selected > 1
            else ""
        )
        return [
            f"trained picks other passages than the retriever's first {self.num_selected} for "
            f"{self._of(self.num_other_set)}{order}",
            f"by the retriever's position: {'; '.join(shown)}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Values that `json.dumps` takes: the counts, and `constant`."""
        counts = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return counts | {"constant": self.constant}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Choices:
        """What `to_json` returned.

        Raises:
            DataError: when it is damaged.
        """
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if name != "constant"
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(
                f"the choices in the evaluation file are damaged ({error}); run the command that "
                "wrote it again"
            ) from error

    def _is_nearly_all(self, count: int) -> bool:
        return count >= CONSTANT_SHARE * self.num_questions

    def _of(self, count: int) -> str:
        return f"{count:,} of {self.num_questions:,} questions"

    def _shares(self, place: str, counts: tuple[int, ...]) -> str:
        shares = (
            f"{position} in {100 * count / self.num_questions:.0f} %"
            for position, count in enumerate(counts, 1)
            if count
        )
        return f"{place} {', '.join(shares)}"
