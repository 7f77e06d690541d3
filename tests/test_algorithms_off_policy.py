"""Off-policy estimates against enumeration, and their intervals against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from enumerable_case import PERMUTATIONS, EnumerableCase
from scipy import stats

from rlrag.algorithms.off_policy import (
    capped_ratios,
    effective_sample_size,
    importance_ratios,
    ips,
    off_policy_losses,
    snips,
)
from rlrag.selection.plackett_luce import log_prob

INF = math.inf


class Case:
    """Twelve selections; the target and the logging policy are both Plackett-Luce."""

    def __init__(self) -> None:
        target, logging = EnumerableCase(seed=1), EnumerableCase(seed=2)
        self.target_logits, self.reward_Z = target.logits, target.likelihood_Z
        self.target_Z = target.probability_Z
        # Exploration of a greedy service: some of its draws, else its best.
        share = 0.4
        best = int(logging.probability_Z.argmax())
        self.behaviour_Z = share * logging.probability_Z
        self.behaviour_Z[best] += 1 - share
        self.value = float((self.target_Z * self.reward_Z).sum())

    def draw(self, num: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(self.behaviour_Z, num, True, generator=generator)

    def ratios(self, drawn: torch.Tensor) -> torch.Tensor:
        return importance_ratios(self.target_Z.log()[drawn], self.behaviour_Z.log()[drawn])


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_the_mean_of_ips_over_all_logs_is_the_value_of_the_target(case):
    """All logs of one and of two selections, each by its probability."""
    for size in (1, 2):
        expected = 0.0
        for log in itertools.product(range(len(PERMUTATIONS)), repeat=size):
            drawn = torch.tensor(log)
            probability = case.behaviour_Z[drawn].prod().item()
            expected += probability * ips(case.ratios(drawn), case.reward_Z[drawn]).value
        assert expected == pytest.approx(case.value, rel=1e-12)


def test_snips_comes_close_with_many_selections_and_is_nearer_than_ips(case):
    errors = {ips: [], snips: []}
    for seed in range(200):
        drawn = case.draw(100, seed)
        for estimator, found in errors.items():
            # A constant that is added to all rewards leaves the error of SNIPS alone.
            value = estimator(case.ratios(drawn), case.reward_Z[drawn] + 2).value
            found.append(value - 2 - case.value)
    assert np.std(errors[snips]) < 0.5 * np.std(errors[ips])
    drawn = case.draw(200_000, 1)
    assert snips(case.ratios(drawn), case.reward_Z[drawn]).value == pytest.approx(
        case.value, abs=0.01
    )


@pytest.mark.parametrize("estimator", [ips, snips])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_hold_the_value_as_often_as_they_say(case, estimator, confidence):
    held = 0
    for seed in range(1000):
        drawn = case.draw(2000, seed)
        found = estimator(case.ratios(drawn), case.reward_Z[drawn], confidence)
        held += found.low <= case.value <= found.high
    # Two standard errors of the share itself are 0.025 and 0.014.
    assert held / 1000 == pytest.approx(confidence, abs=0.03)


def test_values_by_hand():
    ratios, rewards = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    found = ips(ratios, rewards)
    # Terms 2, 0, 0: mean 2/3, standard deviation 2/sqrt(3), error 2/3.
    assert found.value == pytest.approx(2 / 3)
    assert found.high - found.value == pytest.approx(1.959964 * 2 / 3, rel=1e-6)
    found = snips(ratios, rewards)
    # Without the first 0, without the second 1, without the third 2/3: differences 2/3 and 1/3.
    # The effective sample size is 9/5, so that Student's t has 1 degree of freedom: tan(0.475 pi).
    assert found.value == pytest.approx(2 / 3)
    margin = math.tan(0.475 * math.pi) * math.sqrt(5 / 9)
    assert found.value - found.low == pytest.approx(margin, rel=1e-6)
    assert found.high - found.value == pytest.approx(margin, rel=1e-6)
    assert effective_sample_size(ratios) == pytest.approx(9 / 5)


def test_the_error_is_that_of_leaving_one_out(case):
    drawn = case.draw(300, 3)
    ratios, rewards = case.ratios(drawn), case.reward_Z[drawn]
    found = snips(ratios, rewards, confidence=0.9)
    others = [torch.arange(300) != i for i in range(300)]
    left = [snips(ratios[kept], rewards[kept]).value - found.value for kept in others]
    quantile = stats.t.ppf(0.95, effective_sample_size(ratios) - 1)
    assert found.high - found.value == pytest.approx(quantile * np.linalg.norm(left), rel=1e-9)


def test_a_selection_that_dominates_widens_the_interval():
    """It nearly decides the value, which the delta method would take for certainty."""
    rewards = torch.tensor([1.0] + [0.0, 0.5] * 10)
    width = []
    for ratio in (1.0, 100.0, 1e6):
        found = snips(torch.tensor([ratio] + [1.0] * 20), rewards)
        width.append(found.high - found.low)
    assert width[0] < 0.4 < 5 < width[1] < width[2]


def test_the_same_policy_gives_the_mean_reward(case):
    drawn = case.draw(50, 0)
    logp, rewards = case.behaviour_Z.log()[drawn], case.reward_Z[drawn]
    ratios = importance_ratios(logp, logp)
    assert torch.equal(ratios, torch.ones(50, dtype=torch.float64))
    for estimator in (ips, snips):
        found = estimator(ratios, rewards)
        assert found.value == pytest.approx(rewards.mean().item())
    assert effective_sample_size(ratios) == 50


def test_edges():
    none, one = torch.zeros(3), torch.tensor([0.0, 5.0, 0.0])
    rewards = torch.tensor([1.0, 0.25, 1.0])
    assert math.isnan(snips(none, rewards).value)
    assert (snips(none, rewards).low, snips(none, rewards).high) == (-INF, INF)
    assert (ips(none, rewards).value, ips(none, rewards).high) == (0.0, 0.0)
    assert snips(one, rewards).value == 0.25
    assert (snips(one, rewards).low, snips(one, rewards).high) == (-INF, INF)
    single = ips(torch.tensor([2.0]), torch.tensor([0.5]))
    assert (single.value, single.low, single.high) == (1.0, -INF, INF)
    assert math.isnan(ips(torch.zeros(0), torch.zeros(0)).value)
    equal = snips(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5]))
    assert (equal.value, equal.low, equal.high) == (0.5, 0.5, 0.5)
    assert effective_sample_size(none) == effective_sample_size(torch.zeros(0)) == 0.0
    assert effective_sample_size(one) == 1.0
    far = importance_ratios(torch.tensor([-INF, 0.0]), torch.tensor([-1.0, -5000.0]))
    assert far[0] == 0.0
    assert far[1].isfinite()
    assert effective_sample_size(far) == 1.0


def gradient(case: Case, losses_of) -> torch.Tensor:
    """Of the loss of every selection, weighed by how often it is logged, in the target's logits."""
    logits = case.target_logits.clone().requires_grad_()
    positions = torch.tensor(PERMUTATIONS)[None]
    logp_Z = log_prob(logits[None], positions)[0]
    (case.behaviour_Z * losses_of(logp_Z, case.behaviour_Z.log())).sum().backward()
    return logits.grad


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_the_mean_gradient_is_that_of_the_value_whatever_the_baseline(case, baseline):
    found = gradient(
        case, lambda p, mu: off_policy_losses(p, mu, case.reward_Z, baseline, max_ratio=1e9)
    )
    exact = EnumerableCase(seed=1).exact_gradient
    assert torch.allclose(found, -exact, rtol=1e-9, atol=1e-12)


def test_a_cap_leaves_the_weight_in_the_gradient_at_the_cap(case):
    """Min(w, c) (r - b) grad log p, by hand from the scores of the enumeration."""
    cap, baseline = 1.5, 0.4
    ratios = case.target_Z / case.behaviour_Z
    assert (ratios > cap).any()
    assert (ratios < cap).any()
    weights = case.behaviour_Z * ratios.clamp(max=cap) * (case.reward_Z - baseline)
    by_hand = -(weights[:, None] * EnumerableCase(seed=1).score_ZN).sum(dim=0)
    found = gradient(
        case, lambda p, mu: off_policy_losses(p, mu, case.reward_Z, baseline, max_ratio=cap)
    )
    assert torch.allclose(found, by_hand, rtol=1e-9, atol=1e-12)


def test_capped_ratios_are_continuous_and_at_most_the_ratio():
    ratios = torch.linspace(0.1, 50, 400, dtype=torch.float64)
    capped = capped_ratios(ratios.log(), torch.zeros(400, dtype=torch.float64), 5.0)
    assert torch.allclose(capped[ratios <= 5], ratios[ratios <= 5])
    assert (capped <= ratios + 1e-12).all()
    assert (capped.diff() > 0).all()
    assert (capped.diff() <= ratios.diff() + 1e-12).all()


def test_a_selection_that_the_target_never_makes_has_no_gradient():
    logits = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    logp = torch.stack([logits.log_softmax(0)[0], torch.tensor(-INF, dtype=torch.float64)])
    behaviour = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    losses = off_policy_losses(logp, behaviour, torch.tensor([1.0, 1.0]), 0.5, 10.0)
    assert losses[1] == 0.0
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).all()


def test_rewards_at_the_baseline_teach_nothing():
    logp = torch.tensor([0.3, 0.6]).log().requires_grad_()
    losses = off_policy_losses(logp, torch.tensor([0.5, 0.1]).log(), torch.ones(2), 1.0, 2.0)
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros(2))
    assert torch.equal(logp.grad, torch.zeros(2))
