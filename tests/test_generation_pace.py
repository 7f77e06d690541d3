"""What counts as late and as slow, by hand-computed times."""

from __future__ import annotations

import math

import pytest

from rlrag.generation.pool.calls import Pace


def pace_of(*answers: tuple[int, float], num_needed: int = 1) -> Pace:
    pace = Pace(num_needed)
    for num_tokens, seconds in answers:
        pace.add(num_tokens, seconds)
    return pace


def test_nothing_is_late_or_slow_before_enough_have_answered():
    pace = pace_of((100, 1.0), num_needed=2)
    assert not pace.is_known
    assert pace.late_s(100) == math.inf
    assert pace.is_slow(100, 1e9) is None
    pace.add(100, 3.0)
    assert pace.is_known
    assert pace.late_s(100) == 3 * 1.0  # the lower median


@pytest.mark.parametrize(
    ("answers", "rate"),
    [
        ([(100, 5.0)], 0.05),
        ([(100, 50.0), (200, 2.0)], 0.01),
        ([(100, 2.0), (100, 50.0), (200, 2.0)], 0.02),
        ([(100, 2.0), (100, 50.0), (200, 2.0), (100, 4.0)], 0.02),
    ],
)
def test_late_is_three_times_the_lower_median_a_token(answers, rate):
    for order in (answers, answers[::-1]):
        assert pace_of(*order).late_s(1000) == pytest.approx(3 * rate * 1000)


def test_two_seconds_are_never_late():
    pace = pace_of((100, 0.1))
    assert pace.late_s(10) == 2.0
    assert pace.late_s(2000) == pytest.approx(6.0)


def test_in_between_an_actor_stays_what_it_was():
    pace = pace_of((100, 0.1))
    assert pace.is_slow(100, 0.29) is False
    assert pace.is_slow(100, 1.9) is None  # three times the pace, but short
    assert pace.is_slow(100, 2.1) is True
    assert pace.is_slow(10_000, 29.0) is False
    assert pace.is_slow(10_000, 31.0) is True


def test_a_chunk_without_tokens_divides_by_nothing():
    assert pace_of((0, 1.0)).late_s(1) == pytest.approx(3.0)
