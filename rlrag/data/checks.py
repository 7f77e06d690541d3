"""Counts irregular records in input files, for a short report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MAX_NAMED = 5
MAX_CUT_SHARE = 0.01
"""Share of words or tokens that may be cut away before it is worth a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How often something was found, and the ids where it was found first."""

    count: int = 0
    first: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        if not self.count:
            return "none"
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} ({', '.join(self.first)}{more})"


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read from one source, and what was odd about it.

    Example:
        >>> DataReport("a.jsonl", num_read=3, num_kept=2, empty=Finding(1, ("p7",))).summary()
        'a.jsonl: read 3, kept 2; empty texts skipped: 1 (p7)'
    """

    source: str
    num_read: int
    num_kept: int
    duplicates: Finding = field(default_factory=Finding)
    """Ids that came again; the first was kept."""
    empty: Finding = field(default_factory=Finding)
    """Ids of passages or questions without text, which were skipped."""
    unknown_gold: Finding = field(default_factory=Finding)
    """Gold passage ids that the corpus lacks; their questions were kept."""
    unknown_questions: Finding = field(default_factory=Finding)
    """Question ids of a relevance file that the question file lacks."""
    cut: Finding = field(default_factory=Finding)
    """Ids of passages of which only the first words were kept."""
    cut_share: float = 0.0
    """Share of the words of all passages that was not kept, from 0 to 1."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing odd was found, and hardly a word was cut."""
        odd = self.duplicates or self.empty or self.unknown_gold or self.unknown_questions
        return not odd and self.cut_share <= MAX_CUT_SHARE

    def summary(self) -> str:
        """The report as one line."""
        parts = [f"{self.source}: read {self.num_read}, kept {self.num_kept}"]
        for text, finding in (
            ("duplicate ids skipped", self.duplicates),
            ("empty texts skipped", self.empty),
            ("gold ids that the corpus lacks", self.unknown_gold),
            ("relevance lines for unknown questions", self.unknown_questions),
        ):
            if finding:
                parts.append(f"{text}: {finding}")
        if self.cut:
            parts.append(self.cut_words())
        return "; ".join(parts)

    def cut_words(self) -> str:
        """What was cut of passages, and how to keep it."""
        return (
            f"passages cut: {self.cut}, {self.cut_share:.1%} of all words; split long passages "
            "or raise data.passage_words to keep them"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataReport:
        """Rebuild what `to_dict` gave, also after a round trip through JSON."""
        parts: dict[str, Any] = dict(values)
        for name, value in parts.items():
            if isinstance(value, Mapping):
                parts[name] = Finding(int(value["count"]), tuple(value["first"]))
        return cls(**parts)


class FindingCounter:
    """Counts occurrences and remembers the first few ids; its memory does not grow."""

    def __init__(self) -> None:
        self._count = 0
        self._first: list[str] = []

    def add(self, name: str) -> None:
        """Count one more occurrence at the id `name`."""
        self._count += 1
        if len(self._first) < MAX_NAMED and name not in self._first:
            self._first.append(name)

    def finding(self) -> Finding:
        """What was counted so far."""
        return Finding(self._count, tuple(self._first))


class Tally:
    """Collects what a reader finds while its records stream by."""

    def __init__(self) -> None:
        self.num_read = 0
        self.duplicates = FindingCounter()
        self.empty = FindingCounter()
        self.unknown_gold = FindingCounter()
        self.unknown_questions = FindingCounter()
        self.cut = FindingCounter()
        self.num_words = 0
        self.num_cut_words = 0

    def report(self, source: str, num_kept: int) -> DataReport:
        """Freeze the counts."""
        return DataReport(
            source=source,
            num_read=self.num_read,
            num_kept=num_kept,
            duplicates=self.duplicates.finding(),
            empty=self.empty.finding(),
            unknown_gold=self.unknown_gold.finding(),
            unknown_questions=self.unknown_questions.finding(),
            cut=self.cut.finding(),
            cut_share=self.num_cut_words / max(self.num_words, 1),
        )
