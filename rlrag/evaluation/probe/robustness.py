"""Modified contexts, such as added distractors, and their effect on answers.

A distractor is a candidate of the retriever that is no gold passage and holds no golden answer.
Where gold passages and distractors are mixed, their order is a fixed shuffle of the question: one
passage more stands somewhere between the others, which keep their order.

Shape letters: Q questions, O orders, S settings of a context.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlrag.data.corpus import Corpus
from rlrag.errors import ConfigError, DataError
from rlrag.records import Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import is_unanswerable, passages_contain_answer

Order = tuple[int, ...]


@dataclass(frozen=True)
class GoldContext:
    """An answerable question's gold passages, as it names them, and distractors, best first."""

    gold: tuple[Passage, ...]
    distractors: tuple[Passage, ...]


@dataclass(frozen=True)
class GoldQuestions:
    """For each question its passages, None where it cannot be used; why not, with how many."""

    contexts: tuple[GoldContext | None, ...]
    left_out: Mapping[str, int]

    @property
    def rows(self) -> list[int]:
        """The questions that can be used."""
        return [row for row, context in enumerate(self.contexts) if context is not None]


def gold_questions(candidates: CandidateTable, num_distractors: int) -> GoldQuestions:
    """Gold passages and distractors of every question that has them.

    A question is left out, and counted, under the first of these that holds: `unanswerable`;
    `no_gold_named`; `gold_not_in_corpus`, if any of its gold passages is missing there;
    `too_few_distractors` among its candidates.

    Args:
        candidates: The questions and what the retriever finds for them.
        num_distractors: How many of them a question needs.
    """
    contexts: list[GoldContext | None] = []
    left_out: Counter[str] = Counter()
    for row, question in enumerate(candidates.questions):
        found = _gold_context(question, candidates.corpus, candidates.passages(row))
        if not isinstance(found, str) and len(found.distractors) < num_distractors:
            found = "too_few_distractors"
        if isinstance(found, str):
            left_out[found] += 1
            contexts.append(None)
        else:
            contexts.append(found)
    return GoldQuestions(tuple(contexts), dict(left_out))


def _gold_context(
    question: Question, corpus: Corpus, candidates: Sequence[Passage]
) -> GoldContext | str:
    if is_unanswerable(question.golden_answers):
        return "unanswerable"
    gold_ids = tuple(dict.fromkeys(question.gold_ids))
    if not gold_ids:
        return "no_gold_named"
    rows = [corpus.row_of(gold_id) for gold_id in gold_ids]
    gold = tuple(corpus[row] for row in rows if row is not None)
    if len(gold) < len(rows):
        return "gold_not_in_corpus"
    distractors = tuple(
        passage
        for passage in candidates
        if passage.id not in gold_ids
        and not passages_contain_answer([passage], question.golden_answers)
    )
    return GoldContext(gold, distractors)


def shuffled(question_id: str, passages: Sequence[Passage], seed: int = 0) -> tuple[Passage, ...]:
    """The passages in an order that only the question, their ids and the seed decide.

    A passage that is there more than once has a place for each time. Of two sets, one within the
    other, the smaller one has the order of the larger.

    Example:
        >>> letters = [Passage(letter, "", letter) for letter in "abcd"]
        >>> "".join(passage.id for passage in shuffled("q1", letters))
        'acbd'
        >>> "".join(passage.id for passage in shuffled("q1", letters[:3]))
        'acb'
    """
    times: Counter[str] = Counter()
    keyed = []
    for passage in passages:
        times[passage.id] += 1
        text = "\0".join((str(seed), question_id, passage.id, str(times[passage.id])))
        keyed.append((hashlib.sha256(text.encode()).digest(), passage))
    return tuple(passage for _, passage in sorted(keyed, key=lambda pair: pair[0]))


def gold_at_places(context: GoldContext, num_distractors: int) -> list[tuple[Passage, ...]]:
    """The gold passages, together, after 0, 1, ..., `num_distractors` of as many distractors.

    So the first gold passage takes the places 1 to `num_distractors` + 1. The distractors keep
    the retriever's order.

    Example:
        >>> gold, *others = (Passage(name, "", name) for name in ("gold", "a", "b"))
        >>> contexts = gold_at_places(GoldContext((gold,), tuple(others)), 2)
        >>> [" ".join(passage.id for passage in passages) for passages in contexts]
        ['gold a b', 'a gold b', 'a b gold']
    """
    others = context.distractors[:num_distractors]
    return [others[:n] + context.gold + others[n:] for n in range(num_distractors + 1)]


def orders(num_passages: int, max_orders: int, seed: int = 0) -> list[Order]:
    """Orders of a set, that of the set itself first: all of them, or `max_orders` drawn ones.

    Example:
        >>> orders(2, max_orders=24)
        [(0, 1), (1, 0)]
        >>> len(orders(5, max_orders=24)), len(set(orders(5, max_orders=24)))
        (24, 24)

    Raises:
        ConfigError: fewer than two orders are allowed.
    """
    if max_orders < 2:
        raise ConfigError(f"max_orders is {max_orders}; order sensitivity compares at least 2")
    first = tuple(range(num_passages))
    if math.factorial(num_passages) <= max_orders:
        return list(itertools.permutations(first))
    rng = np.random.default_rng(seed)
    found = {first: None}
    while len(found) < max_orders:
        found[tuple(rng.permutation(num_passages).tolist())] = None
    return list(found)


def order_sensitivity(right: np.ndarray, f1: np.ndarray) -> dict[str, np.ndarray]:
    """What the order of the same passages does to each question; means over Q are the measures.

    `changes` is 1 where the answer is right in some orders and wrong in others. `accuracy_mean` and
    `f1_mean` are means over the orders, `f1_spread` is the standard deviation over them (divided by
    O, as these orders are all that was asked), `f1_range` the best less the worst. NaN stays NaN:
    such a question was not asked.

    Args:
        right: Whether the answer is right, 0 or 1, shape (Q, O).
        f1: F1 of the answer, shape (Q, O).

    Raises:
        DataError: the shapes differ, or there are fewer than two orders.

    Example:
        >>> found = order_sensitivity(np.array([[1.0, 0.0]]), np.array([[1.0, 0.5]]))
        >>> found["changes"].tolist(), found["f1_mean"].tolist(), found["f1_spread"].tolist()
        ([1.0], [0.75], [0.25])
    """
    if right.shape != f1.shape or right.ndim != 2 or right.shape[1] < 2:
        raise DataError(
            f"right has shape {right.shape} and f1 {f1.shape}; give both the same shape, with at "
            "least two orders per question"
        )
    share_Q = right.mean(axis=1)
    return {
        "changes": np.where(np.isnan(share_Q), np.nan, (share_Q > 0) & (share_Q < 1)),
        "accuracy_mean": share_Q,
        "f1_mean": f1.mean(axis=1),
        "f1_spread": f1.std(axis=1),
        "f1_range": f1.max(axis=1) - f1.min(axis=1),
    }


def by_setting(settings: Sequence[int], right: np.ndarray, f1: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy and F1 of each question at each setting, and from the first setting to the last.

    `accuracy@s` and `f1@s` belong to setting s; `accuracy_change` and `f1_change` are the last
    setting's value less the first's. NaN stays NaN: such a question was not asked.

    Args:
        settings: What was changed, for instance numbers of distractors, shape (S,).
        right: Whether the answer is right, 0 or 1, shape (Q, S).
        f1: F1 of the answer, shape (Q, S).

    Raises:
        DataError: the shapes do not agree, or there are no settings.

    Example:
        >>> found = by_setting([0, 4], np.array([[1.0, 0.0]]), np.array([[1.0, 0.5]]))
        >>> found["accuracy@4"].tolist(), found["f1_change"].tolist()
        ([0.0], [-0.5])
    """
    if right.shape != f1.shape or right.ndim != 2 or not 0 < len(settings) == right.shape[1]:
        raise DataError(
            f"right has shape {right.shape} and f1 {f1.shape} for the settings {list(settings)}; "
            "give each one column per setting"
        )
    found = {}
    for name, values_QS in (("accuracy", right), ("f1", f1)):
        for column, setting in enumerate(settings):
            found[f"{name}@{setting}"] = values_QS[:, column]
        found[f"{name}_change"] = values_QS[:, -1] - values_QS[:, 0]
    return found
