"""Training on a log: what is estimated, what is refused, and that the policy gets better by it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from feedback_runs import even_log, event, library_of, part_of, write_log
from loop_runs import StopAfter, changed
from stand_ins import make_table

from benchmarks.quality.feedback import Enumeration, measure
from rlrag.config import RunConfig
from rlrag.errors import DataError, NonFiniteLossError
from rlrag.files.directories import save_weights
from rlrag.pipeline import open_policy
from rlrag.rewards.answering import PassageReward
from rlrag.runs.directory import RunDirectory
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.feedback.selections import LoggedData, open_logged_data
from rlrag.training.feedback.trainer import MIN_ESS, LoggedTrainer
from rlrag.training.loop import TrainingLoop


@pytest.fixture
def config(small_config) -> RunConfig:
    return changed(
        small_config,
        algorithm={
            "name": "feedback",
            "log": "log.sqlite",
            "num_epochs": 2,
            "held_back_share": 0.25,
        },
        training={"batch_size": 16, "validate_every": 4, "checkpoint_every": 3},
    )


@pytest.fixture
def data(config, tmp_path) -> LoggedData:
    path, table = even_log(tmp_path / "log.sqlite")
    return open_logged_data(config, library_of(table), path)


def start(
    config: RunConfig,
    data: LoggedData,
    directory: Path,
    stop_at: int | None = None,
    min_ess: float = MIN_ESS,
) -> TrainingLoop[LoggedTrainer]:
    run_dir = RunDirectory(directory)
    run_dir.claim(config)

    def on_step(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_at:
            raise StopAfter

    workers = SingleWorker()
    trainer = LoggedTrainer(config, data, workers, min_ess)
    return TrainingLoop(config, trainer, run_dir, workers, on_step)


def records(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.endswith("_s")}
        for line in lines
    ]


@pytest.mark.slow
def test_feedback_improves_the_policy_and_the_estimate_holds_the_truth(small_config, tmp_path):
    """500 events of a service that draws half of its selections; no token is spent."""
    table = make_table(160)
    asked, unseen = part_of(table, slice(100)), part_of(table, slice(100, 160))
    config = changed(
        small_config,
        algorithm={"name": "feedback", "log": "log.sqlite", "num_epochs": 10},
        training={
            "batch_size": 25,
            "learning_rate": 0.005,
            "validate_every": 5,
            "checkpoint_every": 50,
        },
    )
    found = measure(config, library_of(table), asked, unseen, tmp_path, 500, explore_share=0.5)
    assert 300 < found.num_train < 400 < 500 == found.num_train + found.num_held_back
    for place in ("asked", "unseen"):
        before, after = found.before[place], found.after[place]
        assert after.drawn > before.served(0.5) + 0.2
        assert after.drawn > before.drawn + 0.2
        assert after.greedy > before.greedy + 0.3
    for (estimate, ess), truth in (
        (found.held_back_start, found.before["held_back"]),
        (found.held_back, found.after["held_back"]),
        (found.second_log, found.after["unseen"]),
    ):
        assert estimate.low <= truth.drawn <= estimate.high
        assert ess > 10
    assert found.held_back[0].low > found.held_back_start[0].high
    metrics = records(tmp_path / "run")
    assert all(record["generator_tokens_total"] == 0 for record in metrics)
    assert all(1 <= record["ess"] <= 25 for record in metrics[1:])
    best = next(record for record in metrics if record["step"] == found.best_step)
    estimate, ess = found.held_back
    assert (best["validation/value"], best["validation/ess"]) == pytest.approx(
        (estimate.value, ess)
    )


def test_the_first_estimate_is_by_hand(config, data, tmp_path):
    """The untrained policy's probabilities fall with the rank; the log was drawn evenly."""
    loop = start(config, data, tmp_path / "run", stop_at=0)
    with pytest.raises(StopAfter):
        loop.run()
    [found] = records(tmp_path / "run")
    part = data.held_back
    assert part is not None
    rank_N = np.exp(-config.selector.prior_scale * np.arange(5))
    ratio_Q = 5 * (rank_N / rank_N.sum())[part.actions_QT[:, 0]]
    assert found["validation/value"] == pytest.approx(
        (ratio_Q * part.rewards_Q).sum() / ratio_Q.sum(), rel=1e-5
    )
    assert found["validation/ess"] == pytest.approx(
        ratio_Q.sum() ** 2 / (ratio_Q**2).sum(), rel=1e-5
    )
    assert found["validation/mean_ratio"] == pytest.approx(1.0, rel=1e-5)
    first = part.actions_QT[:, 0] == 0
    assert found["validation/greedy_value"] == pytest.approx(part.rewards_Q[first].mean())
    assert found["validation/greedy_ess"] == pytest.approx(first.sum())
    assert found["validation/score"] == found["validation/value_low"]


def test_the_first_step_is_by_hand(config, data, tmp_path):
    """Every ratio of the even log is that of the policy; the baseline is the mean reward."""
    trainer = LoggedTrainer(config, data, SingleWorker())
    before = open_policy(config, data.train.candidates)
    rows = np.arange(len(data.train))[trainer._schedule.rows(0)]
    batch, positions = data.train.candidates.batch(rows), data.train.actions_QT[rows][:, None]
    ratios = 5 * episodes.log_prob(before, batch, positions)[:, 0].exp()
    rewards = torch.from_numpy(data.train.rewards_Q)
    loss = -(ratios * (rewards[rows] - rewards.mean())).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in before.parameters() if p.grad is not None]).norm()
    found = trainer.step(0, pauses_after=False)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert found["ess"] == pytest.approx((ratios.sum() ** 2 / ratios.square().sum()).item())
    assert found["mean_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert found["capped_share"] == 0.0
    assert found["generator_tokens_spent"] == found["generator_tokens_saved"] == 0.0


def test_a_stopped_run_continues_to_the_same_weights(config, data, tmp_path):
    whole = start(config, data, tmp_path / "whole")
    expected = whole.run().policy.state_dict()
    with pytest.raises(StopAfter):
        start(config, data, tmp_path / "stopped", stop_at=7).run()
    again = start(config, data, tmp_path / "stopped")
    found = again.run().policy.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")
    assert whole.progress == again.progress


@pytest.mark.parametrize("stops", [False, True])
def test_the_most_probable_episodes_may_be_longer_or_shorter_than_the_logged_ones(
    config, tmp_path, stops
):
    """The log has (0, stop), and (stop,) for each third question; three may be picked."""
    table, stop = make_table(24), 5
    config = changed(
        config,
        environment={"num_selected": 3},
        selector={"may_stop": True},
    )
    logged = [event(table, n % 24, n, actions=(0, stop) if n % 3 else (stop,)) for n in range(240)]
    log = write_log(tmp_path / "log.sqlite", logged)
    found = open_logged_data(config, library_of(table), log)
    trainer = LoggedTrainer(config, found, SingleWorker(), min_ess=2)
    with torch.no_grad():
        trainer.policy.stop_logits_K.fill_(100.0 if stops else -100.0)
    part = found.held_back
    assert part is not None
    num_stopped = int((part.actions_QT[:, 0] == stop).sum())
    assert 0 < num_stopped < len(part)
    metrics = trainer.validate(0)
    assert metrics["validation/greedy_ess"] == pytest.approx(num_stopped if stops else 0)


class HalfOfTwo:
    """One of two workers that see the same: its sums are twice its own."""

    rank, size = 0, 2

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor

    def barrier(self) -> None:
        """The other one is always there."""


def test_workers_share_a_batch_and_the_held_back_selections(config, data, monkeypatch):
    """Each takes every second one; what they have in common is summed."""
    alone, half = (LoggedTrainer(config, data, w) for w in (SingleWorker(), HalfOfTwo()))
    part = data.held_back
    assert part is not None
    whole, mine = alone._log_probs(part), half._log_probs(part)
    monkeypatch.setattr("rlrag.training.feedback.trainer._CHUNK", 7)
    assert torch.allclose(alone._log_probs(part), whole)
    assert torch.allclose(mine[::2], 2 * whole[::2])
    assert torch.equal(mine[1::2], torch.zeros_like(mine[1::2]))
    found = half.step(0, pauses_after=False)
    rows = half._schedule.rows(0)[::2]
    again = LoggedTrainer(config, data, SingleWorker())
    ratios = (
        5
        * episodes.log_prob(
            again.policy,
            data.train.candidates.batch(rows),
            data.train.actions_QT[rows][:, None],
        ).exp()
    )
    assert found["mean_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-5)


def test_without_held_back_questions_the_last_weights_are_kept(config, tmp_path):
    path, table = even_log(tmp_path / "log.sqlite", times=5)
    everything = changed(config, algorithm={"held_back_share": 0.0})
    loop = start(
        everything, open_logged_data(everything, library_of(table), path), tmp_path / "run"
    )
    loop.run()
    assert loop.progress.best_step == loop.trainer.num_steps == 15
    assert not [name for record in records(tmp_path / "run") for name in record if "valid" in name]


def test_rewards_below_minus_one_choose_the_best_checkpoint_too(config, tmp_path):
    """As log-likelihoods are."""
    path, table = even_log(tmp_path / "log.sqlite")
    found = open_logged_data(config, library_of(table), path)
    for part in (found.train, found.held_back):
        assert part is not None
        part.rewards_Q[:] = 4 * part.rewards_Q - 9
    loop = start(config, found, tmp_path / "run")
    loop.run()
    assert loop.progress.best_step > 0
    assert loop.progress.best_score is not None
    assert -9 < loop.progress.best_score < -5


def test_a_log_that_says_too_little_about_the_start_is_refused(config, data, tmp_path):
    with pytest.raises(DataError, match=r"is 4\d\.\d on 60 held-out selections, below 59"):
        start(config, data, tmp_path / "run", min_ess=59).run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_policy_that_leaves_the_log_is_warned_of_once_and_not_chosen(
    config, data, tmp_path, caplog
):
    wild = changed(config, algorithm={"num_epochs": 6}, training={"learning_rate": 0.1})
    with caplog.at_level(logging.WARNING):
        loop = start(wild, data, tmp_path / "run", min_ess=40)
        loop.run()
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "effective sample size" in text]) == 1
    found = [record for record in records(tmp_path / "run") if "validation/ess" in record]
    left = [record for record in found if record["validation/ess"] < 40]
    assert left
    assert all(record["validation/score"] == -math.inf for record in left)
    assert loop.progress.best_step not in [record["step"] for record in left]


def test_training_starts_from_the_policy_that_was_served(config, data, tmp_path):
    served = open_policy(config, data.train.candidates)
    with torch.no_grad():
        for parameter in served.parameters():
            parameter.add_(0.25)
    save_weights(served, tmp_path / "selector.safetensors")
    config = changed(config, selector={"weights": str(tmp_path / "selector.safetensors")})
    found = LoggedTrainer(config, data, SingleWorker()).policy.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in served.state_dict().items())


def test_equal_rewards_teach_nothing(config, tmp_path):
    table = make_table(24)
    log = write_log(tmp_path / "log.sqlite", [event(table, n % 24, n) for n in range(120)])
    loop = start(config, open_logged_data(config, library_of(table), log), tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in loop.trainer.policy.state_dict().items()}
    after = loop.run().policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loop.progress.best_step == 0
    records_of_steps = records(tmp_path / "run")[1:]
    assert records_of_steps
    assert all(record["grad_norm"] == 0 for record in records_of_steps)


def test_a_gradient_that_is_not_finite_ends_the_run(config, data, tmp_path):
    loop = start(config, data, tmp_path / "run")
    with torch.no_grad():
        loop.trainer.policy.scorer.hidden.weight.fill_(math.inf)
    with pytest.raises((NonFiniteLossError, DataError)):
        loop.run()


def test_the_truth_of_a_policy_is_its_mean_reward_by_simulation(config):
    """The benchmark's enumeration against draws of the policy."""
    table, reward = make_table(6), PassageReward()
    policy = open_policy(config, table)
    exact = Enumeration(table, reward, 1).values(policy)
    seeds = [[9, q] for q in range(6)]
    drawn = episodes.sample(policy, table.batch(range(6)), 4000, seeds).positions_BMK
    worth = [
        [result.total for result in reward([q] * 5, [[p] for p in table.passages(row)])]
        for row, q in enumerate(table.questions)
    ]
    worth_QN = np.array(worth)
    mean = np.mean([worth_QN[q][drawn[q, :, 0]].mean() for q in range(6)])
    assert exact.drawn == pytest.approx(mean, abs=0.02)
    greedy = episodes.greedy(policy, table.batch(range(6)))[:, 0]
    assert exact.greedy == pytest.approx(worth_QN[np.arange(6), greedy].mean())
    assert exact.served(0.25) == pytest.approx(0.25 * exact.drawn + 0.75 * exact.greedy)
