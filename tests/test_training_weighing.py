"""Weights of a batch and the numbers that describe it, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from two_candidates import LIKELIER_FIRST, drawn

from rlrag.config import DROConfig, TrainingConfig
from rlrag.errors import GenerationError, RewardError
from rlrag.testing.thread_workers import ThreadWorker, make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.batch import RewardedBatch, describe_batch, importance_weights

NAN = float("nan")
FAILED = (RewardError("reward f for question 'q0': it raised"),)


def described(
    experience: RewardedBatch,
    workers: SingleWorker | ThreadWorker | None = None,
    dro: DROConfig | None = None,
    **more,
) -> dict[str, float]:
    config = TrainingConfig(**{"batch_size": len(experience.question_rows)} | more)
    weights_BM = importance_weights(experience, dro or DROConfig())
    return describe_batch(experience, weights_BM, config, workers or SingleWorker())


def test_weights_are_the_normalised_likelihoods_in_double_precision():
    weights_BM = importance_weights(drawn(LIKELIER_FIRST), DROConfig())
    assert weights_BM.dtype == torch.float64
    assert weights_BM.tolist() == [pytest.approx([0.75, 0.25], rel=1e-12)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "raw", "baseline": "none"}, [0.15, 0.05]),
        ({"reward_temperature": 2.0}, [3**0.5 / (3**0.5 + 1), 1 / (3**0.5 + 1)]),
    ],
)
def test_the_configuration_says_which_weights(settings, expected):
    weights_BM = importance_weights(drawn(LIKELIER_FIRST), DROConfig(**settings))
    assert weights_BM[0].tolist() == pytest.approx(expected)


def test_sample_weights_correct_for_the_proposal():
    experience = drawn(LIKELIER_FIRST, log_weights=[[math.log(0.1), math.log(0.9)]])
    assert importance_weights(experience, DROConfig())[0].tolist() == pytest.approx([0.25, 0.75])


def test_metrics_are_means_over_the_questions():
    """Weights (3/4, 1/4) of two candidates, and (1/2, 1/2) of one that was drawn twice."""
    metrics = described(drawn([*LIKELIER_FIRST, [-2.0, -2.0]], [[0, 1], [1, 1]]))
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    reward = (math.log(0.3) + math.log(0.1) - 4) / 4
    assert metrics == pytest.approx(
        {
            "ess": (1 / (0.75**2 + 0.25**2) + 2) / 2,
            "weight_entropy": (entropy + math.log(2)) / 2,
            "log_weight_variance": (math.log(3) ** 2 / 2) / 2,
            "zero_signal_share": 0.5,
            "duplicate_share": 0.25,
            "reward": reward,
            "reward/answer_logp": reward,
            "num_rollouts": 4.0,
            "num_failed": 0.0,
        }
    )


def test_a_failed_reward_is_left_out_and_counted():
    """The valid samples 0, 1 of three give what two samples give."""
    found = described(drawn([[*LIKELIER_FIRST[0], NAN]], [[0, 1, 1]], FAILED), max_failed_share=0.4)
    two = described(drawn(LIKELIER_FIRST))
    assert (found["num_failed"], found["num_rollouts"]) == (1.0, 3.0)
    assert found["failures"] == [str(FAILED[0])]
    for name in ("reward", "reward/answer_logp", "ess", "weight_entropy", "zero_signal_share"):
        assert found[name] == pytest.approx(two[name]), name
    assert found["duplicate_share"] == pytest.approx(1 / 3)


def terms_of(metrics: dict[str, float]) -> list[str]:
    return [name for name in metrics if name.startswith("reward/")]


def test_a_term_has_its_mean_over_the_selections_that_have_it():
    terms = {"b": np.array([[1.0, 0.0]]), "a": np.array([[3.0, NAN]]), "c": np.array([[NAN, NAN]])}
    metrics = described(with_terms(drawn(LIKELIER_FIRST), terms))
    assert (metrics["reward/b"], metrics["reward/a"]) == (0.5, 3.0)
    assert not {"reward/answer_logp", "reward/c"} & metrics.keys()
    assert terms_of(metrics) == ["reward/a", "reward/b"]


@pytest.mark.parametrize(("share", "ends"), [(0.5, False), (0.49, True), (0.0, True)])
def test_too_many_failed_rewards_end_the_run(share, ends):
    experience = drawn([[-1.0, NAN]], errors=FAILED)
    if not ends:
        assert described(experience, max_failed_share=share)["num_failed"] == 1.0
        return
    with pytest.raises(GenerationError) as caught:
        described(experience, max_failed_share=share)
    assert "1 of 2 rewards of a batch" in str(caught.value)
    assert f"max_failed_share {share}" in str(caught.value)
    assert "the first: reward f for question 'q0': it raised" in str(caught.value)


def test_a_question_without_any_reward_has_no_weight():
    experience = drawn([[NAN, NAN], *LIKELIER_FIRST], errors=FAILED * 2)
    assert importance_weights(experience, DROConfig())[0].tolist() == [0.0, 0.0]
    metrics = described(experience, max_failed_share=0.5)
    assert metrics["ess"] == pytest.approx((0 + 1.6) / 2)
    assert metrics["failures"] == [str(FAILED[0])], "each reason once"
    assert metrics["reward"] == pytest.approx((math.log(0.3) + math.log(0.1)) / 2)


REWARDS = [[-1.0, -3.0], [-0.5, NAN], [-2.0, -2.0], [-4.0, -0.1]]


def part(rows: slice) -> RewardedBatch:
    whole = drawn(REWARDS, [[0, 1], [1, 1], [0, 1], [1, 0]], FAILED)
    mine_E = whole.by_question(np.arange(len(whole.trajectories)))[rows].ravel()
    return replace(whole, trajectories=whole.trajectories.of(mine_E))


def with_terms(experience: RewardedBatch, terms_BM: dict[str, np.ndarray]) -> RewardedBatch:
    terms = {name: values.ravel() for name, values in terms_BM.items()}
    return replace(experience, trajectories=replace(experience.trajectories, terms=terms))


def together(parts: Sequence[RewardedBatch], **settings) -> list[dict[str, float]]:
    """What each worker of a group says of the batch that they share."""
    group = make_group(len(parts))
    tasks = [partial(described, own, at, **settings) for own, at in zip(parts, group, strict=True)]
    return run_together(tasks)


def test_two_workers_with_halves_describe_the_whole():
    settings = {"batch_size": 4, "max_failed_share": 0.2}
    halves = [part(slice(0, 4, 2)), part(slice(1, 4, 2))]
    first, second = together(halves, **settings)
    whole = described(part(slice(None)), **settings)
    assert whole.pop("failures") == second.pop("failures") == [str(FAILED[0])]
    assert first == second == pytest.approx(whole)
    assert (first["num_rollouts"], first["num_failed"]) == (8.0, 1.0)


def test_a_worker_without_failures_ends_with_the_others_too():
    halves = [part(slice(0, 4, 2)), part(slice(1, 4, 2))]
    with pytest.raises(GenerationError, match=r"1 of 8 rewards.*see the other workers' logs"):
        together(halves, batch_size=4)


def test_workers_may_have_met_other_terms():
    """Of a custom reward that says more of some selections than of others."""
    mine, theirs = part(slice(0, 2)), part(slice(2, 4))
    mine = with_terms(mine, {"long": np.array([[1.0, NAN], [NAN, 3.0]])})
    theirs = with_terms(theirs, {"a": np.full((2, 2), 5.0), "näher": np.full((2, 2), 7.0)})
    for found in together([mine, theirs], batch_size=4, max_failed_share=0.5):
        terms = {name: value for name, value in found.items() if name.startswith("reward/")}
        assert terms == {"reward/a": 5.0, "reward/long": 2.0, "reward/näher": 7.0}
    nothing = with_terms(mine, {})
    for found in together([nothing, theirs], batch_size=4, max_failed_share=0.5):
        assert found["reward/a"] == 5.0


def test_workers_put_terms_in_the_same_order():
    """Each adds up its own terms place by place, so that the places must mean the same."""
    mine, theirs = part(slice(0, 2)), part(slice(2, 4))
    letters = "qwertzuiopasdfghjkl"
    mine = with_terms(mine, {name: np.ones((2, 2)) for name in letters})
    theirs = with_terms(theirs, {name: np.ones((2, 2)) for name in letters[::-1]})
    for found in together([mine, theirs], batch_size=4, max_failed_share=0.5):
        assert terms_of(found) == [f"reward/{name}" for name in sorted(letters)]
