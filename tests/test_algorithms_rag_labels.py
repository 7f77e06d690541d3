"""Labels, walks and what scores are worth, against loops, enumeration and another library."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlrag.algorithms.rag_labels import (
    Thresholds,
    Walk,
    approximate_label,
    choose_pair,
    closed_set_label,
    has_bad_answer,
    marginal_contributions,
    score_auc,
    walk_together,
)
from rlrag.errors import ConfigError, DataError

INF, NAN = math.inf, math.nan


def test_thresholds_are_the_best_failure_and_the_worst_success():
    assert Thresholds.of_pools([-1.0, -4.0, -2.0], [-3.0, -6.0]) == (-3.0, -4.0)
    assert Thresholds.of_pools([-1.0, NAN], [NAN, -6.0]) == (-6.0, -1.0)


@pytest.mark.parametrize(
    ("logp", "label"),
    [(-1.0, 1), (-2.9, 1), (-3.0, None), (-3.5, None), (-4.0, None), (-4.1, 0), (-INF, 0)],
)
def test_overlapping_pools_leave_a_band_undecided(logp, label):
    """max negative -3, min positive -4; both comparisons are strict."""
    assert approximate_label(logp, Thresholds(-3.0, -4.0)) == label


@pytest.mark.parametrize(("logp", "label"), [(-1.0, 1), (-2.0, 1), (-2.9, 1), (-3.0, 0), (-5.0, 0)])
def test_a_score_in_the_gap_of_separable_pools_is_positive(logp, label):
    """max negative -3 < min positive -1: between them both conditions hold."""
    assert approximate_label(logp, Thresholds(max_negative=-3.0, min_positive=-1.0)) == label


def test_offline_passages_never_get_the_opposite_label():
    rng = np.random.default_rng(0)
    for _ in range(200):
        positives, negatives = rng.normal(size=3).round(1), rng.normal(size=4).round(1)
        thresholds = Thresholds.of_pools(positives.tolist(), negatives.tolist())
        assert all(approximate_label(logp, thresholds) != 0 for logp in positives)
        assert all(approximate_label(logp, thresholds) != 1 for logp in negatives)


def test_an_empty_pool_labels_nothing():
    only_positives = Thresholds.of_pools([-1.0], [])
    assert [approximate_label(s, only_positives) for s in (0.0, -1.0, -2.0)] == [None, None, 0]
    only_negatives = Thresholds.of_pools([], [-1.0])
    assert [approximate_label(s, only_negatives) for s in (0.0, -1.0, -2.0)] == [1, None, None]
    assert approximate_label(-1.0, Thresholds.of_pools([], [])) is None


def test_a_score_that_could_not_be_computed_is_undecided():
    assert approximate_label(NAN, Thresholds(-3.0, -4.0)) is None


@pytest.mark.parametrize(
    ("logp", "correct", "label"),
    [
        ([-1.0, -2.0, -1.5], 0, 1),
        ([-1.0, -2.0, -1.5], 2, 0),
        ([-1.0, -1.0], 0, 0),  # a tie is not right
        ([-1.0, -1.0, -2.0], 2, 0),
        ([-5.0], 0, 1),
        ([-1.0, -INF], 0, 1),
        ([-INF, -INF], 1, 0),
        ([-1.0, NAN], 0, None),
    ],
)
def test_a_closed_set_is_right_when_the_choice_is_strictly_likeliest(logp, correct, label):
    assert closed_set_label(logp, correct) == label


def walk(rows, label, chunk_size: int = 1) -> Walk:
    """A question that walks alone."""

    def label_pairs(pairs):
        return label([row for _, row in pairs])

    return walk_together([rows], label_pairs, chunk_size)[0]


def naive_walk(rows: list[int], label_of: dict[int, int | None]) -> Walk:
    positives = []
    for number, row in enumerate(rows):
        if label_of[row] == 0:
            return Walk(positives, row, number + 1)
        if label_of[row] == 1:
            positives.append(row)
    return Walk(positives, None, len(rows))


def test_every_ranking_of_labels_is_walked_as_the_paper_walks_it():
    for labels in itertools.product([0, 1, None], repeat=4):
        rows = [9, 0, 5, 2]
        label_of = dict(zip(rows, labels, strict=True))
        expected = naive_walk(rows, label_of)
        for chunk_size in (1, 2, 3, 4, 9):
            found = walk(rows, lambda chunk, of=label_of: [of[r] for r in chunk], chunk_size)
            assert (found.positives, found.negative) == (expected.positives, expected.negative)
            needed = -(-expected.num_scored // chunk_size) * chunk_size
            assert found.num_scored == min(needed, len(rows))


def test_a_walk_scores_no_further_than_it_must():
    asked = []

    def label(chunk):
        asked.append(list(chunk))
        return [0 if row == 3 else 1 for row in chunk]

    assert walk([1, 2, 3, 4, 5, 6], label, chunk_size=2) == Walk([1, 2], 3, 4)
    assert asked == [[1, 2], [3, 4]]
    assert walk([], label) == Walk([], None, 0)


def test_questions_that_walk_together_find_what_each_finds_alone():
    rng = np.random.default_rng(1)
    rankings = [rng.permutation(12)[: rng.integers(0, 12)].tolist() for _ in range(20)]
    labels = {
        (q, row): [0, 1, None, 1][rng.integers(4)]
        for q, rows in enumerate(rankings)
        for row in rows
    }
    for chunk_size in (1, 3):
        batches = []

        def label(pairs, batches=batches):
            batches.append(list(pairs))
            return [labels[pair] for pair in pairs]

        together = walk_together(rankings, label, chunk_size)
        alone = [
            walk(rows, lambda chunk, q=q: [labels[q, row] for row in chunk], chunk_size)
            for q, rows in enumerate(rankings)
        ]
        assert together == alone
        flat = [pair for batch in batches for pair in batch]
        assert len(flat) == len(set(flat)) == sum(each.num_scored for each in alone)
        assert len(batches) == -(-max(each.num_scored for each in alone) // chunk_size)


def test_a_walk_needs_a_step():
    with pytest.raises(ConfigError, match="chunk_size is 0; give at least 1"):
        walk([1], lambda chunk: [1], chunk_size=0)


def test_the_pair_is_the_hardest_negative_and_a_uniform_positive():
    rng = np.random.default_rng(0)
    drawn = [choose_pair([4, 7, 0], 0, [1], [2], rng) for _ in range(3000)]
    assert {negative for _, negative in drawn} == {0}
    counts = [sum(positive == row for positive, _ in drawn) for row in (4, 7, 0)]
    assert sum(counts) == 3000
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in counts)


def test_what_the_walk_did_not_find_comes_from_the_pools():
    rng = np.random.default_rng(0)
    drawn = {choose_pair([], None, [1, 2], [3, 4], rng) for _ in range(100)}
    assert drawn == {(1, 3), (1, 4), (2, 3), (2, 4)}
    assert {choose_pair([8], None, [1, 2], [3], rng) for _ in range(20)} == {(8, 3)}
    assert {choose_pair([], 9, [1], [3, 4], rng) for _ in range(20)} == {(1, 9)}


@pytest.mark.parametrize(
    ("positives", "negative", "name"), [([], 3, "positive"), ([3], None, "negative")]
)
def test_an_empty_pool_that_is_needed_is_an_error(positives, negative, name):
    with pytest.raises(DataError, match=f"no retrieved and no pooled {name}"):
        choose_pair(positives, negative, [], [], np.random.default_rng(0))


def test_the_area_is_that_of_another_library_and_of_a_loop():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, labels, areas = [], [], []
    for _ in range(50):
        score = rng.normal(size=9).round(1)  # rounded, so that there are ties
        label = rng.integers(0, 2, size=9)
        if 0 < label.sum() < 9:
            area = roc_auc_score(label, score)
            assert score_auc([score], [label]) == pytest.approx(area)
            pairs = [(p > n) + 0.5 * (p == n) for p in score[label == 1] for n in score[label == 0]]
            assert area == pytest.approx(sum(pairs) / len(pairs))
            areas.append(area)
        scores.append(score)
        labels.append(label)
    assert score_auc(scores, labels) == pytest.approx(np.mean(areas))


def test_a_question_with_many_pairs_counts_as_much_as_another():
    many, few = [3.0, 2.0, 1.0, 0.0], [0.0, 1.0]
    assert score_auc([many, few], [[1, 1, 0, 0], [1, 0]]) == 0.5


def test_areas_at_their_edges():
    assert score_auc([[1.0, 1.0]], [[1, 0]]) == 0.5
    assert score_auc([[1.0, NAN, 0.0]], [[1, 0, 0]]) == 1.0
    assert score_auc([[1.0, NAN, 0.0]], [[1, 1, 0]]) == 1.0
    assert score_auc([[1.0, 0.0], [5.0, 6.0]], [[1, 0], [1, 1]]) == 1.0
    assert score_auc([[-INF, -1.0]], [[0, 1]]) == 1.0
    for scores, labels in (([], []), ([[1.0, 2.0]], [[1, 1]]), ([[1.0, NAN]], [[1, 0]])):
        assert math.isnan(score_auc(scores, labels))


def test_contributions_by_enumeration():
    rng = np.random.default_rng(0)
    selections = np.array(list(itertools.permutations(range(4), 2)))
    rewards = rng.normal(size=len(selections))
    expected = [
        np.mean([r for s, r in zip(selections, rewards, strict=True) if n in s])
        - np.mean([r for s, r in zip(selections, rewards, strict=True) if n not in s])
        for n in range(4)
    ]
    found = marginal_contributions(selections, rewards, 4)
    assert found.tolist() == pytest.approx(expected)
    order = rng.permutation(len(selections))
    again = marginal_contributions(selections[order], rewards[order], 4)
    assert again.tolist() == pytest.approx(found.tolist())


def test_an_additive_reward_is_recovered_up_to_what_others_lose():
    """All K = 2 of N = 5. With n: v_n and one other; without n: two others, all equally often."""
    values = np.array([3.0, -1.0, 0.5, 2.0, 0.0])
    selections = np.array(list(itertools.combinations(range(5), 2)))
    rewards = values[selections].sum(axis=1)
    others = (values.sum() - values) / 4
    expected = (values + others) - 2 * others
    assert marginal_contributions(selections, rewards, 5).tolist() == pytest.approx(expected)


def test_contributions_at_their_edges():
    selections = np.array([[0, 1], [0, 2], [0, 1]])
    found = marginal_contributions(selections, np.array([-1.0, -2.0, NAN]), 4)
    assert np.isnan(found[[0, 3]]).all()  # in all, in none
    assert found[[1, 2]].tolist() == [1.0, -1.0]
    alone = marginal_contributions(np.array([[0]]), np.array([-1.0]), 2)
    assert np.isnan(alone).all()
    nothing = marginal_contributions(np.zeros((0, 2), dtype=int), np.zeros(0), 2)
    assert np.isnan(nothing).all()


def test_a_selection_may_hold_fewer_passages_than_another():
    """Of four candidates, 4 is none: selections of 0 and 1, of 3, of none, and of 0."""
    selections = np.array([[0, 1], [3, 4], [4, 4], [0, 4]])
    rewards = np.array([4.0, 2.0, 0.0, 1.0])
    found = marginal_contributions(selections, rewards, 4)
    assert found.tolist() == pytest.approx([1.5, 3.0, NAN, 1 / 3], nan_ok=True)
    bad = has_bad_answer(selections, rewards, 4, margin=2.0)
    assert bad.tolist() == [True, False, False, True]


def test_a_bad_answer_is_by_the_margin_below_the_best_one():
    """Rewards 0, -1 and NaN with a margin of 1: the second is bad, the third is not known."""
    selections = np.array([[0, 1], [3, 1], [2, 4]])
    rewards = np.array([0.0, -1.0, NAN])
    found = has_bad_answer(selections, rewards, 5, margin=1.0)
    assert found.tolist() == [False, True, False, True, False]
    other_way = has_bad_answer(selections[::-1], rewards[::-1] + 7, 5, margin=1.0)
    assert other_way.tolist() == found.tolist()
    assert not has_bad_answer(selections, rewards, 5, margin=1.01).any()
    assert not has_bad_answer(selections, np.full(3, NAN), 5, margin=1.0).any()
    assert not has_bad_answer(selections[:0], rewards[:0], 5, margin=1.0).any()
