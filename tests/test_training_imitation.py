"""A list-wise language model learns to write given orders."""

from __future__ import annotations

import logging
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from loop_runs import changed
from stand_ins import NUM_CANDIDATES, WordPrompts, make_table
from tiny_models import save_tiny_llama

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, DataError, NonFiniteLossError
from rlrag.pipeline import TrainingData
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.imitation import imitate, orders_of_run
from rlrag.training.parts import TrainedParts
from rlrag.training.schedule import BatchSchedule

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
        batch = table.batch(range(len(table)))
        return episodes.log_prob(policy, batch, orders[:, None])[:, 0].numpy()


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
    assert episodes.picks(policy, table).tolist() == orders.tolist()
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


def test_steps_are_those_of_adamw_on_gradients_of_norm_one(model_dir, table):
    """All questions in every batch, so that their order plays no part."""
    found = imitate(open_policy(model_dir), table, 4, NUM_QUESTIONS, 0.01, seed=0)
    policy, losses, norms = open_policy(model_dir), [], []
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    first_two = np.tile([0, 1], (NUM_QUESTIONS, 1, 1))
    for _ in range(4):
        optimizer.zero_grad()
        loss = -episodes.log_prob(policy, table.batch(range(NUM_QUESTIONS)), first_two).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        optimizer.step()
    assert max(norms) > 1.0
    assert found == pytest.approx(losses, rel=1e-4)


def test_each_pass_has_every_question_once_and_draws_its_own_targets(model_dir, table):
    """Batches of four from six questions: three of them are two passes."""
    policy, seen = open_policy(model_dir), []
    log_prob = policy.log_prob

    def recording(trajectories):
        seen.append(trajectories)
        return log_prob(trajectories)

    policy.log_prob = recording
    imitate(policy, table, 3, 4, 1e-3, seed=0, prior_scale=0.1)
    rows, targets = (
        np.concatenate([getattr(found, name) for found in seen]).reshape(12, 8, -1)
        for name in ("question_rows_E", "actions_ET")
    )
    assert sorted(rows[:6, 0, 0]) == sorted(rows[6:, 0, 0]) == list(range(NUM_QUESTIONS))
    for row in range(NUM_QUESTIONS):
        first, second = targets[rows[:, 0, 0] == row]
        assert not np.array_equal(first, second)


def test_drawn_targets_make_the_policy_the_prior_of_the_others(model_dir, table):
    """The first pick's distribution becomes softmax(-scale * rank), and so keeps exploring."""
    policy = open_policy(model_dir)
    losses = imitate(policy, table, 40, NUM_QUESTIONS, 0.01, seed=0, prior_scale=1.0)
    prior = torch.softmax(-torch.arange(float(NUM_CANDIDATES)), dim=0).numpy()
    single = ListwiseLMPolicy(model_dir, 1, 16)
    single.model, single._prompt = policy.model, policy._prompt  # the first of its two picks
    every = np.tile(np.arange(NUM_CANDIDATES)[:, None], (NUM_QUESTIONS, 1, 1))
    batch = table.batch(range(NUM_QUESTIONS))
    found = episodes.log_prob(single, batch, every).detach().exp().numpy()
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
        with pytest.raises(DataError, match="give distinct positions"):
            imitate(policy, table, 1, 2, 1e-3, 0, orders=np.tile(wrong, (NUM_QUESTIONS, 1)))
    with torch.no_grad():
        policy.get_parameter("model.lm_head.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="imitation step 1"):
        imitate(policy, table, 1, 2, 1e-3, 0)


def save_run(path: Path, orders: dict[int, list[int]]) -> Path:
    """A run of these candidates by question, best first, with lines from the last to the first."""
    lines = [
        f"q{q} Q0 p{q}-{n} {rank} {-rank} other"
        for q, order in orders.items()
        for rank, n in enumerate(order, start=1)
    ]
    path.write_text("\n".join(reversed(lines)) + "\n")
    return path


def reversed_run(path: Path, num_questions: int = NUM_QUESTIONS) -> Path:
    order = list(range(NUM_CANDIDATES))[::-1]
    return save_run(path, dict.fromkeys(range(num_questions), order))


def test_a_run_gives_positions_and_the_retriever_the_rest(tmp_path, table):
    """Question 0 whole; of 1 one candidate; of 2 none; the others are missing; 70 is nobody's."""
    run = save_run(tmp_path / "run", {0: [4, 1, 0], 1: [2], 2: [77], 70: [0, 1]})
    found = orders_of_run(run, table, 2)
    assert found.positions_QK.tolist() == [[4, 1], [2, 0], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert (found.num_short, found.num_missing) == (2, 3)
    whole = orders_of_run(run, table, NUM_CANDIDATES)
    assert whole.positions_QK[:2].tolist() == [[4, 1, 0, 2, 3], [2, 0, 1, 3, 4]]
    assert (whole.num_short, whole.num_missing) == (3, 3)
    everything = orders_of_run(reversed_run(tmp_path / "reversed"), table, 2)
    assert everything.positions_QK.tolist() == [[4, 3]] * NUM_QUESTIONS
    assert (everything.num_short, everything.num_missing) == (0, 0)


def test_a_run_of_other_questions_or_passages_is_refused(tmp_path, table):
    with pytest.raises(
        DataError, match=r"its first question is 'q70', but the first of the 6 .* is 'q0'"
    ):
        orders_of_run(save_run(tmp_path / "run", {70: [0]}), table, 2)
    with pytest.raises(DataError, match="it names 'p3-9', where 'p3-0' is wanted"):
        orders_of_run(save_run(tmp_path / "run", {3: [9]}), table, 2)


@pytest.fixture
def config(small_config, model_dir) -> RunConfig:
    return changed(
        small_config,
        environment={"num_selected": 2},
        selector={
            "kind": "listwise_lm",
            "model": str(model_dir),
            "max_tokens": 16,
            "adapter_rank": 8,
            "prior_scale": 200.0,  # the order itself
            "imitation_steps": 15,
        },
    )


def warm(config: RunConfig, table, path: Path) -> TrainedParts:
    config = changed(config, selector={"imitation_run": str(path)})
    schedule = BatchSchedule(config.training, config.dro, len(table), config.seed)
    parts = TrainedParts(
        config, TrainingData(table, None, {}), WordPrompts(), schedule, SingleWorker()
    )
    parts.warm_start()
    return parts


def test_a_run_that_reverses_the_retriever_is_imitated(config, table, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rlrag"):
        parts = warm(config, table, reversed_run(tmp_path / "run"))
    last = [[NUM_CANDIDATES - 1, NUM_CANDIDATES - 2]] * NUM_QUESTIONS
    for policy in (parts.policy, parts.initial):
        assert episodes.picks(policy, table).tolist() == last
    assert not [record for record in caplog.records if "imitation_run" in record.message]


def test_what_a_run_leaves_out_is_said_once(config, table, tmp_path, caplog):
    config = changed(config, selector={"imitation_steps": 1})
    run = save_run(tmp_path / "run", {0: [4, 1], 1: [2], 2: [3]})
    with caplog.at_level(logging.WARNING, "rlrag"):
        warm(config, table, run)
    (record,) = [record for record in caplog.records if "imitation_run" in record.message]
    assert (
        f"{run} has no ranking for 3 of 6 questions and fewer than 2 candidates for 2"
        in record.message
    )


def test_a_run_without_steps_is_refused(config):
    with pytest.raises(ConfigError, match=r"'run.txt', but selector.imitation_steps is 0"):
        changed(config, selector={"imitation_run": "run.txt", "imitation_steps": 0})
