"""Baselines without training, and which of them is best on validation questions.

Nobody needs to train for a fixed choice: the retriever's order, its reverse, its first passage
alone. So `trained` is tested against the best of those that a table has, and where a generator was
trained also against the best of them with that generator. Which one is best is found on validation
questions, since the best of several on the test questions owes a part of that to luck. An
evaluation keeps the choice, for later ones of the same weights on other questions.

Shape letter: Q questions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlrag.errors import DataError

TRAINED = "trained"
UNTRAINED = "untrained system"
FIXED_ORDER = "fixed order with the trained generator"
FIXED_CHOICES: Mapping[str, tuple[str, ...]] = {
    UNTRAINED: (
        "retriever_order",
        "original_retriever",
        "retriever_first",
        "retriever_reversed",
        "bm25",
        "dense",
        "hybrid",
        "hop_text",
        "hop_title",
        "hop_both",
        "random_order",
        "no_retrieval",
    ),
    FIXED_ORDER: ("tuned_generator", "tuned_generator_first", "tuned_generator_reversed"),
}
"""Systems by kind. Where nothing chose among those of a table, the first of them is compared."""


@dataclass(frozen=True)
class Baseline:
    """A system that `trained` is tested against.

    Attributes:
        system: Its name.
        kind: A key of `FIXED_CHOICES`.
        num_systems: How many of its kind it was chosen from.
        num_questions: Validation questions that chose it; 0 where none did.
    """

    system: str
    kind: str
    num_systems: int
    num_questions: int

    def __str__(self) -> str:
        """Why this one, as a part of a sentence."""
        if self.num_systems == 1:
            return f"the only {self.kind} of this table"
        if not self.num_questions:
            return f"{self.kind}, not chosen on held-back questions"
        return f"the strongest {self.kind} on {self.num_questions} validation questions"


def contenders(asked: Collection[str]) -> frozenset[str]:
    """Of the systems of a table those that have to be measured to choose among them."""
    kinds = [[name for name in names if name in asked] for names in FIXED_CHOICES.values()]
    rivals = (names for names in kinds if len(names) > 1 and TRAINED in asked)
    return frozenset(name for names in rivals for name in names)


def choose(measured: Mapping[str, Sequence[np.ndarray]], asked: Collection[str]) -> list[Baseline]:
    """The strongest system of each kind.

    Args:
        measured: By system the values of each validation question (Q), the measure that counts
            first before those that decide between equals; NaN where there was no answer.
        asked: The systems of the table.
    """
    found = []
    for kind, names in FIXED_CHOICES.items():
        present = [name for name in names if name in asked and name in measured]
        if not present:
            continue
        answered_Q = np.all([np.isfinite(measured[name][0]) for name in present], axis=0)
        if answered_Q.any():
            means = {
                name: [float(values_Q[answered_Q].mean()) for values_Q in measured[name]]
                for name in present
            }
            best = max(present, key=lambda name: means[name])
            found.append(Baseline(best, kind, len(present), int(answered_Q.sum())))
    return found


def baselines_for(asked: Collection[str], chosen: Sequence[Baseline]) -> tuple[Baseline, ...]:
    """What `trained` is tested against in a table: what was chosen, else the first of each kind."""
    if TRAINED not in asked:
        return ()
    by_kind = {baseline.kind: baseline for baseline in chosen if baseline.system in asked}
    found = []
    for kind, names in FIXED_CHOICES.items():
        present = [name for name in names if name in asked]
        if present:
            found.append(by_kind.get(kind) or Baseline(present[0], kind, len(present), 0))
    return tuple(found)


def baselines_to_json(baselines: Sequence[Baseline]) -> list[dict[str, Any]]:
    """As an evaluation keeps them."""
    return [asdict(baseline) for baseline in baselines]


def baselines_from_json(evaluation: Mapping[str, Any]) -> tuple[Baseline, ...]:
    """Those that an evaluation kept; none of one that an earlier version wrote.

    Raises:
        DataError: when they are damaged.
    """
    try:
        return tuple(Baseline(**found) for found in evaluation.get("baselines", ()))
    except TypeError as error:
        raise DataError(
            f"the baselines in the evaluation file are damaged ({error}); run the command "
            "that wrote it again"
        ) from error
