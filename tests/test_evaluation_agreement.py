"""Agreement of two judgements: by hand, against another way to compute it, and at the edges."""

from __future__ import annotations

import itertools

import pytest

from rlrag.evaluation.judge.agreement import Agreement


def test_kappa_by_hand():
    # Yes by the first: 45 + 15 = 60 of 100, by the second: 45 + 25 = 70. They agree in 45 + 15.
    # p_o = 0.6, p_e = 0.6 * 0.7 + 0.4 * 0.3 = 0.54, kappa = 0.06 / 0.46.
    found = Agreement(both=45, first_only=15, second_only=25, neither=15)
    assert found.num == 100
    assert found.raw == pytest.approx(0.6)
    assert found.kappa == pytest.approx(0.06 / 0.46)


@pytest.mark.parametrize(
    ("counts", "raw", "kappa"),
    [
        ((0, 0, 0, 0), None, None),
        ((7, 0, 0, 0), 1.0, None),  # both always yes: chance alone agrees
        ((0, 0, 0, 7), 1.0, None),
        ((0, 7, 0, 0), 0.0, 0.0),  # one always yes, the other always no
        ((3, 4, 0, 0), 3 / 7, 0.0),  # only the first is constant
        ((3, 0, 0, 4), 1.0, 1.0),
        ((0, 2, 2, 0), 0.0, -1.0),
        ((1, 1, 1, 1), 0.5, 0.0),
    ],
)
def test_edges(counts, raw, kappa):
    found = Agreement(*counts)
    assert found.raw == raw
    assert found.kappa == kappa


def test_kappa_is_what_shuffled_judgements_would_leave_over():
    """p_e as the mean agreement over every pairing of the first's judgements with the second's."""
    for bits in itertools.product((0, 1), repeat=8):
        first, second = bits[:4], bits[4:]
        pairs = [(a, b) for a in first for b in second]
        chance = sum(a == b for a, b in pairs) / len(pairs)
        found = Agreement.of((bool(a), bool(b)) for a, b in zip(first, second, strict=True))
        if chance == 1:
            assert found.kappa is None
        else:
            assert found.kappa == pytest.approx((found.raw - chance) / (1 - chance))


def test_counts_and_their_names():
    found = Agreement.of([(True, True), (True, False), (True, False), (False, True)])
    assert found.to_json("judge", "em") == {
        "num": 4,
        "raw": 0.25,
        "kappa": pytest.approx((0.25 - 0.5) / 0.5),
        "both": 1,
        "judge_only": 2,
        "em_only": 1,
        "neither": 0,
    }
