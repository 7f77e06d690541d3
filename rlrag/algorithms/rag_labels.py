"""OpenRAG's passage labels, and the training pairs built from them.

OpenRAG (arXiv 2503.08398, section 3) labels a passage d for a question q by what the generator does
with d alone in its context. The RAG label is 1 when the generated answer is right; the RAG score is
S = log p(y | q, d), in nats. Labels of a question's first passages are generated once, before
training (the offline pools D+ and D-). In training the score alone says what the label would be.

Passages are integers here, their rows in the corpus.

Shape letters: M selections, K passages of a selection, N candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from rlrag.errors import ConfigError, DataError

Label = Literal[0, 1]
"""1: the generator answers right with the passage; 0: it does not."""


class Thresholds(NamedTuple):
    """What the scores of a question's offline pools say about a new score, in nats."""

    max_negative: float
    """Highest score in D-."""
    min_positive: float
    """Lowest score in D+."""

    @classmethod
    def of_pools(cls, positive_logp: Iterable[float], negative_logp: Iterable[float]) -> Thresholds:
        """Thresholds of the scores in D+ and in D-.

        An empty pool has seen nothing, so it labels nothing: without D- no score is high enough for
        a positive (inf), without D+ none low enough for a negative (-inf). The paper drops such
        questions before. NaN scores are left out.

        Example:
            >>> Thresholds.of_pools([-1.0, -4.0], [-3.0, -6.0])
            Thresholds(max_negative=-3.0, min_positive=-4.0)
            >>> Thresholds.of_pools([-1.0], [])
            Thresholds(max_negative=inf, min_positive=-1.0)
        """
        negatives = [logp for logp in negative_logp if not math.isnan(logp)]
        positives = [logp for logp in positive_logp if not math.isnan(logp)]
        return cls(max(negatives, default=math.inf), min(positives, default=-math.inf))


def approximate_label(logp: float, thresholds: Thresholds) -> Label | None:
    """The label that a score stands for (section 3.3): positive, negative, or undecided.

    - 1 if S > max{S_d : d in D-}: better than whatever failed;
    - 0 if S < min{S_d : d in D+}: worse than whatever helped;
    - None otherwise, and for NaN, a score that could not be computed.

    Where the pools are separable (every positive scores above every negative), a score in the gap
    meets both conditions. It is positive then, the paper's first case: it is higher than that of
    any passage known to fail, and the gap has no passage that says otherwise.

    Example:
        >>> overlapping = Thresholds(max_negative=-2.0, min_positive=-4.0)
        >>> [approximate_label(logp, overlapping) for logp in (-1.0, -3.0, -5.0)]
        [1, None, 0]
        >>> approximate_label(-2.0, Thresholds(max_negative=-3.0, min_positive=-1.0))
        1
    """
    if logp > thresholds.max_negative:
        return 1
    if logp < thresholds.min_positive:
        return 0
    return None


def closed_set_label(choice_logp: Sequence[float], correct: int) -> Label | None:
    """Label for a question with choices: 1 iff the right one is strictly the likeliest.

    A tie is 0, a single choice 1. None where a choice could not be scored (NaN).

    Example:
        >>> closed_set_label([-1.0, -2.0, -1.5], correct=0), closed_set_label([-1.0, -1.0], 0)
        (1, 0)
    """
    if any(math.isnan(logp) for logp in choice_logp):
        return None
    others = [logp for number, logp in enumerate(choice_logp) if number != correct]
    return 1 if all(choice_logp[correct] > logp for logp in others) else 0


@dataclass(slots=True)
class Walk:
    """What was found on the way down the ranking of one question."""

    positives: list[int] = field(default_factory=list)
    """Passages labelled 1 above the first negative, best first."""
    negative: int | None = None
    """The highest passage labelled 0; None where there is none."""
    num_scored: int = 0
    """Passages that were scored."""


def walk_together(
    rankings: Sequence[Sequence[int]],
    label: Callable[[Sequence[tuple[int, int]]], Sequence[Label | None]],
    chunk_size: int = 1,
) -> list[Walk]:
    """Go down the ranking of each question from the top until its first negative (section 3.3).

    The result does not depend on which questions walk together.

    Args:
        rankings: Passages of each question in the order of its ranking.
        label: Scores and labels pairs of a ranking's number and a passage, the next chunk of every
            question that has not met a negative, so that a generator sees them as one batch.
        chunk_size: Passages of a question in a chunk. 1 is the paper's walk; a larger one finds the
            same and scores up to `chunk_size` - 1 passages more, in fewer calls.

    Example:
        >>> chunks = []
        >>> def label(pairs):
        ...     chunks.append(list(pairs))
        ...     return [0 if row == 5 else None for _, row in pairs]
        >>> [found.negative for found in walk_together([[5, 6], [8, 5]], label)]
        [5, 5]
        >>> chunks
        [[(0, 5), (1, 8)], [(1, 5)]]

    Raises:
        ConfigError: when `chunk_size` is below 1.
    """
    if chunk_size < 1:
        raise ConfigError(f"chunk_size is {chunk_size}; give at least 1")
    walks = [Walk() for _ in rankings]
    going = list(range(len(rankings)))
    start = 0
    while going := [n for n in going if walks[n].negative is None and start < len(rankings[n])]:
        pairs = [(n, row) for n in going for row in rankings[n][start : start + chunk_size]]
        for (number, row), found in zip(pairs, label(pairs), strict=True):
            place = walks[number]
            place.num_scored += 1
            if place.negative is not None:
                continue  # below the first negative, scored only because its chunk was
            if found == 1:
                place.positives.append(row)
            elif found == 0:
                place.negative = row
        start += chunk_size
    return walks


def choose_pair(
    positives: Sequence[int],
    negative: int | None,
    offline_positives: Sequence[int],
    offline_negatives: Sequence[int],
    rng: np.random.Generator,
) -> tuple[int, int]:
    """The positive and the negative passage to train a question on (section 3.3).

    The negative is the walk's, the hardest there is; the positive a uniformly random one of the
    walk's. What the walk did not find is drawn at random from the offline pool of its label.

    Raises:
        DataError: when that pool is empty; such questions are dropped before training.
    """
    for found, pool, name in (
        (bool(positives), offline_positives, "positive"),
        (negative is not None, offline_negatives, "negative"),
    ):
        if not found and not len(pool):
            raise DataError(
                f"a question has no retrieved and no pooled {name} passages; drop questions with "
                "an empty pool before training"
            )
    chosen = int(rng.choice(positives if len(positives) else offline_positives))
    return chosen, int(rng.choice(offline_negatives)) if negative is None else negative


def score_auc(
    scores: Sequence[Sequence[float] | np.ndarray], labels: Sequence[Sequence[int] | np.ndarray]
) -> float:
    """How well scores tell labels apart within questions: mean area under the ROC curve.

    The area of a question is the share of its pairs of a positive and a negative passage in which
    the positive scores higher; ties count half. The mean is over questions and not over pairs, so
    that a question with many pairs counts as much as another. 0.5 is chance.

    Questions without both labels have no area and are left out, as are passages whose score is NaN;
    nan where no question is left.

    Args:
        scores: Of the passages of each question.
        labels: Of the same passages, 0 or 1.

    Example:
        >>> score_auc([[-1.0, -2.0, -3.0], [-1.0, -2.0]], [[1, 0, 1], [1, 0]])  # (1/2 + 1) / 2
        0.75
    """
    areas = []
    for of_question, label_of in zip(scores, labels, strict=True):
        score, label = np.asarray(of_question, dtype=np.float64), np.asarray(label_of)
        positive = score[(label == 1) & ~np.isnan(score)]
        negative = score[(label == 0) & ~np.isnan(score)]
        if len(positive) and len(negative):
            above = (positive[:, None] > negative).mean()
            equal = (positive[:, None] == negative).mean()
            areas.append(above + equal / 2)
    return float(np.mean(areas)) if areas else math.nan


def marginal_contributions(
    positions_MK: np.ndarray, rewards_M: np.ndarray, num_candidates: int
) -> np.ndarray:
    """What each candidate adds to the reward of one question's selections, float64 of shape (N,).

    The mean reward of the selections that hold the candidate minus the mean of those that do not,
    whatever its place in them. Selections are those that DRO drew and paid for. The difference is
    causal only if the other passages are drawn alike in both groups; a policy that picks two
    passages together credits both.

    NaN where no selection holds the candidate or all do, for then there is nothing to compare.
    Selections whose reward is NaN are left out. The position `num_candidates` stands for none,
    where a selection holds fewer passages than another.

    Example:
        >>> selections = np.array([[0, 1], [0, 2], [1, 2]])
        >>> marginal_contributions(selections, np.array([-1.0, -2.0, -4.0]), 4).tolist()
        [2.5, -0.5, -2.0, nan]
    """
    known_M = ~np.isnan(rewards_M)
    # The last column collects the places that hold nothing.
    holds_MN = np.zeros((len(positions_MK), num_candidates + 1), dtype=bool)
    np.put_along_axis(holds_MN, np.asarray(positions_MK), True, axis=1)
    holds_MN, rewards = holds_MN[known_M, :-1], np.asarray(rewards_M, dtype=np.float64)[known_M]
    num_with_N = holds_MN.sum(axis=0)
    num_without_N = len(rewards) - num_with_N
    sum_with_N = np.where(holds_MN, rewards[:, None], 0.0).sum(axis=0)
    sum_without_N = np.where(holds_MN, 0.0, rewards[:, None]).sum(axis=0)
    both_N = (num_with_N > 0) & (num_without_N > 0)
    mean_with_N = sum_with_N / num_with_N.clip(min=1)
    mean_without_N = sum_without_N / num_without_N.clip(min=1)
    return np.where(both_N, mean_with_N - mean_without_N, np.nan)


def has_bad_answer(
    positions_MK: np.ndarray, rewards_M: np.ndarray, num_candidates: int, margin: float
) -> np.ndarray:
    """Whether some selection with the candidate was answered badly, bool of shape (N,).

    Badly is a reward that is at least `margin` below the best of the question's selections. A
    passage whose selections were all about as good as the best has shown nothing against it, even
    where its contribution is negative: the selections without it may have held a better one.

    Selections whose reward is NaN are left out; `num_candidates` stands for no passage.

    Example:
        >>> selections = np.array([[0, 1], [0, 2], [1, 2]])
        >>> has_bad_answer(selections, np.array([-0.1, -0.3, -4.0]), 4, margin=1.0).tolist()
        [False, True, True, False]
    """
    known_M = ~np.isnan(rewards_M)
    rewards = np.asarray(rewards_M, dtype=np.float64)[known_M]
    bad_MK = np.asarray(positions_MK)[known_M][rewards <= rewards.max(initial=-np.inf) - margin]
    return np.isin(np.arange(num_candidates), bad_MK)
