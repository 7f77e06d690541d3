"""A checked set of questions with a content hash and reproducible subsets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlrag.data.checks import DataReport
from rlrag.errors import DataError
from rlrag.records import Question


@dataclass(frozen=True)
class QuestionSet:
    """Questions in the order of their source.

    `content_hash` is the SHA-256, as 64 hex digits, over canonical JSON of every question;
    `report` says what was found while the source was read, also for a part of it.
    """

    questions: tuple[Question, ...]
    content_hash: str
    report: DataReport

    @classmethod
    def of(cls, questions: Iterable[Question], report: DataReport) -> QuestionSet:
        """Hash the questions and keep them with their report."""
        kept = tuple(questions)
        return cls(kept, hash_questions(kept), report)

    def __len__(self) -> int:
        return len(self.questions)

    def sample(self, n: int | None, seed: int) -> QuestionSet:
        """A random part of `n` questions in their original order; all of them for None.

        The same ids and seed give the same part on every machine, and a smaller sample lies
        within a larger one. `n` at or above the number of questions gives this very set.
        """
        if n is None or n >= len(self):
            return self
        return self._part(_draw(self.questions, n, f"sample:{seed}"))

    def answerable(self) -> QuestionSet:
        """Those with a golden answer that has a text, in their order."""
        kept = answerable_rows(self.questions).tolist()
        return self if len(kept) == len(self) else self._part(kept)

    def split(self, num_held_out: int, seed: int) -> tuple[QuestionSet, QuestionSet]:
        """Two disjoint parts in their original order: the rest, and `num_held_out` questions.

        Raises:
            DataError: when that would leave nothing in the first part.
        """
        if num_held_out >= len(self):
            raise DataError(
                f"cannot hold out {num_held_out} of the {len(self)} questions of "
                f"{self.report.source}; hold out fewer"
            )
        held_out = set(_draw(self.questions, num_held_out, f"split:{seed}"))
        rest = [index for index in range(len(self)) if index not in held_out]
        return self._part(rest), self._part(sorted(held_out))

    def _part(self, indices: Sequence[int]) -> QuestionSet:
        questions = tuple(self.questions[index] for index in indices)
        return replace(self, questions=questions, content_hash=hash_questions(questions))


def answerable_rows(questions: Sequence[Question]) -> np.ndarray:
    """Which of the questions have a golden answer with a text, int64."""
    has_answer = [any(text.strip() for text in each.golden_answers) for each in questions]
    return np.flatnonzero(has_answer)


def hash_questions(questions: Iterable[Question]) -> str:
    """SHA-256 over one line of canonical JSON a question, as 64 hex digits.

    Example:
        >>> hash_questions([])[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for question in questions:
        fields = {
            "id": question.id,
            "question": question.question,
            "golden_answers": list(question.golden_answers),
            "metadata": dict(question.metadata),
        }
        line = json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)
        digest.update((line + "\n").encode())
    return digest.hexdigest()


def _draw(questions: Sequence[Question], n: int, salt: str) -> list[int]:
    """Indices of `n` questions, ascending: those whose salted id hashes are smallest."""
    ranked = sorted(
        range(len(questions)),
        key=lambda index: hashlib.sha256(f"{salt}:{questions[index].id}".encode()).digest(),
    )
    return sorted(ranked[:n])
