"""Weights and chain against the enumerated posterior, losses against Fisher's identity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlrag.algorithms import dro, jsa

INF, NAN = float("inf"), float("nan")
N = 5


class Toy:
    """Five passages: scores of both retrievers and a likelihood each, and the true posterior."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.scores_N = torch.tensor(rng.normal(size=N))
        self.posterior_scores_N = torch.tensor(rng.normal(size=N))
        self.answer_logp_N = torch.tensor(rng.uniform(-4.0, -0.2, size=N))

    def prior(self, temperature: float = 1.0) -> torch.Tensor:
        return jsa.domain_logp(self.scores_N[None], temperature)

    def proposal(self) -> torch.Tensor:
        return jsa.domain_logp(self.posterior_scores_N[None], 1.0)

    def truth(self) -> torch.Tensor:
        """p(h|x) p(y|x,h) / p(y|x), by enumeration."""
        prior_N = torch.tensor([math.exp(s) for s in self.scores_N], dtype=torch.float64)
        joint_N = prior_N * self.answer_logp_N.exp()
        return joint_N / joint_N.sum()

    def weights(self) -> torch.Tensor:
        return jsa.log_weights(self.prior(), self.answer_logp_N[None], self.proposal())


def run_chain(
    weights_BN: torch.Tensor, posterior_BN: torch.Tensor, num_steps: int, seed: int = 0
) -> jsa.Chain:
    uniforms = torch.rand(
        2, len(weights_BN), num_steps, dtype=torch.float64, generator=seeded(seed)
    )
    proposals_BM = jsa.draw_proposals(posterior_BN, uniforms[0])
    return jsa.independence_chain(weights_BN, proposals_BM, uniforms[1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_the_posterior_is_stationary(seed):
    """It is the left eigenvector of the enumerated transition matrix, in detailed balance."""
    toy = Toy(seed)
    weight_N = toy.weights()[0]
    q_N = toy.proposal()[0].exp()
    accept_NN = jsa.acceptance(weight_N[:, None], weight_N[None, :])
    move_NN = accept_NN * q_N
    move_NN.fill_diagonal_(0.0)
    matrix_NN = move_NN + torch.diag(1 - move_NN.sum(dim=1))
    truth_N = toy.truth()
    assert torch.allclose(truth_N @ matrix_NN, truth_N, atol=1e-12)
    flow_NN = truth_N[:, None] * matrix_NN
    assert torch.allclose(flow_NN, flow_NN.T, atol=1e-12)
    values, vectors = np.linalg.eig(matrix_NN.T.numpy())
    first = vectors[:, np.argmax(values.real)].real
    assert np.allclose(first / first.sum(), truth_N.numpy(), atol=1e-9)


def test_acceptance_by_hand():
    current = torch.tensor([0.0, -1.0, -INF, -INF, 0.0])
    proposed = torch.tensor([math.log(0.25), 3.0, -5.0, -INF, -INF])
    assert jsa.acceptance(current, proposed).tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0, 0.0])


def test_the_chain_takes_the_steps_of_the_definition():
    """The same chain as a loop over plain numbers takes."""
    toy = Toy(3)
    num_steps = 200
    uniforms = torch.rand(2, 1, num_steps, dtype=torch.float64, generator=seeded(1))
    proposals_BM = jsa.draw_proposals(toy.proposal(), uniforms[0])
    weight_N = toy.weights()[0].exp().tolist()
    state, expected = None, []
    for proposal, uniform in zip(proposals_BM[0].tolist(), uniforms[1, 0].tolist(), strict=True):
        if state is None or uniform < min(1.0, weight_N[proposal] / weight_N[state]):
            state = proposal
        expected.append(state)
    chain = jsa.independence_chain(toy.weights(), proposals_BM, uniforms[1])
    assert chain.states_BM[0].tolist() == expected
    assert chain.tested_BM.sum().item() == num_steps - 1
    f_N = jsa.visit_frequencies(chain.states_BM, N)[0]
    assert f_N.tolist() == [expected.count(h) / num_steps for h in range(N)]


def test_a_long_chain_visits_passages_as_often_as_the_posterior_says():
    """200 chains of 200 steps: total variation and the mean number of accepted proposals."""
    toy = Toy(1)
    chain = run_chain(toy.weights().expand(200, -1), toy.proposal().expand(200, -1), num_steps=220)
    f_N = jsa.visit_frequencies(chain.states_BM[:, 20:], N).mean(dim=0)
    assert 0.5 * (f_N - toy.truth()).abs().sum().item() < 0.01
    weight_N, q_N, truth_N = toy.weights()[0], toy.proposal()[0].exp(), toy.truth()
    expected = (truth_N[:, None] * q_N * jsa.acceptance(weight_N[:, None], weight_N)).sum().item()
    found = chain.accepted_BM[:, 20:].double().mean().item()
    assert found == pytest.approx(expected, abs=0.01)


def test_proposals_are_drawn_as_often_as_q_says():
    q_BN = torch.tensor([[0.5, 0.0, 0.2, 0.3, 0.0]], dtype=torch.float64).log()
    uniforms_BM = torch.rand(1, 100_000, dtype=torch.float64, generator=seeded(0))
    drawn = jsa.draw_proposals(q_BN, uniforms_BM)[0].bincount(minlength=N) / 100_000
    assert torch.allclose(drawn, torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0]), atol=0.006)
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    assert jsa.draw_proposals(q_BN, ends).tolist() == [[0, 3]]
    assert jsa.draw_proposals(torch.zeros(1, 1), ends).tolist() == [[0, 0]]
    assert jsa.draw_proposals(q_BN.flip(1), ends).tolist() == [[1, 4]]
    padded_BN = torch.randn(500, N, generator=seeded(1)).double()
    padded_BN[:, 3:] = -INF
    q_BN = jsa.domain_logp(padded_BN, 0.3)
    assert (jsa.draw_proposals(q_BN, ends.expand(500, -1))[:, 1] < 3).all()


def test_where_q_is_the_posterior_everything_is_accepted():
    toy = Toy(2)
    posterior_BN = toy.truth().log()[None]
    weights_BN = jsa.log_weights(toy.prior(), toy.answer_logp_N[None], posterior_BN)
    chain = run_chain(weights_BN, posterior_BN, num_steps=500)
    # Weights are equal but for rounding, which may refuse one proposal in 1e15.
    assert chain.accepted_BM.all()
    uniforms_BM = torch.linspace(0.0, 0.99, 50, dtype=torch.float64)[None]
    proposals_BM = jsa.draw_proposals(posterior_BN, uniforms_BM)
    assert jsa.proposal_ess(weights_BN, proposals_BM).item() == pytest.approx(50.0)
    assert jsa.kl_divergence(posterior_BN, posterior_BN).item() == 0.0


def test_a_chain_of_one_step_stays_at_its_first_proposal():
    toy = Toy()
    chain = run_chain(toy.weights(), toy.proposal(), num_steps=1)
    assert chain.accepted_BM.tolist() == [[True]]
    assert chain.tested_BM.tolist() == [[False]]
    f_N = jsa.visit_frequencies(chain.states_BM, N)[0]
    assert f_N.sum() == f_N.max() == 1.0


def test_a_domain_of_one_passage_is_visited_always():
    one = torch.zeros(1, 1, dtype=torch.float64)
    chain = run_chain(jsa.log_weights(one, one - 700.0, one), one, num_steps=7)
    assert chain.accepted_BM.all()
    assert jsa.visit_frequencies(chain.states_BM, 1).tolist() == [[1.0]]
    assert jsa.retriever_loss(one, one, torch.ones(1, 1)).item() == 0.0


def test_likelihoods_that_underflow_are_compared_in_logarithms():
    """exp(-2000) is 0 in float64; the chain is that of the likelihoods times e^2000."""
    toy = Toy(4)
    far_BN = jsa.log_weights(toy.prior(), toy.answer_logp_N[None] - 2000.0, toy.proposal())
    found, expected = (run_chain(w, toy.proposal(), 300) for w in (far_BN, toy.weights()))
    assert torch.equal(found.states_BM, expected.states_BM)
    assert torch.isfinite(far_BN).all()


def test_a_likelihood_of_zero_is_left_and_never_returned_to():
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    weights_BN = jsa.log_weights(half, torch.tensor([[-INF, -3.0]]), half)
    proposals_BM = torch.tensor([[0, 0, 1, 0, 1]])
    chain = jsa.independence_chain(weights_BN, proposals_BM, torch.zeros(1, 5))
    assert chain.states_BM.tolist() == [[0, 0, 1, 1, 1]]


def test_what_could_not_be_scored_is_passed_over():
    """The chain is then that of the other proposals; without any there is no state."""
    weights_BN = torch.tensor([[NAN, 0.0, -1.0], [NAN, NAN, NAN]])
    proposals_BM = torch.tensor([[0, 2, 0, 1, 2], [0, 1, 2, 1, 0]])
    uniforms_BM = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.9]] * 2)
    chain = jsa.independence_chain(weights_BN, proposals_BM, uniforms_BM)
    assert chain.states_BM.tolist() == [[-1, 2, -1, 1, 1], [-1] * 5]
    assert chain.tested_BM.sum(dim=1).tolist() == [2, 0]
    f_BN = jsa.visit_frequencies(chain.states_BM, 3)
    assert f_BN.tolist() == [[0.0, pytest.approx(2 / 3), pytest.approx(1 / 3)], [0.0] * 3]
    scored = [math.exp(-1.0), 1.0, math.exp(-1.0)]
    expected = [sum(scored) ** 2 / sum(w * w for w in scored), 0.0]
    assert jsa.proposal_ess(weights_BN, proposals_BM).tolist() == pytest.approx(expected)
    logp_BN = torch.full((2, 3), 1 / 3).log().requires_grad_()
    loss_B = jsa.retriever_loss(logp_BN, logp_BN, f_BN.float())
    assert loss_B[1].item() == 0.0


def test_padding_is_never_proposed_and_changes_nothing():
    toy = Toy(5)
    padded = [torch.cat([s, torch.tensor([-INF])]) for s in (toy.scores_N, toy.posterior_scores_N)]
    prior_BN, posterior_BN = (jsa.domain_logp(each[None], 1.0) for each in padded)
    answer_BN = torch.cat([toy.answer_logp_N, torch.tensor([NAN])])[None]
    weights_BN = jsa.log_weights(prior_BN, answer_BN, posterior_BN)
    found = run_chain(weights_BN, posterior_BN, 100)
    expected = run_chain(toy.weights(), toy.proposal(), 100)
    assert torch.equal(found.states_BM, expected.states_BM)
    kl = [jsa.kl_divergence(posterior_BN, prior_BN), jsa.kl_divergence(toy.proposal(), toy.prior())]
    assert kl[0].item() == pytest.approx(kl[1].item())


def test_with_the_exact_posterior_the_prior_learns_the_gradient_of_the_likelihood():
    """Fisher's identity: grad log p(y|x) = sum_h p(h|x,y) grad log p(y,h|x)."""
    toy = Toy(6)
    temperature = 0.5
    scores_N = toy.scores_N.clone().requires_grad_()
    answer_N = toy.answer_logp_N.clone().requires_grad_()
    q_N = toy.posterior_scores_N.clone().requires_grad_()
    prior_BN = jsa.domain_logp(scores_N[None], temperature)
    log_likelihood = (prior_BN[0] + answer_N).logsumexp(dim=0)
    exact = torch.autograd.grad(log_likelihood, [scores_N, answer_N], retain_graph=True)
    f_BN = (prior_BN[0] + answer_N).softmax(dim=0).detach()[None]
    posterior_BN = jsa.domain_logp(q_N[None], temperature)
    loss = jsa.retriever_loss(prior_BN, posterior_BN, f_BN).sum()
    of_prior, of_q = torch.autograd.grad(loss, [scores_N, q_N])
    assert torch.allclose(of_prior, -exact[0], atol=1e-12)
    (of_answer,) = torch.autograd.grad(dro.generator_loss(answer_N[None], f_BN).sum(), answer_N)
    assert torch.allclose(of_answer, -exact[1], atol=1e-12)
    # The posterior's is that of KL(p(h|x,y) || q), by hand: (q - f) / temperature.
    assert torch.allclose(of_q, (posterior_BN[0].exp() - f_BN[0]).detach() / temperature)
    step = 1e-6
    moved = torch.zeros(N, dtype=torch.float64)
    for n in range(N):
        ends = []
        for sign in (1, -1):
            changed = toy.scores_N.clone()
            changed[n] += sign * step
            logp_N = jsa.domain_logp(changed[None], temperature)[0]
            ends.append((logp_N + toy.answer_logp_N).logsumexp(dim=0))
        moved[n] = (ends[0] - ends[1]) / (2 * step)
    assert torch.allclose(-of_prior, moved, atol=1e-7)


def test_the_mean_over_chains_of_the_losses_gradient_is_that_of_the_exact_posterior():
    toy = Toy(7)
    chain = run_chain(toy.weights().expand(300, -1), toy.proposal().expand(300, -1), 200, seed=3)
    f_BN = jsa.visit_frequencies(chain.states_BM, N)
    scores_BN = toy.scores_N.expand(300, -1).clone().requires_grad_()
    prior_BN = jsa.domain_logp(scores_BN, 1.0)
    loss = jsa.retriever_loss(prior_BN, toy.proposal().expand(300, -1), f_BN).mean()
    (gradient_BN,) = torch.autograd.grad(loss, scores_BN)
    expected_N = toy.prior()[0].exp() - toy.truth()
    assert torch.allclose(gradient_BN.sum(dim=0), expected_N, atol=0.015)


@pytest.mark.parametrize("seed", range(5))
def test_the_posterior_over_what_was_scored_errs_less_than_the_chains_visits(seed):
    """Total variation from the enumerated posterior: the mass that was not proposed, and no more.

    The chain's visits stay on the same passages and add their own noise, in each of 200 draws.
    """
    toy = Toy(seed)
    truth_N = toy.truth()
    weights_BN, q_BN = toy.weights().expand(200, -1), toy.proposal().expand(200, -1)
    for num_steps, times_less in ((4, 1.0), (50, 1.8)):
        uniforms = torch.rand(2, 200, num_steps, dtype=torch.float64, generator=seeded(seed))
        proposals_BM = jsa.draw_proposals(q_BN, uniforms[0])
        chain = jsa.independence_chain(weights_BN, proposals_BM, uniforms[1])
        scored_BN = torch.zeros(200, N, dtype=torch.bool).scatter(1, proposals_BM, True)
        answer_BN = torch.where(scored_BN, toy.answer_logp_N, NAN)
        f_BN = jsa.posterior_weights(toy.prior().expand(200, -1), answer_BN)
        assert torch.allclose(f_BN.sum(dim=1), torch.ones(200, dtype=torch.float64))
        error_B = 0.5 * (f_BN - truth_N).abs().sum(dim=1)
        missing_B = torch.where(scored_BN, 0.0, truth_N).sum(dim=1)
        assert torch.allclose(error_B, missing_B, atol=1e-12)
        visits_BN = jsa.visit_frequencies(chain.states_BM, N)
        of_visits_B = 0.5 * (visits_BN - truth_N).abs().sum(dim=1)
        assert (error_B <= of_visits_B + 1e-12).all()
        assert of_visits_B.mean() > times_less * error_B.mean()


def test_where_everything_was_scored_the_weights_are_the_posterior():
    """However often, and by whichever q, a passage was proposed."""
    toy = Toy(8)
    found_BN = jsa.posterior_weights(toy.prior(), toy.answer_logp_N[None])
    assert torch.allclose(found_BN[0], toy.truth(), rtol=1e-12)


def test_weights_of_what_was_not_scored_are_zero_and_without_scores_there_are_none():
    prior_BN = torch.tensor([[0.5, 0.3, 0.2, 0.0]] * 4, dtype=torch.float64).log()
    answer_BN = torch.tensor(
        [[-800.0, -801.0, NAN, NAN], [NAN] * 4, [-INF, -INF, NAN, NAN], [-INF, NAN, -3.0, NAN]]
    )
    found_BN = jsa.posterior_weights(prior_BN, answer_BN)
    share = 0.5 / (0.5 + 0.3 * math.exp(-1.0))
    assert found_BN[0].tolist() == pytest.approx([share, 1 - share, 0.0, 0.0])
    assert found_BN[1:].tolist() == [[0.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 0.0]]


def test_the_mean_likelihood_is_the_geometric_mean_of_the_tokens():
    logp_BN = torch.tensor([[-4.0, -6.0], [-4.0, NAN]])
    tokens_B = torch.tensor([2.0, 1.0])
    mean = jsa.likelihood_logp(logp_BN, tokens_B, "mean", 1.0)
    assert mean[0].tolist() == [-2.0, -3.0]
    assert mean[1, 0] == -4.0
    assert mean[1, 1].isnan()
    flatter = jsa.likelihood_logp(logp_BN, tokens_B, "product", 4.0)
    assert flatter[0].tolist() == [-1.0, -1.5]


def test_the_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.9, 0.1, 0.0]]).log()
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert jsa.kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
    assert jsa.kl_divergence(p, torch.tensor([[1.0, 0.0, 0.0]]).log()).item() == INF
