"""Draws one helpful and one unhelpful passage for each question of a step.

Offline, both are drawn at random from the pools. Online (OpenRAG, arXiv 2503.08398, section 3.3)
they come from what the retriever in training finds: its list is walked from the top, passages are
scored as they are met, and the walk stops at the first one that counts as negative. That one is the
negative; the positive is drawn from the positives above it. Where either is missing, the pools
give it. A passage that the pools know keeps its label; others get one from their score and the
thresholds of the pools, or none and are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlrag.algorithms.rag_labels import Label, approximate_label, choose_pair, walk_together
from rlrag.data.corpus import Corpus
from rlrag.errors import GenerationError, RlragError
from rlrag.records import Question
from rlrag.retrieval.trainable.late_parametric import LateParametricRetriever
from rlrag.training.openrag.passage_judge import PassageJudge
from rlrag.training.openrag.pools import Pools

# All questions of a batch walk at once, and each scores this many passages in a round, so that the
# engines have full batches. A walk may score one passage below its end.
_SCORED_AT_ONCE = 2


class Pair(NamedTuple):
    """Corpus rows of a positive and a negative passage."""

    positive: int
    negative: int


class PairFinder:
    """Finds the pairs of the pools' questions."""

    def __init__(
        self,
        questions: Sequence[Question],
        corpus: Corpus,
        pools: Pools,
        judge: PassageJudge | None,
        max_failed_share: float,
    ) -> None:
        """Take the questions of the pools, in their order.

        Args:
            questions: The questions.
            corpus: Where the rows are looked up.
            pools: What is known of the first candidates.
            judge: Scores passages that the pools do not know. Without one, for relevance training,
                those are negatives.
            max_failed_share: A batch ends with an error when more of its passages fail.
        """
        self._questions = questions
        self._corpus = corpus
        self._pools = pools
        self._judge = judge
        self._max_failed_share = max_failed_share
        self.failures: list[str] = []
        """Why passages of the last batch could not be scored."""

    def offline(self, rows: np.ndarray, seeds: Sequence[Sequence[int]]) -> list[Pair]:
        """A random pair from the pools of each question."""
        return [
            Pair(*choose_pair([], None, *self._pooled(row), np.random.default_rng(seed)))
            for row, seed in zip(rows.tolist(), seeds, strict=True)
        ]

    def online(
        self,
        rows: np.ndarray,
        seeds: Sequence[Sequence[int]],
        retriever: LateParametricRetriever,
    ) -> tuple[list[Pair], dict[str, float]]:
        """A pair from what the retriever finds now, and sums over the questions that describe it.

        Raises:
            GenerationError: when more passages cannot be scored than is allowed.
        """
        questions = rows.tolist()
        found = retriever.search([self._questions[row].question for row in questions]).rows_BK
        known = [self._pools.known(row) for row in questions]
        failed: list[RlragError] = []

        def label(pairs: Sequence[tuple[int, int]]) -> list[Label | None]:
            new = [(number, row) for number, row in pairs if row not in known[number]]
            scored = dict(zip(new, self._label(questions, new, failed), strict=True))
            return [
                scored[number, row] if row not in known[number] else known[number][row]
                for number, row in pairs
            ]

        walks = walk_together(found.tolist(), label, _SCORED_AT_ONCE)
        self._check_failed(failed, found.size)
        pairs = [
            Pair(
                *choose_pair(
                    walk.positives,
                    walk.negative,
                    *self._pooled(row),
                    np.random.default_rng(seed),
                )
            )
            for walk, row, seed in zip(walks, questions, seeds, strict=True)
        ]
        return pairs, {
            "num_walked": float(sum(walk.num_scored for walk in walks)),
            "num_failed": float(len(failed)),
            "online_positives": float(sum(bool(walk.positives) for walk in walks)),
            "online_negatives": float(sum(walk.negative is not None for walk in walks)),
        }

    def listed(
        self, rows: np.ndarray, retriever: LateParametricRetriever | None
    ) -> tuple[list[str], list[list[str]], np.ndarray]:
        """Questions, passages of each and log P(y | q, d) of these, to distil likelihoods from.

        The log-likelihood of a passage that cannot be scored is NaN.

        Args:
            rows: The questions.
            retriever: Finds the passages; without one they are those of the pools.

        Raises:
            GenerationError: when more passages cannot be scored than is allowed.
        """
        questions = rows.tolist()
        texts = [self._questions[row].question for row in questions]
        found_BM = retriever.search(texts).rows_BK if retriever else self._pools.rows_QN[rows]
        logp_BM = np.empty(found_BM.shape)
        asked = []
        failed: list[RlragError] = []
        for place, (question, found) in enumerate(zip(questions, found_BM, strict=True)):
            known = self._pools.known_logp(question)
            for column, row in enumerate(found.tolist()):
                logp_BM[place, column] = known.get(row, np.nan)
                if row not in known:
                    asked.append((place, column, row))
        if asked and self._judge is not None:
            judgements = self._judge(
                [self._questions[questions[place]] for place, _, _ in asked],
                [self._corpus[row] for _, _, row in asked],
                with_labels=False,
            )
            for (place, column, _), judgement in zip(asked, judgements, strict=True):
                if isinstance(judgement, RlragError):
                    failed.append(judgement)
                else:
                    logp_BM[place, column] = judgement.logp
        self._check_failed(failed, found_BM.size)
        passages = [[self._corpus[row].contents for row in found] for found in found_BM.tolist()]
        return texts, passages, logp_BM

    def _check_failed(self, failed: Sequence[RlragError], num_passages: int) -> None:
        self.failures = sorted({str(error) for error in failed})
        if len(failed) > self._max_failed_share * num_passages:
            raise GenerationError(
                f"{len(failed)} of {num_passages} passages could not be scored, more than "
                f"training.max_failed_share {self._max_failed_share} allows; the first: {failed[0]}"
            )

    def _pooled(self, question: int) -> tuple[list[int], list[int]]:
        return self._pools.of_label(question, 1), self._pools.of_label(question, 0)

    def _label(
        self, questions: Sequence[int], pairs: Sequence[tuple[int, int]], failed: list[RlragError]
    ) -> list[Label | None]:
        """Labels of passages that the pools do not know."""
        if self._judge is None:
            return [0] * len(pairs)
        judgements = self._judge(
            [self._questions[questions[number]] for number, _ in pairs],
            [self._corpus[row] for _, row in pairs],
            with_labels=False,
        )
        labels: list[Label | None] = []
        for (number, _), judgement in zip(pairs, judgements, strict=True):
            if isinstance(judgement, RlragError):
                failed.append(judgement)
                labels.append(None)
            elif judgement.is_right is not None:
                labels.append(1 if judgement.is_right else 0)
            else:
                thresholds = self._pools.thresholds(questions[number])
                labels.append(approximate_label(judgement.logp, thresholds))
        return labels
