"""The rate rises to its peak and falls towards zero."""

from __future__ import annotations

import pytest

from rlrag.training.learners.optimiser import linear_schedule


@pytest.mark.parametrize(
    ("warmup_steps", "rates"),
    [
        (0, {0: 0.1, 5: 0.05, 9: 0.01, 10: 0.0}),
        (4, {0: 0.025, 1: 0.05, 3: 0.1, 4: 0.1, 7: 0.05, 9: 0.1 / 6}),
        (10, {0: 0.01, 9: 0.1, 10: 0.0}),
        (12, {0: 0.1 / 12, 9: 0.1 * 10 / 12}),
    ],
)
def test_rates_by_hand(warmup_steps, rates):
    found = {step: linear_schedule(step, 10, warmup_steps, peak=0.1) for step in rates}
    assert found == pytest.approx(rates)
