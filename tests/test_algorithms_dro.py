"""DRO's weights and coefficients against enumeration, hand computation and their edges."""

from __future__ import annotations

import math

import episodes
import numpy as np
import pytest
import torch
from enumerable_case import PERMUTATIONS, EnumerableCase, independent, mean_and_error

from rlrag.algorithms import dro

NAN, INF = float("nan"), float("inf")


def weigh(rewards: list[float], tau: float = 1.0, weighting: str = "self_normalised", logw=None):
    rewards_BM = torch.tensor([rewards], dtype=torch.float64)
    log_weights_BM = independent(rewards_BM) if logw is None else torch.tensor([logw]).double()
    return dro.importance_weights(rewards_BM, log_weights_BM, tau, weighting)[0].tolist()


def test_enumeration_is_a_distribution_and_agrees_with_the_policy():
    case = EnumerableCase()
    assert case.probability_Z.sum().item() == pytest.approx(1.0, abs=1e-12)
    positions = torch.tensor(PERMUTATIONS)[None]
    logp = episodes.log_prob_of(case.logits[None], positions)[0]
    assert torch.allclose(logp.exp(), case.probability_Z, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_raw_weights_are_unbiased_for_the_expected_likelihood(num_samples):
    case = EnumerableCase()
    mean, error = mean_and_error(case.estimates(num_samples, "raw", "none", 200_000))
    assert torch.all((mean - case.exact_gradient).abs() < 4 * error)


@pytest.mark.parametrize("num_samples", [2, 4])
def test_the_leave_one_out_baseline_keeps_the_mean_and_lowers_the_variance(num_samples):
    case = EnumerableCase()
    plain = case.estimates(num_samples, "raw", "none", 200_000)
    centred = case.estimates(num_samples, "raw", "leave_one_out", 200_000)
    mean, error = mean_and_error(centred)
    assert torch.all((mean - case.exact_gradient).abs() < 4 * error)
    assert centred.var(dim=0).sum() < 0.8 * plain.var(dim=0).sum()


@pytest.mark.parametrize(
    ("way", "baseline"),
    [
        ({}, "none"),
        ({"temperature": 2.0}, "none"),
        ({"temperature": 2.0}, "leave_one_out"),
        ({"temperature": 0.7}, "none"),
        ({"replacement": False}, "none"),
        ({"replacement": False, "temperature": 2.0}, "none"),
    ],
)
@pytest.mark.parametrize("num_samples", [1, 4])
def test_raw_weights_are_unbiased_however_the_policy_draws(way, baseline, num_samples):
    case = EnumerableCase()
    draws_RM, log_weights_RM = case.policy_draws(num_samples, 5_000, **way)
    coefficient_RM = case.coefficients(draws_RM, log_weights_RM, "raw", baseline)
    if baseline == "leave_one_out" and num_samples == 1:
        assert not coefficient_RM.any(), "one sample has nothing to be compared with"
        return
    mean, error = mean_and_error(
        torch.einsum("rm,rmn->rn", coefficient_RM, case.score_ZN[draws_RM])
    )
    assert torch.all((mean - case.exact_gradient).abs() < 4 * error)


def test_samples_without_replacement_estimate_with_less_variance():
    case = EnumerableCase()
    spread = {}
    for replacement in (True, False):
        draws_RM, log_weights_RM = case.policy_draws(8, 2_000, replacement=replacement)
        coefficient_RM = case.coefficients(draws_RM, log_weights_RM, "raw", "none")
        estimates = torch.einsum("rm,rmn->rn", coefficient_RM, case.score_ZN[draws_RM])
        spread[replacement] = estimates.var(dim=0).sum()
    assert spread[False] < 0.5 * spread[True]


@pytest.mark.parametrize("num_samples", [12, 15])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_selections_without_replacement_give_the_exact_gradients(num_samples, temperature):
    case = EnumerableCase()
    draws, log_weights = case.policy_draws(
        num_samples, 3, replacement=False, temperature=temperature
    )
    for weighting, baseline, exact in (
        ("raw", "none", case.exact_gradient),
        ("self_normalised", "none", case.exact_log_gradient),
        ("self_normalised", "mean", case.exact_log_gradient),
    ):
        found = case.coefficients(draws, log_weights, weighting, baseline)
        gradient = torch.einsum("rm,rmn->rn", found, case.score_ZN[draws])
        assert torch.allclose(gradient, exact.expand(3, -1), atol=1e-12)


def test_self_normalised_weights_tend_to_the_gradient_of_the_log():
    case = EnumerableCase()
    exact = case.exact_log_gradient
    scale = {}
    for num_samples in (1, 2, 4, 8, 64):
        mean, error = mean_and_error(
            case.estimates(num_samples, "self_normalised", "none", 100_000)
        )
        scale[num_samples] = (mean @ exact / exact.square().sum()).item()
        if num_samples == 1:
            assert torch.all(mean.abs() < 4 * error), "one sample carries no signal"
    assert scale[1] < scale[2] < scale[4] < scale[8] < scale[64]
    assert scale[64] == pytest.approx(1.0, abs=0.03)


def test_shares_of_the_gradient_in_the_thirty_permutation_case():
    """A categorical policy over 30 outcomes with random likelihoods, as analysed for this project.

    Expected: about 0, .6, .8 of the exact gradient at m = 1, 4, 8.
    """
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=30))
    probability = logits.softmax(dim=0)
    likelihood = torch.tensor(rng.uniform(size=30) ** 3)
    scores = torch.eye(30, dtype=torch.float64) - probability
    exact = ((probability * likelihood)[:, None] * scores).sum(dim=0) / (probability @ likelihood)
    generator = torch.Generator().manual_seed(1)
    share = {}
    for num_samples in (1, 4, 8):
        draws = torch.multinomial(
            probability.expand(100_000, -1), num_samples, True, generator=generator
        )
        rewards = likelihood.log()[draws]
        weights = dro.importance_weights(rewards, independent(rewards), 1.0, "self_normalised")
        mean = torch.einsum("rm,rmn->n", weights, scores[draws]) / len(draws)
        share[num_samples] = (mean @ exact / exact.square().sum()).item()
    assert abs(share[1]) < 0.03
    assert share[4] == pytest.approx(0.6, abs=0.12)
    assert share[8] == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("num_samples", [2, 8])
def test_mean_baseline_keeps_the_mean_and_lowers_the_variance(num_samples):
    case = EnumerableCase()
    plain = case.estimates(num_samples, "self_normalised", "none", 200_000)
    centred = case.estimates(num_samples, "self_normalised", "mean", 200_000)
    error = ((plain - centred).std(dim=0)) / len(plain) ** 0.5
    assert torch.all((plain.mean(dim=0) - centred.mean(dim=0)).abs() < 4 * error)
    assert centred.var(dim=0).sum() < 0.8 * plain.var(dim=0).sum()


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_autograd_through_the_loss_gives_the_same_numbers(baseline):
    case = EnumerableCase()
    draws = torch.tensor([[0, 5, 5, 11, 3]])
    positions = torch.tensor(PERMUTATIONS)[draws]
    log_weights = independent(case.likelihood_Z[draws])
    coefficient = case.coefficients(draws, log_weights, "self_normalised", baseline)
    logits = case.logits.clone().requires_grad_()
    loss = dro.selector_loss(episodes.log_prob_of(logits[None], positions), coefficient).sum()
    loss.backward()
    by_hand = -(coefficient[0][:, None] * case.score_ZN[draws[0]]).sum(dim=0)
    assert torch.allclose(logits.grad, by_hand, atol=1e-12)


def test_weights_by_hand_and_at_their_edges():
    assert weigh([math.log(0.3), math.log(0.1)]) == pytest.approx([0.75, 0.25])
    assert weigh([1.0, 0.0], tau=0.5) == pytest.approx(
        [math.e**2 / (math.e**2 + 1), 1 / (math.e**2 + 1)]
    )
    assert weigh([-5.0] * 4) == pytest.approx([0.25] * 4)
    assert weigh([-2000.0, -2001.0]) == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert weigh([-3.0, NAN]) == [1.0, 0.0]
    assert weigh([NAN, NAN]) == [0.0, 0.0]
    assert weigh([-3.0, -INF]) == [1.0, 0.0]
    assert weigh([-INF, -INF]) == [0.0, 0.0]
    assert weigh([-7.0]) == [1.0]


def test_raw_weights_by_hand_and_at_their_edges():
    raw = lambda rewards, **more: weigh(rewards, weighting="raw", **more)  # noqa: E731
    assert raw([math.log(0.3), math.log(0.1)]) == pytest.approx([0.15, 0.05])
    assert raw([math.log(0.09), 0.0], tau=2.0) == pytest.approx([0.15, 0.5])
    assert raw([math.log(0.3), NAN, math.log(0.1)]) == pytest.approx([0.15, 0.0, 0.05])
    assert raw([NAN, NAN]) == [0.0, 0.0]
    assert raw([-2000.0, -INF]) == [0.0, 0.0]


def test_sample_weights_multiply_and_failed_samples_leave_theirs_to_the_others():
    rewards, logw = [math.log(0.3), math.log(0.1), math.log(0.2)], np.log([0.5, 0.3, 0.1]).tolist()
    assert weigh(rewards, weighting="raw", logw=logw) == pytest.approx([0.15, 0.03, 0.02])
    assert weigh(rewards, logw=logw) == pytest.approx([0.75, 0.15, 0.1])
    failed = [rewards[0], NAN, rewards[2]]  # .9 in all is shared by .5 and .1: .75 and .15
    assert weigh(failed, weighting="raw", logw=logw) == pytest.approx([0.225, 0.0, 0.03])
    assert weigh(failed, logw=logw) == pytest.approx([0.15 / 0.17, 0.0, 0.02 / 0.17])
    padded = [*logw[:2], -INF]
    assert weigh(rewards, weighting="raw", logw=padded) == pytest.approx([0.15, 0.03, 0.0])
    assert weigh(rewards, logw=padded) == pytest.approx([0.15 / 0.18, 0.03 / 0.18, 0.0])
    assert weigh([NAN, NAN, -1.0], logw=padded) == [0.0, 0.0, 0.0]


def test_coefficients_by_hand():
    rewards = torch.tensor([[math.log(0.3), math.log(0.1), math.log(0.2)]], dtype=torch.float64)
    logw = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))
    valid = torch.tensor([[True, True, True]])
    weights = dro.importance_weights(rewards, logw, 1.0, "self_normalised")
    centred = dro.coefficients(weights, logw, valid, "mean")
    share = [0.15 / 0.22, 0.03 / 0.22, 0.04 / 0.22]
    assert centred[0].tolist() == pytest.approx(
        [share[0] - 0.5, share[1] - 0.3, share[2] - 0.2], abs=1e-12
    )
    raw = dro.importance_weights(rewards, logw, 1.0, "raw")
    found = dro.coefficients(raw, logw, valid, "leave_one_out")
    assert found[0].tolist() == pytest.approx([0.5 * 0.15, 0.3 * -0.15, 0.0], abs=1e-12)
    assert torch.equal(dro.coefficients(raw, logw, valid, "none"), raw)
    rewards[0, 1] = NAN  # the others then stand for .5 / .7 and .2 / .7
    raw = dro.importance_weights(rewards, logw, 1.0, "raw")
    found = dro.coefficients(raw, logw, ~rewards.isnan(), "leave_one_out")
    assert found[0].tolist() == pytest.approx([0.5 / 0.7 * 0.1, 0.0, 0.2 / 0.7 * -0.1], abs=1e-12)


@pytest.mark.parametrize(
    ("weighting", "baseline"), [("self_normalised", "mean"), ("raw", "leave_one_out")]
)
def test_equal_rewards_single_samples_and_padding_have_no_coefficient(weighting, baseline):
    def coefficient(rewards: list[float], logw: list[float]) -> list[float]:
        rewards_BM, logw_BM = torch.tensor([rewards]), torch.tensor([logw])
        weights = dro.importance_weights(rewards_BM, logw_BM, 1.0, weighting)
        valid = dro.valid_samples(rewards_BM, logw_BM)
        return dro.coefficients(weights, logw_BM, valid, baseline)[0].tolist()

    for m in (1, 2, 3, 5, 6, 7, 8, 13):
        assert coefficient([-1.3] * m, [-math.log(m)] * m) == [0.0] * m, "exactly, not nearly"
    assert coefficient([-1.0, NAN, NAN], [-1.1] * 3) == [0.0] * 3
    assert coefficient([-1.0, NAN, -1.0], [-1.1] * 3) == [0.0] * 3
    assert coefficient([NAN, NAN], [-0.7] * 2) == [0.0] * 2
    above, below, padding = coefficient([-1.0, -2.0, -2.0], [-0.7, -0.7, -INF])
    assert above == -below > 0
    assert padding == 0.0


def test_failed_samples_neither_pull_nor_push():
    rewards = torch.tensor([[-1.0, NAN, -1.0]])
    logw = independent(rewards)
    weights = dro.importance_weights(rewards, logw, 1.0, "self_normalised")
    logp = torch.tensor([[-1.0, -INF, -2.0]], requires_grad=True)
    loss = dro.selector_loss(logp, dro.coefficients(weights, logw, ~rewards.isnan(), "none"))
    loss.backward()
    assert loss.item() == pytest.approx(1.5)
    assert logp.grad.tolist() == [[-0.5, 0.0, -0.5]]


@pytest.mark.parametrize("num_samples", [1, 8])
def test_a_batch_of_eight_equals_eight_batches_of_one(num_samples):
    generator = torch.Generator().manual_seed(0)
    rewards = -3 * torch.rand(8, num_samples, generator=generator)
    rewards[2, 0], rewards[5] = NAN, NAN
    logw = torch.randn(8, num_samples, generator=generator)
    for weighting, baseline in (("self_normalised", "mean"), ("raw", "leave_one_out")):

        def both(rows: slice, weighting: str = weighting, baseline: str = baseline):
            weights = dro.importance_weights(rewards[rows], logw[rows], 1.0, weighting)
            valid = dro.valid_samples(rewards[rows], logw[rows])
            return weights, dro.coefficients(weights, logw[rows], valid, baseline)

        for together, alone in zip(
            both(slice(None)),
            zip(*(both(slice(row, row + 1)) for row in range(8)), strict=True),
            strict=True,
        ):
            assert torch.allclose(together, torch.cat(alone), atol=1e-7)


def test_diagnostics_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    rewards = torch.tensor([[-1.0, -1.0, -9.0, -9.0], [2.0, 2.0, 2.0, float("nan")]])
    positions = torch.tensor([[[0, 1], [1, 0], [0, 1], [2, 3]], [[0, 1]] * 4])
    result = dro.diagnostics(weights, rewards, positions)
    assert result.ess.tolist() == pytest.approx([2.0, 4.0])
    assert result.entropy.tolist() == pytest.approx([math.log(2), math.log(4)])
    assert result.zero_signal.tolist() == [False, True]
    assert result.duplicate_share.tolist() == [0.25, 0.75]
    assert result.log_weight_variance.tolist() == [0.0, 0.0]
    nothing = dro.diagnostics(torch.zeros(1, 2), torch.full((1, 2), NAN), positions[:1, :2])
    assert nothing.ess.tolist() == [0.0]
    assert nothing.zero_signal.tolist() == [True]
    assert nothing.log_weight_variance.tolist() == [0.0]


def test_diagnostics_are_those_of_normalised_weights_whatever_the_scale():
    """log w = -1, -3, -5 up to a constant: variance ((2)^2 + 0 + (2)^2) / 2 = 4."""
    weights = torch.tensor([[-1.0, -3.0, -5.0, -INF]]).exp()
    rewards = torch.tensor([[-1.0, -3.0, -5.0, NAN]])
    positions = torch.tensor([[[0], [1], [2], [3]]])
    shares = (weights / weights.sum())[0, :3].tolist()
    for scale in (1.0, 0.01):
        result = dro.diagnostics(scale * weights, rewards, positions)
        assert result.log_weight_variance.tolist() == pytest.approx([4.0])
        assert result.ess.tolist() == pytest.approx([1 / sum(w * w for w in shares)])
        assert result.entropy.tolist() == pytest.approx([-sum(w * math.log(w) for w in shares)])


def test_diagnostics_of_one_sample():
    one = dro.diagnostics(torch.ones(1, 1), torch.tensor([[-4.0]]), torch.tensor([[[2, 0]]]))
    assert [value.item() for value in one] == [1.0, 0.0, True, 0.0, 0.0]
