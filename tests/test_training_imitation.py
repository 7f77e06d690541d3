"""A list-wise language model learns to write given orders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import NUM_CANDIDATES, make_table
from tiny_models import save_tiny_llama

from rlrag.errors import DataError, NonFiniteLossError
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.training.imitation import imitate

NUM_QUESTIONS = 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("imitation") / "tiny")


@pytest.fixture(scope="module")
def table():
    return make_table(NUM_QUESTIONS)


def open_policy(model_dir: Path, adapter_rank: int | None = None):
    torch.manual_seed(0)
    return ListwiseLMPolicy(model_dir, 2, 16, adapter_rank)


def target_logp(policy, table, orders: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return policy.log_prob(table.batch(range(len(table))), orders[:, None])[:, 0].numpy()


@pytest.mark.parametrize("adapter_rank", [None, 8])
def test_the_greedy_order_becomes_the_retrievers(model_dir, table, adapter_rank):
    policy = open_policy(model_dir, adapter_rank)
    orders = np.tile([0, 1], (NUM_QUESTIONS, 1))
    before = target_logp(policy, table, orders)
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    assert bool(frozen) == (adapter_rank is not None)
    losses = imitate(policy, table, 15, 4, 0.02, seed=0)
    assert len(losses) == 15
    assert losses[-1] < 0.1 < losses[0]
    assert (target_logp(policy, table, orders) > before).all()
    assert policy.greedy(table.batch(range(NUM_QUESTIONS))).tolist() == orders.tolist()
    assert all(torch.equal(p, policy.get_parameter(n)) for n, p in frozen.items())


def test_given_orders_are_learned_question_by_question(model_dir, table):
    """Orders that differ among questions: the policy must read which question it is."""
    policy = open_policy(model_dir)
    rng = np.random.default_rng(1)
    orders = np.array([rng.permutation(NUM_CANDIDATES)[:2] for _ in range(NUM_QUESTIONS)])
    before = target_logp(policy, table, orders)
    imitate(policy, table, 25, NUM_QUESTIONS, 0.01, seed=0, orders=orders)
    assert target_logp(policy, table, orders).mean() > before.mean() + 1.0


def test_the_first_loss_is_the_mean_over_the_batch(model_dir):
    """Eleven questions are read in two passes; a batch larger than the table is the table."""
    table = make_table(11)
    expected = -target_logp(open_policy(model_dir), table, np.tile([0, 1], (11, 1))).mean()
    losses = imitate(open_policy(model_dir), table, 1, 50, 1e-3, seed=0)
    assert losses == pytest.approx([expected], abs=1e-5)


def test_drawn_targets_make_the_policy_the_prior_of_the_others(model_dir, table):
    """The first pick's distribution becomes softmax(-scale * rank), and so keeps exploring."""
    policy = open_policy(model_dir)
    losses = imitate(policy, table, 40, NUM_QUESTIONS, 0.01, seed=0, prior_scale=1.0)
    prior = torch.softmax(-torch.arange(float(NUM_CANDIDATES)), dim=0).numpy()
    found = policy.first_pick_probabilities(table.batch(range(NUM_QUESTIONS)))
    assert np.abs(found.mean(axis=0) - prior).max() < 0.1
    # The losses end near the entropy of both picks, which is more than that of the first.
    assert np.mean(losses[-10:]) > -(prior * np.log(prior)).sum()


def test_drawn_targets_follow_given_orders(model_dir, table):
    """A scale so large that the order is certain gives the loss of the order itself."""
    orders = np.tile([3, 1], (NUM_QUESTIONS, 1))
    plain, drawn = (
        imitate(open_policy(model_dir), table, 2, 3, 1e-3, 0, orders=orders, prior_scale=scale)
        for scale in (None, 200.0)
    )
    assert plain == pytest.approx(drawn, abs=1e-5)


def test_a_seed_repeats_and_two_differ(model_dir, table):
    runs = [imitate(open_policy(model_dir), table, 3, 2, 1e-3, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert imitate(open_policy(model_dir), table, 0, 2, 1e-3, seed=0) == []


def test_what_cannot_work_is_refused(model_dir, table):
    policy = open_policy(model_dir)
    with pytest.raises(DataError, match="shape"):
        imitate(policy, table, 1, 2, 1e-3, 0, orders=np.zeros((NUM_QUESTIONS, 3), dtype=int))
    for wrong in ([1, 1], [0, NUM_CANDIDATES], [-1, 0]):
        with pytest.raises(DataError, match="give different positions"):
            imitate(policy, table, 1, 2, 1e-3, 0, orders=np.tile(wrong, (NUM_QUESTIONS, 1)))
    with torch.no_grad():
        policy.get_parameter("model.lm_head.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="imitation step 1"):
        imitate(policy, table, 1, 2, 1e-3, 0)
