"""Evaluates the models that other libraries trained on the evaluation questions.

Every system is measured in one way: the configuration's prompt, K passages in context, answers of
the configuration's generator, unless a peer tuned that. Shape letters: Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.plan import Prepared
from rlrag.errors import DataError
from rlrag.evaluation.significance import (
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)
from rlrag.generation.build import open_generator
from rlrag.pipeline import Library, open_evaluation_data, open_reward, retrievers_of
from rlrag.records import Generation, Passage
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1

Selections = list[list[Passage]]
Values = dict[str, np.ndarray]
"""Exact match, F1 and contained answers by name, one value a question (Q)."""

_MEASURES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "em": exact_match,
    "f1": token_f1,
    "accuracy": answer_contained,
}


@dataclass(frozen=True)
class Comparison:
    """A system's minus the retriever's order, on the same questions."""

    difference: float
    ci95: tuple[float, float]
    p_value: float


@dataclass(frozen=True)
class Quality:
    """Means with 95 % intervals, and EM against the retriever's order; None for that itself."""

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    em_gain: Comparison | None


class Measurement:
    """Answers the evaluation questions of one plan; `close` when done.

    The generator as training found it is opened once, when it is first needed.
    """

    def __init__(self, prepared: Prepared, launcher: str) -> None:
        self._prepared, self._launcher = prepared, launcher

    @cached_property
    def _frozen(self) -> Any:
        config = self._prepared.config
        return open_generator(config.generator, self._launcher, config.cache_path)

    def close(self) -> None:
        """End the generator, if it was needed."""
        if "_frozen" in self.__dict__:
            self._frozen[0].close()

    @cached_property
    def baseline(self) -> Values:
        """The retriever's first K in its order."""
        return self._values(self.retriever_order())

    def retriever_order(self) -> Selections:
        """The first K candidates of each question."""
        table, k = self._prepared.dev, self._prepared.config.environment.num_selected
        return [list(table.passages(row)[:k]) for row in range(len(table))]

    def quality(self, selections: Selections) -> Quality:
        """That of passages shown to the generator as training found it."""
        return summary(self._values(selections), self.baseline)

    def generator_quality(self, directory: Path) -> Quality:
        """That of the retriever's order, answered by another generator.

        Raises:
            GenerationError: when it cannot be opened or does not answer.
        """
        config = self._prepared.config
        tuned = config.generator.model_copy(update={"model": str(directory)})
        opened = open_generator(tuned, self._launcher, config.cache_path)
        with closing(opened[0]):
            return summary(self._values(self.retriever_order(), opened), self.baseline)

    def encoder_order(self, directory: Path) -> Selections:
        """The first K of the whole corpus for an encoder of the same kind, which encodes it anew.

        Raises:
            ConfigError: when it does not fit the configuration.
        """
        config, library = self._prepared.config, self._prepared.library
        retrieval = tuned_retrieval(config.retrieval, directory)
        tuned = config.model_copy(update={"retrieval": retrieval})
        retrievers = retrievers_of(library.corpus, retrieval, config.cache_path)
        table, _ = open_evaluation_data(tuned, Library(library.corpus, retrievers))
        k = config.environment.num_selected
        return [list(table.passages(row)[:k]) for row in range(len(table))]

    def _values(self, selections: Selections, opened: Any = None) -> Values:
        generator, prompts = opened or self._frozen
        questions = self._prepared.dev.questions
        answering = open_reward(self._prepared.config, generator, prompts)
        answers = []
        for answer in answering.answer(questions, selections):
            if not isinstance(answer, Generation):
                raise answer
            answers.append(answer.text)
        return {
            name: np.array(
                [
                    measure(answer, question.golden_answers)
                    for answer, question in zip(answers, questions, strict=True)
                ]
            )
            for name, measure in _MEASURES.items()
        }


def picked_passages(prepared: Prepared, picks: dict[str, list[str]]) -> Selections:
    """A peer's picks as passages.

    Raises:
        DataError: when a question has no picks, or they are not K different candidates of it.
    """
    k, found = prepared.config.environment.num_selected, []
    for row, question in enumerate(prepared.dev.questions):
        candidates = {passage.id: passage for passage in prepared.dev.passages(row)}
        ids = picks.get(question.id, [])
        if len(set(ids)) != k or len(ids) != k or not set(ids) <= candidates.keys():
            raise DataError(
                f"question {question.id!r} has the picks {ids}; give {k} different candidates"
            )
        found.append([candidates[each] for each in ids])
    return found


def summary(values: Values, baseline: Values | None) -> Quality:
    """Means, bootstrap intervals, and the paired comparison of exact match with the baseline."""
    gain = None
    if baseline is not None:
        ours, theirs = values["em"], baseline["em"]
        gain = Comparison(
            float(ours.mean() - theirs.mean()),
            paired_randomization_ci(ours, theirs),
            paired_randomization_test(ours, theirs),
        )
    return Quality(
        {name: float(values_Q.mean()) for name, values_Q in values.items()},
        {name: bootstrap_ci(values_Q) for name, values_Q in values.items()},
        gain,
    )
