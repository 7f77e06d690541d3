"""Brier score, reliability table and calibration error by hand, by a loop, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlrag.errors import ConfigError, DataError
from rlrag.evaluation.probe.calibration import Bin, brier, expected_calibration_error, reliability


def test_four_questions_by_hand():
    probabilities, outcomes = [0.1, 0.3, 0.5, 0.9], [0, 1, 0, 1]
    assert brier(probabilities, outcomes).tolist() == pytest.approx([0.01, 0.49, 0.25, 0.01])
    rows = reliability(probabilities, outcomes, num_bins=2)
    assert [(row.low, row.high, row.num_questions) for row in rows] == [(0, 0.5, 3), (0.5, 1, 1)]
    assert [row.mean_probability for row in rows] == pytest.approx([0.3, 0.9])
    assert [row.share for row in rows] == pytest.approx([1 / 3, 1])
    assert expected_calibration_error(rows) == pytest.approx(0.75 * (1 / 3 - 0.3) + 0.25 * 0.1)


@pytest.mark.parametrize(("probability", "place"), [(0, 1), (0.1, 1), (0.11, 2), (0.3, 3), (1, 10)])
def test_a_bin_holds_its_upper_edge(probability, place):
    (row,) = reliability([probability], [1])
    assert row == Bin((place - 1) / 10, place / 10, 1, probability, 1.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_bins", [1, 3, 10])
def test_the_error_agrees_with_a_loop_over_bins(seed, num_bins):
    rng = np.random.default_rng(seed)
    probabilities = rng.random(60)
    outcomes = (rng.random(60) < probabilities**2).astype(float)
    expected, seen = 0.0, 0
    for place in range(1, num_bins + 1):
        held = [
            (p, y)
            for p, y in zip(probabilities, outcomes, strict=True)
            if math.ceil(p * num_bins) == place
        ]
        seen += len(held)
        expected += abs(sum(y - p for p, y in held)) / 60
    rows = reliability(probabilities, outcomes, num_bins)
    assert seen == sum(row.num_questions for row in rows) == 60
    assert expected_calibration_error(rows) == pytest.approx(expected)


def test_certainty_that_comes_true_has_no_error():
    rows = reliability([0, 1, 1], [0, 1, 1])
    assert expected_calibration_error(rows) == brier([0, 1, 1], [0, 1, 1]).sum() == 0
    wrong = reliability([0, 1], [1, 0])
    assert expected_calibration_error(wrong) == brier([0, 1], [1, 0]).mean() == 1
    assert expected_calibration_error([]) == 0


def test_one_bin_has_the_gap_between_the_means():
    rows = reliability([0.2, 0.6, 0.9], [1, 0, 1], num_bins=1)
    assert expected_calibration_error(rows) == pytest.approx(2 / 3 - 1.7 / 3)


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "message"),
    [
        ([], [], "there are no probabilities"),
        ([0.5], [1, 0], "one probability and one outcome per question"),
        ([[0.5]], [[1]], "one probability and one outcome per question"),
        ([1.5], [1], r"a probability is 1\.5; it must be between 0 and 1"),
        ([-0.1], [1], "a probability is -0.1"),
        ([np.nan], [1], "a probability is nan"),
        ([0.5], [0.5], "an outcome is 0.5"),
        ([0.5], [np.nan], "an outcome is nan"),
    ],
)
@pytest.mark.parametrize("function", [brier, reliability])
def test_what_is_no_probability_is_refused(function, probabilities, outcomes, message):
    with pytest.raises(DataError, match=message):
        function(probabilities, outcomes)


def test_a_table_has_at_least_one_bin():
    with pytest.raises(ConfigError, match="num_bins is 0; give at least 1"):
        reliability([0.5], [1], num_bins=0)
