"""Off-policy estimates against enumeration, and their intervals against simulation."""

from __future__ import annotations

import itertools
import math

import episodes
import numpy as np
import pytest
import torch
from enumerable_case import PERMUTATIONS, EnumerableCase

from rlrag.algorithms import off_policy
from rlrag.algorithms.off_policy import (
    capped_ratios,
    effective_sample_size,
    importance_ratios,
    ips,
    off_policy_losses,
    snips,
)

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
    for seed in range(100):
        drawn = case.draw(100, seed)
        for estimator, found in errors.items():
            # A constant that is added to all rewards leaves the error of SNIPS alone.
            value = estimator(case.ratios(drawn), case.reward_Z[drawn] + 2).value
            found.append(value - 2 - case.value)
    assert np.std(errors[snips]) < 0.5 * np.std(errors[ips])
    drawn = case.draw(20_000, 1)
    assert snips(case.ratios(drawn), case.reward_Z[drawn]).value == pytest.approx(
        case.value, abs=0.02
    )


@pytest.mark.parametrize("estimator", [ips, snips])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_hold_the_value_as_often_as_they_say(case, estimator, confidence):
    held = 0
    for seed in range(150):
        drawn = case.draw(600, seed)
        found = estimator(case.ratios(drawn), case.reward_Z[drawn], confidence)
        held += found.low <= case.value <= found.high
    # Two standard errors of the share itself are 0.065 and 0.036.
    assert held / 150 == pytest.approx(confidence, abs=0.065)


def test_values_by_hand():
    ratios, rewards = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    found = ips(ratios, rewards)
    # Terms 2, 0, 0: mean 2/3, standard deviation 2/sqrt(3), error 2/3.
    assert found.value == pytest.approx(2 / 3)
    assert found.high - found.value == pytest.approx(1.959964 * 2 / 3, rel=1e-6)
    # Two questions with sums 1 and -1 around 1/2: s^2 = 2/1 (1 + 1) / 4^2.
    twice = torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = ips(torch.ones(4), twice, questions_Q=[8, 8, 3, 3])
    assert found.high - found.value == pytest.approx(1.959964 / 2, rel=1e-6)
    found = snips(ratios, rewards)
    assert found.value == pytest.approx(2 / 3)
    assert found.low < 2 / 3 < found.high
    assert effective_sample_size(ratios) == pytest.approx(9 / 5)


def test_the_interval_is_the_bootstrap_t_over_questions():
    """By a loop over resamples, with each error by leaving out one question after the other."""
    rng = np.random.default_rng(2)
    questions = np.repeat(np.arange(8), [1, 2, 3, 4, 5, 2, 3, 4])
    ratios, rewards = rng.gamma(2.0, size=24), rng.random(24)

    def value_and_error(chosen: np.ndarray) -> tuple[float, float]:
        rows = [np.flatnonzero(questions == u) for u in chosen]
        together = np.concatenate(rows)
        value = np.average(rewards[together], weights=ratios[together])
        left_out = []
        for place in range(len(rows)):
            kept = np.concatenate(rows[:place] + rows[place + 1 :])
            left_out.append(np.average(rewards[kept], weights=ratios[kept]) - value)
        return value, float(np.linalg.norm(left_out))

    value, error = value_and_error(np.arange(8))
    studentized = []
    for times in np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=1000):
        other, its_error = value_and_error(np.repeat(np.arange(8), times))
        studentized.append((other - value) / its_error)
    low, high = np.quantile(studentized, [0.05, 0.95])
    found = snips(torch.from_numpy(ratios), torch.from_numpy(rewards), 0.9, 10 * questions)
    expected = (value, value - high * error, value - low * error)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_questions", [20, 60])
def test_intervals_hold_the_value_when_questions_have_several_selections(num_questions):
    """300 logs: the reward depends on the question, which 5 selections share."""
    rng = np.random.default_rng(5)
    shape = (300, num_questions)
    quality = rng.normal(size=(*shape, 1)) + 0.5 * rng.normal(size=(*shape, 6))
    target = np.exp(0.7 * rng.normal(size=(*shape, 6)) + 0.3 * quality)
    target /= target.sum(axis=2, keepdims=True)
    worth = 1 / (1 + np.exp(-1.5 * quality))
    picks = rng.integers(6, size=(*shape, 5))
    ratios = 6 * np.take_along_axis(target, picks, axis=2).reshape(300, -1)
    rewards = np.take_along_axis(worth, picks, axis=2).reshape(300, -1)
    rewards = (rng.random(rewards.shape) < rewards).astype(float)
    truth = (target * worth).sum(axis=2).mean()
    questions = np.repeat(np.arange(num_questions), 5)

    def share_held(estimator, known, num_logs: int = 300) -> float:
        logs = [torch.from_numpy(array[:num_logs]) for array in (ratios, rewards)]
        found = [estimator(*log, 0.95, known) for log in zip(*logs, strict=True)]
        return float(np.mean([each.low <= truth <= each.high for each in found]))

    # Two standard errors of a share of 0.95 are 0.025.
    assert share_held(snips, questions) == pytest.approx(0.95, abs=0.03)
    assert share_held(ips, questions) == pytest.approx(0.95, abs=0.04)
    assert share_held(snips, None, num_logs=100) < 0.9  # as if selections were independent


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
    learning = torch.tensor([-1.0], requires_grad=True)
    assert not importance_ratios(learning, torch.tensor([-2.0])).requires_grad


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_of_equal_rewards_says_nothing_whatever_its_rounding(seed):
    """Of 30 rewards two differ: one resample in eight has neither, and no error but rounding's."""
    rewards = torch.zeros(30)
    rewards[[3, 7]] = 1.0
    ratios = torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=30))
    found, turned = snips(ratios, rewards), snips(ratios, 1 - rewards)
    assert found.value - 1 < found.low < found.value < found.high < found.value + 1
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((found.low, found.high), rel=1e-6)


def test_resamples_in_several_blocks_give_the_same_interval(case, monkeypatch):
    """As with more questions than fit in one block of resamples."""
    drawn = case.draw(30, 0)
    whole = snips(case.ratios(drawn), case.reward_Z[drawn])
    for at_once in (1, 30 * 300):
        monkeypatch.setattr(off_policy, "_RESAMPLED_AT_ONCE", at_once)
        found = snips(case.ratios(drawn), case.reward_Z[drawn])
        assert (found.low, found.high) == pytest.approx((whole.low, whole.high), rel=1e-9)


def gradient(case: Case, losses_of) -> torch.Tensor:
    """Of the loss of every selection, weighed by how often it is logged, in the target's logits."""
    logits = case.target_logits.clone().requires_grad_()
    positions = torch.tensor(PERMUTATIONS)[None]
    logp_Z = episodes.log_prob_of(logits[None], positions)[0]
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
