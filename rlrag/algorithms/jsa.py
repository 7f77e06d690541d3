"""Joint stochastic approximation: posterior weights of passages, and the losses on them.

Joint stochastic approximation (JSA-RAG, arXiv 2508.18168) treats the passage h that is shown as a
latent variable of p(y | x) = sum_h p(h | x) p(y | x, h). Three parts learn: the prior retriever
p(h | x), the generator p(y | x, h), and a posterior retriever q(h | x, y), which also reads the
answer. A step estimates the true posterior

    p(h | x, y) = p(h | x) p(y | x, h) / p(y | x)

by weights f(h) on passages that q proposes, which the generator scores, and moves all three parts
towards them:

    prior and posterior   - sum_h f(h) [ log p(h | x) + log q(h | x, y) ]     `retriever_loss`
    generator             - sum_h f(h) log p(y | x, h)                        `dro.generator_loss`

By Fisher's identity the gradient of log p(y | x) is that of sum_h p(h | x, y) log p(y, h | x), so
that the prior's and the generator's losses have its negative as their gradient where f is the
posterior. The posterior's loss is KL(p(h | x, y) || q) up to a constant.

h ranges over a finite domain: the passages that the prior ranks first together with those that the
posterior ranks first, on which both are normalised anew.

`posterior_weights` has f(h) proportional to p(h | x) p(y | x, h) on the set S of different passages
that were proposed. Both factors are known there, so that neither q nor the number of proposals
enters: an importance weight would estimate what is known. All that is missing is the posterior
mass outside S. It is the total variation between f and the posterior, and no weights on S come
nearer, in total variation or in KL(f || p(h | x, y)) = - log p(S | x, y). Once all of the domain
was proposed f is the posterior. A passage is missing with probability (1 - q(h | x, y))^m.

`visit_frequencies` is the paper's form: f(h) is the share of its steps that a Metropolis
independence chain spent in h. The chain proposes h ~ q(h | x, y) and leaves its state h~ for it
with probability

    min(1, w(h) / w(h~)),    w(h) = p(h | x) p(y | x, h) / q(h | x, y).

The chain stays in S too, and adds the noise of m dependent draws.

Departures from the paper and its released code:

- By default the weights are `posterior_weights`, the paper's are the visits of the chain.
- The likelihood in w is that of the whole answer, as the equations say; the code has the mean over
  its tokens, a flatter target, which `likelihood_logp` offers too.
- Everything is in logarithms: the code adds 1e-7 to a denominator, which decides where likelihoods
  are small.
- The first state, which is always accepted, does not count in the acceptance rate.
- Passages whose likelihood could not be computed are left out of the domain.

Shape letters: B questions, N passages of the domain, M steps of the chain.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Likelihood = Literal["product", "mean"]

_NO_STATE = -1


def domain_logp(scores_BN: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logarithm of softmax(score / temperature) over each question's domain, shape (B, N).

    A score of -inf marks padding, which has log-probability -inf. A domain of one passage has 0.

    Example:
        >>> domain_logp(torch.tensor([[0.1, 0.0, float("-inf")]]), temperature=0.1).exp()
        tensor([[0.7311, 0.2689, 0.0000]])
    """
    return (scores_BN / temperature).log_softmax(dim=1)


def likelihood_logp(
    answer_logp_BN: torch.Tensor,
    num_tokens_B: torch.Tensor,
    likelihood: Likelihood,
    temperature: float,
) -> torch.Tensor:
    """The log-likelihood that the chain's target has, shape (B, N), in nats.

    - `product`: log p(y | x, h) / temperature, summed over the answer's tokens; with temperature 1
      the paper's equations.
    - `mean`: the same divided by the number of tokens, what the released code has. The target is
      then proportional to p(h | x) p(y | x, h)^(1 / (T tokens)), flatter the longer the answer.

    NaN stays NaN. An answer of one token has the same value in both.

    Example:
        >>> logp, tokens = torch.tensor([[-4.0, -8.0]]), torch.tensor([4])
        >>> likelihood_logp(logp, tokens, "product", temperature=2.0)
        tensor([[-2., -4.]])
        >>> likelihood_logp(logp, tokens, "mean", temperature=1.0)
        tensor([[-1., -2.]])
    """
    if likelihood == "mean":
        answer_logp_BN = answer_logp_BN / num_tokens_B[:, None]
    return answer_logp_BN / temperature


def log_weights(
    prior_logp_BN: torch.Tensor, answer_logp_BN: torch.Tensor, posterior_logp_BN: torch.Tensor
) -> torch.Tensor:
    """The chain's log w(h) = log p(h | x) + log p(y | x, h) - log q(h | x, y), shape (B, N).

    Up to a constant of the question, which the chain never sees. NaN where the likelihood is NaN,
    and where q is 0: such a passage is never proposed. -inf where p or the likelihood is 0.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]]).log()
        >>> log_weights(half, torch.tensor([[-1.0, -800.0]]), half)  # no underflow
        tensor([[  -1., -800.]])
    """
    weights_BN = prior_logp_BN + answer_logp_BN - posterior_logp_BN
    return weights_BN.masked_fill(posterior_logp_BN == float("-inf"), float("nan"))


def draw_proposals(posterior_logp_BN: torch.Tensor, uniforms_BM: torch.Tensor) -> torch.Tensor:
    """Independent draws from q with replacement, int64 of shape (B, M), by its inverse CDF.

    Passages of probability 0 are never drawn. One passage is drawn by every number.

    Args:
        posterior_logp_BN: log q(h | x, y), normalised over each row.
        uniforms_BM: Numbers in [0, 1), float64.

    Example:
        >>> q = torch.tensor([[0.25, 0.0, 0.75]]).log()
        >>> draw_proposals(q, torch.tensor([[0.0, 0.2, 0.3, 0.99]]))
        tensor([[0, 0, 2, 2]])
    """
    cdf_BN = posterior_logp_BN.double().exp().cumsum(dim=1)
    # Below the total, in float64 too: that times a number below 1 is never rounded up to it.
    thresholds_BM = uniforms_BM.double() * cdf_BN[:, -1:]
    return torch.searchsorted(cdf_BN.contiguous(), thresholds_BM.contiguous(), right=True)


def acceptance(current: torch.Tensor, proposed: torch.Tensor) -> torch.Tensor:
    """min(1, w(h) / w(h~)) for log w(h~) `current` and log w(h) `proposed`, of any shape.

    A state of weight 0 is left for any proposal, a proposal of weight 0 is taken from no other
    state.

    Example:
        >>> acceptance(torch.tensor([-900.0, -1.0]), torch.tensor([-901.0, 5.0]))
        tensor([0.3679, 1.0000])
    """
    ratio = torch.where(current == float("-inf"), 0.0, proposed - current)
    return ratio.clamp(max=0.0).exp()


class Chain(NamedTuple):
    """What Metropolis independence sampling went through."""

    states_BM: torch.Tensor
    """The state after each step, int64; -1 before there is one."""
    accepted_BM: torch.Tensor
    """Whether the step's proposal became the state, bool."""
    tested_BM: torch.Tensor
    """Whether it had to be compared with a state before it, bool."""


def independence_chain(
    log_weights_BN: torch.Tensor, proposals_BM: torch.Tensor, uniforms_BM: torch.Tensor
) -> Chain:
    """A chain whose stationary distribution is q(h) w(h), the posterior, for each question.

    All proposals may be drawn at once, as none depends on the state. The first one is taken as the
    state. A proposal of weight NaN, which could not be scored, is passed over as if it had not been
    made: the others are then draws from q on the rest of the domain.

    Edges: one step stays at the first proposal; a domain of one passage is accepted always, and so
    is everything where q is the posterior, as w is then constant. Where no proposal could be scored
    there is no state.

    Args:
        log_weights_BN: log w(h), see `log_weights`.
        proposals_BM: Draws from q, see `draw_proposals`.
        uniforms_BM: Numbers in [0, 1): a proposal is accepted where its probability is above.

    Example:
        >>> weights, proposals = torch.tensor([[0.0, -1.0]]), torch.tensor([[1, 0, 1, 1]])
        >>> chain = independence_chain(weights, proposals, torch.tensor([[0.9, 0.9, 0.9, 0.1]]))
        >>> chain.states_BM, chain.accepted_BM.sum(), chain.tested_BM.sum()
        (tensor([[1, 0, 0, 1]]), tensor(3), tensor(3))
    """
    proposed_BM = log_weights_BN.gather(1, proposals_BM)
    scored_BM = ~proposed_BM.isnan()
    num_questions, num_steps = proposals_BM.shape
    state_B = torch.full((num_questions,), _NO_STATE, device=proposals_BM.device)
    current_B = torch.full_like(proposed_BM[:, 0], float("-inf"))
    states, accepted, tested = [], [], []
    for step in range(num_steps):
        has_state_B = state_B != _NO_STATE
        likely_B = acceptance(current_B, proposed_BM[:, step]) > uniforms_BM[:, step]
        moves_B = scored_BM[:, step] & (likely_B | ~has_state_B)
        state_B = torch.where(moves_B, proposals_BM[:, step], state_B)
        current_B = torch.where(moves_B, proposed_BM[:, step], current_B)
        states.append(torch.where(scored_BM[:, step], state_B, _NO_STATE))
        accepted.append(moves_B)
        tested.append(scored_BM[:, step] & has_state_B)
    return Chain(*(torch.stack(found, dim=1) for found in (states, accepted, tested)))


def visit_frequencies(states_BM: torch.Tensor, num_passages: int) -> torch.Tensor:
    """f(h): the share of the chain's steps in each passage, float64 of shape (B, N).

    Rows sum to 1; a question without any state has zeros. Steps without a state do not count.

    Example:
        >>> visit_frequencies(torch.tensor([[2, 2, 0, 2]]), 3)
        tensor([[0.2500, 0.0000, 0.7500]], dtype=torch.float64)
    """
    counted_BM = (states_BM != _NO_STATE).double()
    visits_BN = counted_BM.new_zeros(len(states_BM), num_passages)
    visits_BN = visits_BN.scatter_add(1, states_BM.clamp(min=0), counted_BM)
    return visits_BN / counted_BM.sum(dim=1, keepdim=True).clamp(min=1)


def posterior_weights(prior_logp_BN: torch.Tensor, answer_logp_BN: torch.Tensor) -> torch.Tensor:
    """The posterior p(h | x, y) on the passages that were scored, float64 of shape (B, N).

    f(h) = p(h | x) p(y | x, h) / sum over the scored passages of the same; 0 for the others. Rows
    sum to 1; a question without a scored passage of positive likelihood has zeros.

    Args:
        prior_logp_BN: log p(h | x); -inf for padding.
        answer_logp_BN: log p(y | x, h) as the target has it, see `likelihood_logp`; NaN where it
            was not asked for or could not be computed.

    Example:
        >>> half = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> posterior_weights(half, torch.tensor([[0.1, 0.6, float("nan")]]).log())
        tensor([[0.2500, 0.7500, 0.0000]], dtype=torch.float64)
    """
    joint_BN = prior_logp_BN.double() + answer_logp_BN.double()
    joint_BN = torch.where(joint_BN.isnan(), float("-inf"), joint_BN)
    defined_B1 = (joint_BN > float("-inf")).any(dim=1, keepdim=True)
    return torch.where(defined_B1, joint_BN, 0.0).softmax(dim=1) * defined_B1


def retriever_loss(
    prior_logp_BN: torch.Tensor, posterior_logp_BN: torch.Tensor, weights_BN: torch.Tensor
) -> torch.Tensor:
    """- sum_h f(h) [ log p(h | x) + log q(h | x, y) ] of each question, shape (B,), in nats.

    f is constant. A passage of weight 0 adds nothing, whatever its probability, and a question
    without weights has loss 0. Its gradient with respect to the scores of either retriever
    is (its distribution - f) / temperature.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]]).log()
        >>> retriever_loss(half, half, torch.tensor([[1.0, 0.0]]))  # 2 log 2
        tensor([1.3863])
    """
    both_BN = (prior_logp_BN + posterior_logp_BN).masked_fill(weights_BN == 0, 0.0)
    return -(weights_BN.to(both_BN.dtype) * both_BN).sum(dim=1)


def kl_divergence(logp_BN: torch.Tensor, other_logp_BN: torch.Tensor) -> torch.Tensor:
    """KL(p || other) = sum_h p (log p - log other) of each question, shape (B,), in nats.

    At least 0 but for rounding; 0 for equal distributions. A passage of probability 0 in p adds
    nothing; one that has probability 0 in the other alone makes it infinite.

    Example:
        >>> kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
        tensor([0.1438])
    """
    gap_BN = (logp_BN - other_logp_BN).masked_fill(logp_BN == float("-inf"), 0.0)
    return (logp_BN.exp() * gap_BN).sum(dim=1)


def proposal_ess(log_weights_BN: torch.Tensor, proposals_BM: torch.Tensor) -> torch.Tensor:
    """(sum_i w_i)^2 / sum_i w_i^2 over each question's proposals, shape (B,): how well q proposes.

    Between 1 and m; m where q is the posterior. 0 where no proposal could be scored or all have
    weight 0.

    Example:
        >>> proposal_ess(torch.tensor([[0.0, -900.0]]), torch.tensor([[0, 1, 1, 0]]))
        tensor([2.])
    """
    weights_BM = log_weights_BN.gather(1, proposals_BM)
    weights_BM = torch.where(weights_BM.isnan(), float("-inf"), weights_BM)
    weights_BM = weights_BM.softmax(dim=1).nan_to_num(nan=0.0)
    square_B = weights_BM.square().sum(dim=1)
    return torch.where(square_B > 0, 1 / square_B, 0.0)
