"""A retriever of your own, chosen by a flag.

    python -m jobs.train factbook --run-dir runs/titles \
        --retrieval.kind examples.own_retriever:TitleRetriever --retrieval.options weight=2

It counts the words that question and passage share, those of the title `weight` times. One that
finds what is in no corpus gives a `rlrag.records.Passage` in place of an id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlrag.data.corpus import Corpus


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


class TitleRetriever:
    """Finds passages by the words that they share with the question."""

    def __init__(self, corpus: Corpus, weight: float = 3.0) -> None:
        self._weight = weight
        self._passages = [(p.id, words(p.title), words(p.text)) for p in corpus]

    def search(self, questions: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The ids of the best `k` passages of each question, with their scores."""
        return [self._best(words(question), k) for question in questions]

    def _best(self, asked: set[str], k: int) -> list[tuple[str, float]]:
        scored = [
            (self._weight * len(asked & title) + len(asked & text), passage_id)
            for passage_id, title, text in self._passages
        ]
        best = sorted(scored, key=lambda found: (-found[0], found[1]))[:k]
        return [(passage_id, score) for score, passage_id in best]
