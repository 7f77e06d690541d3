"""DRO's losses and regularisers against enumeration, hand computation and their edges."""

from __future__ import annotations

import math

import episodes
import pytest
import torch
from enumerable_case import PERMUTATIONS, EnumerableCase, independent, mean_and_error

from rlrag.algorithms import dro

INF = float("inf")


def exact_policy(case: EnumerableCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that want a gradient and the log-probabilities of all permutations, (1, Z)."""
    logits = case.logits.clone().requires_grad_()
    return logits, episodes.log_prob_of(logits[None], torch.tensor(PERMUTATIONS)[None])


@pytest.mark.parametrize("moved", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["entropy", "kl"])
def test_regularisers_have_the_gradient_that_autograd_finds_by_enumeration(kind, moved):
    """Also in later passes, where the policy has moved away from the one that drew."""
    case = EnumerableCase()
    positions = torch.tensor(PERMUTATIONS)[None]
    initial, step = torch.tensor([[0.4, -0.2, 0.1, 0.9], [1.0, -1.0, 0.5, 0.0]]).double()
    initial = episodes.log_prob_of(initial[None], positions)
    now = (case.logits + moved * step).requires_grad_()
    logp = episodes.log_prob_of(now[None], positions)
    gain = -(logp.exp() * (logp if kind == "entropy" else logp - initial)).sum()
    (exact,) = torch.autograd.grad(gain, now, retain_graph=True)
    behaviour = case.probability_Z.log()[None]

    def coefficient(draws_RM: torch.Tensor, log_weights_RM: torch.Tensor) -> torch.Tensor:
        drawn = logp[0][draws_RM], behaviour[0][draws_RM]
        if kind == "entropy":
            return dro.entropy_coefficients(*drawn, log_weights_RM)
        return dro.kl_coefficients(*drawn, initial[0][draws_RM], log_weights_RM)

    constants = coefficient(torch.arange(len(PERMUTATIONS))[None], behaviour)
    assert not constants.requires_grad
    assert constants.sum().item() == pytest.approx(gain.item(), abs=1e-12), "the sum estimates it"
    loss = -dro.selector_loss(logp, constants).sum()
    (found,) = torch.autograd.grad(loss, now, retain_graph=True)
    assert torch.allclose(found, exact, atol=1e-12)
    scores_ZN = torch.stack(
        [torch.autograd.grad(each, now, retain_graph=True)[0] for each in logp[0]]
    )
    for way in ({}, {"temperature": 2.0}, {"replacement": False}):
        draws_RM, log_weights_RM = case.policy_draws(4, 5_000, **way)
        constants_RM = coefficient(draws_RM, log_weights_RM)
        mean, error = mean_and_error(torch.einsum("rm,rmn->rn", constants_RM, scores_ZN[draws_RM]))
        assert torch.all((mean - exact).abs() < 4 * error)


def test_regularisers_at_their_edges():
    """Padding, an unchanged policy, a certain selection, and one that has become e^899 likelier."""
    logp = torch.tensor([[-1.0, -2.0, -INF]])
    logw = torch.tensor([[0.0, math.log(0.5), -INF]])
    assert dro.entropy_coefficients(logp, logp, logw)[0].tolist() == pytest.approx([1, 1, 0])
    apart = dro.kl_coefficients(logp, logp, logp - 1, logw)
    assert apart[0].tolist() == pytest.approx([-1, -0.5, 0])
    assert not dro.kl_coefficients(logp, logp, logp, logw).any()
    certain = torch.zeros(1, 1)
    assert dro.entropy_coefficients(certain, certain, certain).item() == 0.0
    likelier = dro.kl_coefficients(certain - 1, certain - 900, certain - 3, certain)
    assert likelier.item() == pytest.approx(-2 * math.exp(20), rel=1e-6)


def test_the_clipped_loss_on_policy_has_the_gradient_of_the_plain_one():
    case = EnumerableCase()
    draws = torch.tensor([[0, 5, 5, 11, 3]])
    positions = torch.tensor(PERMUTATIONS)[draws]
    constants = case.coefficients(
        draws, independent(case.likelihood_Z[draws]), "self_normalised", "mean"
    )
    gradients = []
    for clipped in (True, False):
        logits = case.logits.clone().requires_grad_()
        logp = episodes.log_prob_of(logits[None], positions)
        behaviour = logp.detach()
        assert torch.equal((logp - behaviour).exp(), torch.ones_like(logp)), "on-policy ratios"
        loss = (
            dro.clipped_selector_loss(logp, behaviour, constants, 0.2)
            if clipped
            else dro.selector_loss(logp, constants)
        )
        gradients.extend(torch.autograd.grad(loss.sum(), logits))
    assert torch.allclose(*gradients, atol=1e-14)


@pytest.mark.parametrize(
    ("ratio", "coefficient", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # improved enough: no more pull
        (0.5, 2.0, -1.0, -1.0),  # worsened: pulled back
        (0.5, -2.0, 1.6, 0.0),  # lowered enough: no more push
        (1.5, -2.0, 3.0, 3.0),  # raised against its sign: pushed back without bound
    ],
)
def test_the_clipped_loss_by_hand(ratio, coefficient, loss, slope):
    """The slope is d loss / d log p = -c rho where the plain ratio is the smaller term."""
    logp = torch.tensor([[math.log(0.2 * ratio)]], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([[math.log(0.2)]], dtype=torch.float64, requires_grad=True)
    constant = torch.tensor([[coefficient]], requires_grad=True)
    found = dro.clipped_selector_loss(logp, behaviour, constant, 0.2)
    found.sum().backward()
    assert found.tolist() == pytest.approx([loss])
    assert logp.grad.item() == pytest.approx(slope)
    assert behaviour.grad is None, "the policy that drew is a constant"
    assert constant.grad is None, "coefficients are constants"


def test_the_ratio_of_each_action_is_clipped_and_not_that_of_the_path():
    """Both actions have rho = 1.15, within 1.2; their product, 1.32, is beyond it."""
    logp = torch.log(torch.full((1, 1, 2), 0.2 * 1.15, dtype=torch.float64)).requires_grad_()
    behaviour = torch.log(torch.full((1, 1, 2), 0.2, dtype=torch.float64))
    constant = torch.full((1, 1, 2), 2.0, dtype=torch.float64)
    found = dro.clipped_selector_loss(logp, behaviour, constant, 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(-4.6)
    assert logp.grad.flatten().tolist() == pytest.approx([-2.3, -2.3])


def test_prefix_coefficients_never_exceed_one_and_leave_failures_out():
    rewards = torch.tensor([[-5.0, -1.0, float("nan"), -3.0]], dtype=torch.float64)
    before = torch.tensor([[[0.0], [-9.0], [2.0], [float("nan")]]], dtype=torch.float64)
    log_weights = torch.tensor([[-2.0, -2.0, -2.0, -INF]], dtype=torch.float64)
    found = dro.prefix_coefficients(rewards, before, log_weights, 1.0)
    assert found[0, 2:].tolist() == [[0.0], [0.0]]
    assert found.abs().max() <= 1.0
    # Z = (e^0 + e^-1) times what both samples weigh; the first fell from e^0 to e^-5
    total = 1 + math.exp(-1)
    assert found[0, :2, 0].tolist() == pytest.approx(
        [(math.exp(-5) - 1) / total, (math.exp(-1) - math.exp(-9)) / total]
    )


def test_the_clipped_loss_stays_finite_at_its_edges():
    logp = torch.tensor([[-1.0, -1.0, -900.0, -900.0, -INF]], requires_grad=True)
    behaviour = torch.tensor([[-900.0, -900.0, -1.0, -1.0, -INF]])
    constants = torch.tensor([[1.0, -1e-9, 1.0, -1.0, 0.0]])
    loss = dro.clipped_selector_loss(logp, behaviour, constants, 0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-(1.2 - 1e-9 * math.exp(20) + 0.0 - 0.8), rel=1e-5)
    assert not logp.grad.any()


@pytest.mark.parametrize("weighting", ["raw", "self_normalised"])
def test_the_generators_loss_has_the_gradient_of_the_likelihood_by_enumeration(weighting):
    """With all selections, L_G descends E[p(y|x,d_z)], or its log when self-normalised (Eq. 13)."""
    case = EnumerableCase()
    draws, logw = case.policy_draws(12, 1, replacement=False)
    rewards = case.likelihood_Z.log()[draws]
    answer_logp_Z = case.likelihood_Z.log().requires_grad_()
    weights = dro.importance_weights(rewards, logw, 1.0, weighting)
    loss = dro.generator_loss(answer_logp_Z[draws], weights).sum()
    (found,) = torch.autograd.grad(loss, answer_logp_Z)
    marginal = (case.probability_Z * answer_logp_Z.exp()).sum()
    gain = marginal if weighting == "raw" else marginal.log()
    (exact,) = torch.autograd.grad(gain, answer_logp_Z)
    assert torch.allclose(-found, exact, atol=1e-12)


def test_the_generators_loss_by_hand_and_at_its_edges():
    logp = torch.tensor([[-1.0, -3.0], [-2.0, -INF]], requires_grad=True)
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0]], requires_grad=True)
    loss = dro.generator_loss(logp, weights)
    assert loss.tolist() == [1.5, 2.0]
    loss.sum().backward()
    assert logp.grad.tolist() == [[-0.75, -0.25], [-1.0, 0.0]]
    assert weights.grad is None, "weights are constants"
