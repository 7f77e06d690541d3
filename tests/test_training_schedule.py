"""Every question once a pass, in an order that the seed and the step alone decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.config import TrainingConfig
from rlrag.training.schedule import BatchSchedule


def schedule(batch_size: int, num_epochs: int, num_questions: int, seed: int = 0) -> BatchSchedule:
    config = TrainingConfig(batch_size=batch_size, num_epochs=num_epochs)
    return BatchSchedule(config, num_questions, seed)


@pytest.mark.parametrize(
    ("batch_size", "num_epochs", "num_questions", "num_steps"),
    [(8, 4, 24, 12), (32, 6, 1635, 306), (5, 1, 12, 2), (5, 2, 12, 4), (7, 1, 7, 1), (8, 1, 3, 1)],
)
def test_the_number_of_steps(batch_size, num_epochs, num_questions, num_steps):
    assert schedule(batch_size, num_epochs, num_questions).num_steps == num_steps


@settings(deadline=None, max_examples=50)
@given(
    batch_size=st.integers(1, 12),
    num_questions=st.integers(1, 30),
    num_passes=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_every_pass_has_every_question_once(batch_size, num_questions, num_passes, seed):
    batches = schedule(batch_size, 1, num_questions, seed)
    num_steps = -(-num_passes * num_questions // batch_size)
    rows = [batches.rows(step) for step in range(num_steps)]
    assert {row.shape for row in rows} == {(batch_size,)}
    assert rows[0].dtype == np.int64
    stream = np.concatenate(rows)
    for number in range(num_passes):
        one_pass = stream[number * num_questions : (number + 1) * num_questions]
        assert sorted(one_pass) == list(range(num_questions))


def test_rows_depend_on_the_seed_and_the_step_alone():
    first, second = schedule(8, 4, 24), schedule(8, 4, 24)
    forwards = [first.rows(step).tolist() for step in range(12)]
    backwards = [second.rows(step).tolist() for step in reversed(range(12))][::-1]
    assert forwards == backwards
    np.random.default_rng(0).random(100)
    assert first.rows(5).tolist() == forwards[5]
    longer = schedule(8, 9, 24)
    assert [longer.rows(step).tolist() for step in range(12)] == forwards
    other = schedule(8, 4, 24, seed=1)
    assert [other.rows(step).tolist() for step in range(12)] != forwards


def test_passes_have_different_orders():
    batches = schedule(24, 3, 24)
    orders = {tuple(batches.rows(step)) for step in range(3)}
    assert len(orders) == 3
    assert tuple(range(24)) not in orders


def test_a_batch_may_span_passes():
    batches = schedule(4, 3, 6)
    stream = np.concatenate([batches.rows(step) for step in range(3)])
    assert sorted(stream[:6]) == sorted(stream[6:]) == list(range(6))


def test_epochs_count_finished_passes():
    batches = schedule(8, 4, 24)
    assert [batches.epoch(step) for step in (0, 3, 12)] == [0.0, 1.0, 4.0]
    assert batches.epoch(1) == pytest.approx(1 / 3)


def test_no_two_draws_share_a_seed_nor_one_with_the_orders():
    seeds = {
        tuple(schedule(8, 4, 24, seed).sampling_seed(step, place))
        for seed in range(3)
        for step in range(12)
        for place in range(8)
    }
    assert len(seeds) == 3 * 12 * 8
    first = {float(np.random.default_rng(seed).random()) for seed in seeds}
    orders = {float(np.random.default_rng([s, 0, p]).random()) for s in range(3) for p in range(4)}
    assert len(first) == len(seeds)
    assert not first & orders
