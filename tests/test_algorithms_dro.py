"""DRO's weights, coefficients and loss against enumeration, hand computation and their edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from rlrag.algorithms import dro
from rlrag.selection import plackett_luce

NUM_CANDIDATES, NUM_SELECTED = 4, 2
PERMUTATIONS = list(itertools.permutations(range(NUM_CANDIDATES), NUM_SELECTED))


class EnumerableCase:
    """Four candidates, two picks: all twelve permutations with their probability and gradient."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.logits = torch.tensor(rng.normal(size=NUM_CANDIDATES), dtype=torch.float64)
        self.likelihood_Z = torch.tensor(
            rng.uniform(0.02, 0.9, size=len(PERMUTATIONS)), dtype=torch.float64
        )
        probabilities, gradients = [], []
        for permutation in PERMUTATIONS:
            probability, score = self._by_hand(permutation)
            probabilities.append(probability)
            gradients.append(score)
        self.probability_Z = torch.tensor(probabilities, dtype=torch.float64)
        self.score_ZN = torch.tensor(np.array(gradients))

    def _by_hand(self, permutation: tuple[int, ...]) -> tuple[float, np.ndarray]:
        """p(z) and d log p(z) / d logits, from the definition, without autograd."""
        left = list(range(NUM_CANDIDATES))
        probability, score = 1.0, np.zeros(NUM_CANDIDATES)
        for pick in permutation:
            strength = {j: math.exp(float(self.logits[j])) for j in left}
            total = sum(strength.values())
            probability *= strength[pick] / total
            score[pick] += 1
            for j in left:
                score[j] -= strength[j] / total
            left.remove(pick)
        return probability, score

    @property
    def exact_gradient(self) -> torch.Tensor:
        """d E[p(y|x,d_z)] / d logits."""
        return ((self.probability_Z * self.likelihood_Z)[:, None] * self.score_ZN).sum(dim=0)

    @property
    def exact_log_gradient(self) -> torch.Tensor:
        """d log E[p(y|x,d_z)] / d logits."""
        return self.exact_gradient / (self.probability_Z * self.likelihood_Z).sum()

    def estimates(
        self, num_samples: int, weighting: str, baseline: str, repeats: int
    ) -> torch.Tensor:
        """Gradient estimates, shape (repeats, N), from the code's weights and hand-made scores."""
        generator = torch.Generator().manual_seed(7)
        draws_RM = torch.multinomial(
            self.probability_Z.expand(repeats, -1), num_samples, True, generator=generator
        )
        rewards_RM = self.likelihood_Z.log()[draws_RM]
        weights_RM = dro.importance_weights(rewards_RM, 1.0, weighting)
        valid_RM = torch.ones_like(rewards_RM, dtype=torch.bool)
        coefficient_RM = dro.coefficients(weights_RM, valid_RM, baseline)
        return torch.einsum("rm,rmn->rn", coefficient_RM, self.score_ZN[draws_RM])


def mean_and_error(estimates_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return estimates_RN.mean(dim=0), estimates_RN.std(dim=0) / len(estimates_RN) ** 0.5


def test_enumeration_is_a_distribution_and_agrees_with_the_policy():
    case = EnumerableCase()
    assert case.probability_Z.sum().item() == pytest.approx(1.0, abs=1e-12)
    positions = torch.tensor(PERMUTATIONS)[None]
    logp = plackett_luce.log_prob(case.logits[None], positions)[0]
    assert torch.allclose(logp.exp(), case.probability_Z, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_raw_weights_are_unbiased_for_the_expected_likelihood(num_samples):
    case = EnumerableCase()
    mean, error = mean_and_error(case.estimates(num_samples, "raw", "none", 200_000))
    assert torch.all((mean - case.exact_gradient).abs() < 4 * error)


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
        weights = dro.importance_weights(likelihood.log()[draws], 1.0, "self_normalised")
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
    weights = dro.importance_weights(case.likelihood_Z.log()[draws], 1.0, "self_normalised")
    coefficient = dro.coefficients(weights, torch.ones_like(weights, dtype=torch.bool), baseline)
    logits = case.logits.clone().requires_grad_()
    loss = dro.selector_loss(plackett_luce.log_prob(logits[None], positions), coefficient).sum()
    loss.backward()
    by_hand = -(coefficient[0][:, None] * case.score_ZN[draws[0]]).sum(dim=0)
    assert torch.allclose(logits.grad, by_hand, atol=1e-12)


def test_weights_by_hand_and_at_their_edges():
    nan, inf = float("nan"), float("inf")
    weigh = lambda *rewards, tau=1.0: dro.importance_weights(  # noqa: E731
        torch.tensor([rewards]), tau, "self_normalised"
    )[0].tolist()
    assert weigh(math.log(0.3), math.log(0.1)) == pytest.approx([0.75, 0.25])
    assert weigh(1.0, 0.0, tau=0.5) == pytest.approx(
        [math.e**2 / (math.e**2 + 1), 1 / (math.e**2 + 1)]
    )
    assert weigh(-5.0, -5.0, -5.0, -5.0) == pytest.approx([0.25] * 4)
    assert weigh(-2000.0, -2001.0) == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])
    assert weigh(-3.0, nan) == [1.0, 0.0]
    assert weigh(nan, nan) == [0.0, 0.0]
    assert weigh(-3.0, -inf) == [1.0, 0.0]


def test_failed_samples_neither_pull_nor_push():
    rewards = torch.tensor([[-1.0, float("nan"), -1.0]])
    weights = dro.importance_weights(rewards, 1.0, "self_normalised")
    coefficient = dro.coefficients(weights, ~rewards.isnan(), "mean")
    assert coefficient.tolist() == [[0.0, 0.0, 0.0]]
    logp = torch.tensor([[-1.0, float("-inf"), -2.0]], requires_grad=True)
    loss = dro.selector_loss(logp, dro.coefficients(weights, ~rewards.isnan(), "none"))
    assert loss.item() == pytest.approx(1.5)


def test_diagnostics_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    rewards = torch.tensor([[-1.0, -1.0, -9.0, -9.0], [2.0, 2.0, 2.0, float("nan")]])
    positions = torch.tensor([[[0, 1], [1, 0], [0, 1], [2, 3]], [[0, 1]] * 4])
    result = dro.diagnostics(weights, rewards, positions)
    assert result.ess.tolist() == pytest.approx([2.0, 4.0])
    assert result.entropy.tolist() == pytest.approx([math.log(2), math.log(4)])
    assert result.zero_signal.tolist() == [False, True]
    assert result.duplicate_share.tolist() == [0.25, 0.75]
    nothing = dro.diagnostics(
        torch.zeros(1, 2), torch.full((1, 2), float("nan")), positions[:1, :2]
    )
    assert nothing.ess.tolist() == [0.0]
    assert nothing.zero_signal.tolist() == [True]
