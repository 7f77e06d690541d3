"""Every question once an epoch, in an order that the seed and the step alone decide; E-steps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.config import DROConfig, TrainingConfig
from rlrag.training.schedule import BatchSchedule


def schedule(
    batch_size: int, num_epochs: int, num_questions: int, seed: int = 0, **dro
) -> BatchSchedule:
    config = TrainingConfig(batch_size=batch_size, num_epochs=num_epochs)
    return BatchSchedule(config, DROConfig(baseline="none", **dro), num_questions, seed)


def draws(batches: BatchSchedule, step: int, batch_size: int) -> tuple[tuple[int, ...], ...]:
    """What decides the samples of a step: the row and the seed of each place."""
    rows = batches.rows(step)
    return tuple((int(rows[p]), *batches.sampling_seed(step, p)) for p in range(batch_size))


@pytest.mark.parametrize(
    ("batch_size", "num_epochs", "num_questions", "num_steps"),
    [(8, 4, 24, 12), (32, 6, 1635, 306), (5, 1, 12, 2), (5, 2, 12, 4), (7, 1, 7, 1), (8, 1, 3, 1)],
)
def test_the_number_of_steps(batch_size, num_epochs, num_questions, num_steps):
    assert schedule(batch_size, num_epochs, num_questions).num_steps == num_steps
    assert schedule(batch_size, num_epochs, num_questions, passes=3).num_steps == 3 * num_steps


@settings(max_examples=50)
@given(
    batch_size=st.integers(1, 12),
    num_questions=st.integers(1, 30),
    num_epochs=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_has_every_question_once(batch_size, num_questions, num_epochs, seed):
    batches = schedule(batch_size, num_epochs, num_questions, seed)
    rows = [batches.rows(step) for step in range(batches.num_steps)]
    assert {row.shape for row in rows} == {(batch_size,)}
    assert rows[0].dtype == np.int64
    stream = np.concatenate(rows)
    for number in range(len(stream) // num_questions):
        one_epoch = stream[number * num_questions : (number + 1) * num_questions]
        assert sorted(one_epoch) == list(range(num_questions))
    assert num_epochs * num_questions - len(stream) < batch_size


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


def test_epochs_have_different_orders():
    batches = schedule(24, 3, 24)
    orders = {tuple(batches.rows(step)) for step in range(3)}
    assert len(orders) == 3
    assert tuple(range(24)) not in orders


def test_a_batch_may_span_epochs():
    batches = schedule(4, 3, 6)
    stream = np.concatenate([batches.rows(step) for step in range(3)])
    assert sorted(stream[:6]) == sorted(stream[6:]) == list(range(6))


def test_epochs_count_what_was_seen():
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


def test_one_batch_an_estep_and_one_pass_renews_before_every_step():
    """On-policy training: the number of the E-step is that of the step."""
    batches = schedule(8, 4, 24, refresh_every=1, passes=1)
    assert all(batches.starts_estep(step) for step in range(12))
    assert [batches.estep(step) for step in range(13)] == list(range(13))
    assert [batches.sampling_seed(step, 3) for step in (0, 11)] == [[0, 1, 0, 3], [0, 1, 11, 3]]


@pytest.mark.parametrize(
    ("refresh_every", "passes", "esteps"),
    [
        (1, 1, [0, 1, 2, 3, 4, 5, 6]),
        (1, 2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]),
        (3, 1, [0, 0, 0, 1, 1, 1, 2]),
        (3, 2, [0] * 6 + [1] * 6 + [2] * 2),
        (None, 1, [0, 0, 0, 1, 1, 1, 2]),
        (None, 2, [0] * 6 + [1] * 6 + [2] * 2),
        (99, 1, [0] * 7),
    ],
)
def test_steps_belong_to_esteps(refresh_every, passes, esteps):
    """Two epochs of 7 questions in batches of 2: 7 batches, 3 a pass, and the last E-step short."""
    batches = schedule(2, 2, 7, refresh_every=refresh_every, passes=passes)
    assert [batches.estep(step) for step in range(batches.num_steps)] == esteps
    starts = [step for step in range(batches.num_steps) if batches.starts_estep(step)]
    assert starts == [esteps.index(number) for number in sorted(set(esteps))]
    assert batches.estep(batches.num_steps) == esteps[-1] + 1


@settings(max_examples=60)
@given(
    batch_size=st.integers(1, 5),
    num_questions=st.integers(1, 20),
    num_epochs=st.integers(1, 3),
    refresh_every=st.none() | st.integers(1, 9),
    passes=st.integers(1, 3),
)
def test_each_batch_of_an_estep_comes_in_every_pass_with_the_same_draws(
    batch_size, num_questions, num_epochs, refresh_every, passes
):
    """Epochs count each batch when it is first seen."""
    once = schedule(batch_size, num_epochs, num_questions)
    batches = schedule(
        batch_size, num_epochs, num_questions, refresh_every=refresh_every, passes=passes
    )
    plain = [draws(once, step, batch_size) for step in range(once.num_steps)]
    by_estep: dict[int, list] = {}
    for step in range(batches.num_steps):
        by_estep.setdefault(batches.estep(step), []).append(draws(batches, step, batch_size))
    seen = []
    for number in range(len(by_estep)):
        found = by_estep[number]
        one_pass = found[: len(found) // passes]
        assert found == one_pass * passes
        seen += one_pass
    assert seen == plain
    assert set(Counter(x for found in by_estep.values() for x in found).values()) == {passes}
    steps = [draws(batches, step, batch_size) for step in range(batches.num_steps)]
    for step in range(batches.num_steps + 1):
        num_seen = len(set(steps[:step])) * batch_size
        assert batches.epoch(step) == pytest.approx(num_seen / num_questions), step


def test_a_second_pass_sees_nothing_new():
    """Two batches of half the questions an E-step, gone through twice: an epoch an E-step."""
    batches = schedule(2, 3, 4, refresh_every=2, passes=2)
    assert batches.num_steps == 12
    found = [batches.epoch(step) for step in range(13)]
    assert found == [0, 0.5, 1, 1, 1, 1.5, 2, 2, 2, 2.5, 3, 3, 3]


def test_a_short_last_estep_counts_only_its_own_batches():
    batches = schedule(2, 3, 2, refresh_every=2, passes=2)  # batches 0 1 | 0 1 | 2 | 2
    assert batches.num_steps == 6
    assert [batches.epoch(step) for step in range(7)] == [0, 1, 2, 2, 2, 3, 3]
    assert [batches.estep(step) for step in range(7)] == [0, 0, 0, 0, 1, 1, 2]
    assert batches.sampling_seed(4, 0) == batches.sampling_seed(5, 0) == [0, 1, 2, 0]
