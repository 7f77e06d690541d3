"""Pairs to train on, from pools and from walks down rankings, by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import GenerationError, RewardError
from rlrag.records import Passage, Question
from rlrag.retrieval.protocol import Hits
from rlrag.training.openrag.pairs import Pair, PairFinder
from rlrag.training.openrag.passage_judge import Judgement
from rlrag.training.openrag.pools import FAILED, Pools

NAN = float("nan")
CORPUS = MemoryCorpus(Passage(f"p{row}", "", f"text {row}") for row in range(40))
QUESTIONS = [Question(f"q{n}", f"question {n}", ("a",)) for n in range(4)]
# Question 0: above -2 is positive, below -3 negative. Question 1 is separable: above -5 positive.
# Question 2 has one passage whose judgement failed. Question 3 is like question 0.
POOLS = Pools(
    rows_QN=np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]),
    labels_QN=np.array(
        [[1, 0, 1, 0], [0, 1, 0, 0], [1, FAILED, 0, 0], [1, 0, 1, 0]], dtype=np.int8
    ),
    logp_QN=np.array(
        [
            [-1.0, -2.0, -3.0, -4.0],
            [-5.0, -1.0, -6.0, -7.0],
            [-1.0, NAN, -2.0, -2.5],
            [-1.0, -2.0, -3.0, -4.0],
        ]
    ),
    source="by hand",
)


class Ranked:
    """Finds the rows that a test names for each question."""

    def __init__(self, rankings: dict[str, list[int]]) -> None:
        self._rankings = rankings

    def search(self, questions, k=None) -> Hits:
        rows_BK = np.array([self._rankings[question] for question in questions])
        return Hits(rows_BK, np.zeros(rows_BK.shape, dtype=np.float32))


class Scores:
    """Judges by a table of scores or labels; remembers what it was asked."""

    def __init__(self, found: dict[tuple[int, int], float | bool]) -> None:
        self._found = found
        self.asked: list[tuple[int, int]] = []

    def __call__(self, questions, passages, with_labels):
        assert not with_labels
        pairs = [(int(q.id[1:]), int(p.id[1:])) for q, p in zip(questions, passages, strict=True)]
        self.asked += pairs
        return [self._judge(self._found[pair]) for pair in pairs]

    def _judge(self, found: float | bool | None):
        if found is None:
            return RewardError("unreadable")
        if isinstance(found, bool):
            return Judgement(-1.0, found)
        return Judgement(found, None)


def finder(judge=None, max_failed_share: float = 0.0) -> PairFinder:
    return PairFinder(QUESTIONS, CORPUS, POOLS, judge, max_failed_share)


def online(rankings: dict[int, list[int]], judge=None, seed: int = 0, share: float = 0.0):
    """Pairs by question, and the sums."""
    ranked = Ranked({QUESTIONS[n].question: rows for n, rows in rankings.items()})
    pairs, sums = finder(judge, share).online(
        np.array(list(rankings)), [[seed, n] for n in rankings], ranked
    )
    return dict(zip(rankings, pairs, strict=True)), sums


def test_offline_pairs_come_from_the_pools_and_repeat_with_the_seed():
    found: dict[int, Counter] = {0: Counter(), 1: Counter(), 2: Counter()}
    rows = np.array([0, 1, 2])
    for seed in range(200):
        pairs = finder().offline(rows, [[seed, n] for n in range(3)])
        assert pairs == finder().offline(rows, [[seed, n] for n in range(3)])
        for row, pair in zip(rows.tolist(), pairs, strict=True):
            found[row][pair] += 1
    assert set(found[0]) == {Pair(p, n) for p in (0, 2) for n in (1, 3)}
    assert set(found[1]) == {Pair(5, n) for n in (4, 6, 7)}
    assert set(found[2]) == {Pair(8, n) for n in (10, 11)}  # never the failed one
    for counts in found.values():  # each alike, within four standard deviations
        share = 1 / len(counts)
        assert all(abs(c - 200 * share) < 4 * (200 * share) ** 0.5 for c in counts.values())


def test_the_walk_ends_at_the_hardest_negative_with_the_positives_above_it():
    judge = Scores({(0, 20): -1.5, (0, 21): -2.5, (0, 22): -3.5, (0, 23): -0.1})
    found, sums = online({0: [20, 21, 0, 22, 23]}, judge)
    assert found[0].negative == 22
    assert found[0].positive in (20, 0)
    assert sums == {
        "num_walked": 4.0,
        "num_failed": 0.0,
        "online_positives": 1.0,
        "online_negatives": 1.0,
    }
    assert judge.asked == [(0, 20), (0, 21), (0, 22)]  # what is below the end is not


def test_positives_of_a_walk_are_drawn_evenly():
    scores = {(0, 20): -1.5, (0, 21): -2.5, (0, 22): -3.5, (0, 23): -0.1}
    seen = Counter(
        online({0: [20, 21, 0, 22, 23]}, Scores(scores), seed)[0][0].positive for seed in range(200)
    )
    assert set(seen) == {20, 0}
    assert min(seen.values()) > 60


def test_undecided_passages_are_passed_over():
    """Between -3 and -2 a score says nothing about question 0."""
    judge = Scores({(0, 20): -2.0, (0, 21): -2.9, (0, 22): -3.0, (0, 23): -1.9})
    found, sums = online({0: [20, 21, 22, 23]}, judge)
    assert found[0].positive == 23
    assert found[0].negative in (1, 3)  # from the pool
    assert (sums["online_positives"], sums["online_negatives"]) == (1.0, 0.0)


def test_a_score_in_the_gap_of_separable_pools_is_positive():
    found, _ = online({1: [20, 21]}, Scores({(1, 20): -3.0, (1, 21): -5.5}))
    assert found[1] == Pair(20, 21)


def test_a_known_label_wins_over_any_score_and_is_not_asked_for():
    judge = Scores({(0, 20): -9.0})
    found, _ = online({0: [2, 0, 20, 1]}, judge)
    assert found[0].negative == 20
    assert found[0].positive in (0, 2)
    assert judge.asked == [(0, 20)]
    judge = Scores({})
    found, _ = online({0: [2, 1, 0, 3]}, judge)
    assert found[0] == Pair(2, 1)
    assert judge.asked == []


def test_a_passage_whose_first_judgement_failed_is_asked_for_again():
    judge = Scores({(2, 9): -0.5})
    found, _ = online({2: [9, 10]}, judge)
    assert found[2] == Pair(9, 10)
    assert judge.asked == [(2, 9)]


@pytest.mark.parametrize(
    ("ranking", "positives", "negatives"),
    [
        ([3, 0], {0, 2}, {3}),  # a negative at once: the positive from the pool
        ([0, 2], {0, 2}, {1, 3}),  # no negative: it comes from the pool
        ([20, 21], {0, 2}, {1, 3}),  # nothing decided: both from the pools
    ],
)
def test_what_a_walk_does_not_find_the_pools_give(ranking, positives, negatives):
    seen = [
        online({0: ranking}, Scores({(0, 20): -2.5, (0, 21): -2.5}), seed)[0][0]
        for seed in range(60)
    ]
    assert {pair.positive for pair in seen} == positives
    assert {pair.negative for pair in seen} == negatives


def test_a_label_of_the_judge_is_taken_as_it_is():
    """Closed-set questions get labels with their scores; thresholds play no part."""
    found, _ = online({0: [20, 21]}, Scores({(0, 20): True, (0, 21): False}))
    assert found[0] == Pair(20, 21)


def test_results_do_not_depend_on_which_questions_walk_together():
    rng = np.random.default_rng(0)
    rankings = {n: rng.permutation(30).tolist() for n in range(4)}
    scores = {(n, row): float(rng.uniform(-8, 0)) for n in range(4) for row in range(40)}
    together, sums = online(rankings, Scores(scores))
    alone = [online({n: rankings[n]}, Scores(scores)) for n in range(4)]
    assert together == {n: found[n] for n, (found, _) in enumerate(alone)}
    for name, total in sums.items():
        assert total == sum(of[name] for _, of in alone)
    pairs = list(online(dict(reversed(rankings.items())), Scores(scores))[0].items())
    assert dict(pairs) == together


def test_the_same_question_may_stand_twice_in_a_batch():
    scores = {(0, 20): -1.5, (0, 22): -3.5}
    ranked = Ranked({QUESTIONS[0].question: [20, 0, 22]})
    pairs, sums = finder(Scores(scores)).online(np.array([0, 0]), [[1], [2]], ranked)
    assert {pair.negative for pair in pairs} == {22}
    assert sums["online_negatives"] == 2.0


def test_relevance_labels_never_ask_and_take_the_unknown_for_wrong():
    found, sums = online({0: [2, 20, 1], 1: [21, 5, 4]}, judge=None)
    assert found == {0: Pair(2, 20), 1: Pair(5, 21)}
    assert sums["num_failed"] == 0.0


def test_failures_are_passed_over_and_counted_and_too_many_end_the_run():
    scores = {(0, 20): None, (0, 21): -1.0, (0, 22): -9.0, (0, 23): -9.0}
    found, sums = online({0: [20, 21, 22, 23]}, Scores(scores), share=0.25)
    assert found[0] == Pair(21, 22)
    assert sums["num_failed"] == 1.0
    with pytest.raises(GenerationError, match=r"1 of 4 passages.*max_failed_share 0.2 .*unreadabl"):
        online({0: [20, 21, 22, 23]}, Scores(scores), share=0.2)


def test_a_worker_without_questions_finds_nothing():
    class Nothing:
        def search(self, questions, k=None) -> Hits:
            assert questions == []
            return Hits(np.zeros((0, 5), np.int64), np.zeros((0, 5), np.float32))

    pairs, sums = finder(Scores({})).online(np.zeros(0, np.int64), [], Nothing())
    assert pairs == []
    assert set(sums.values()) == {0.0}
    assert finder().offline(np.zeros(0, np.int64), []) == []


def test_lists_of_the_pools_for_the_divergence():
    """Of what the pools hold only the failed passage is scored anew."""
    judge = Scores({(2, 9): -0.25})
    texts, passages, logp_BM = finder(judge).listed(np.array([2, 0]), None)
    assert texts == ["question 2", "question 0"]
    assert passages == [[f"text {row}" for row in rows] for rows in ([8, 9, 10, 11], [0, 1, 2, 3])]
    assert logp_BM.tolist() == [[-1.0, -0.25, -2.0, -2.5], [-1.0, -2.0, -3.0, -4.0]]
    assert judge.asked == [(2, 9)]


def test_lists_of_the_retriever_for_the_divergence():
    judge = Scores({(0, 20): -0.5, (1, 0): -7.5})
    ranked = Ranked({"question 0": [20, 2], "question 1": [5, 0]})
    texts, passages, logp_BM = finder(judge).listed(np.array([0, 1]), ranked)
    assert texts == ["question 0", "question 1"]
    assert passages == [["text 20", "text 2"], ["text 5", "text 0"]]
    assert logp_BM.tolist() == [[-0.5, -3.0], [-1.0, -7.5]]
    assert judge.asked == [(0, 20), (1, 0)]


def test_a_listed_passage_that_cannot_be_scored_is_marked_and_too_many_end_the_run():
    ranked = Ranked({"question 0": [20, 2, 1, 0]})
    judge = Scores({(0, 20): None})
    found = finder(judge, 0.25)
    _, _, logp_BM = found.listed(np.array([0]), ranked)
    assert np.isnan(logp_BM[0, 0])
    assert logp_BM[0, 1:].tolist() == [-3.0, -2.0, -1.0]
    assert found.failures == ["unreadable"]
    found.listed(np.array([0]), None)
    assert found.failures == [], "those of the last batch alone"
    with pytest.raises(GenerationError, match=r"1 of 4 passages could not be scored.*unreadable"):
        finder(judge, 0.2).listed(np.array([0]), ranked)
