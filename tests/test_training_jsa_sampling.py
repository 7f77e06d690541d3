"""Weights and metrics of proposed passages, by hand on domains of three passages and of two."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stand_ins import WordPrompts

from rlrag.algorithms import jsa
from rlrag.config import JSAConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import GenerationError, RewardError
from rlrag.records import Passage, Question
from rlrag.training.jsa.retrievers import Domain
from rlrag.training.jsa.sampling import PosteriorSampler
from rlrag.training.openrag.passage_judge import Judgement

NUM_STEPS = 64  # so many that each passage of a domain is proposed
SEEDS = ((0, 1), (0, 2))
CORPUS = MemoryCorpus([Passage(f"p{n}", "", f"text {n}") for n in range(5)])
QUESTIONS = (
    Question("q0", "which?", ("ab", "c")),
    Question("q1", "what?", ("no", "yes"), {"choices": ["yes", "or"]}),
)
PRIOR = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]], dtype=torch.float64)
PROPOSAL = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]], dtype=torch.float64)
LIKELIHOOD = torch.tensor([[0.4, 0.1, 0.2], [0.5, 0.2, math.nan]], dtype=torch.float64)
PASSAGES = (("p4", "p1", "p2"), ("p3", "p0"))
KNOWN = {
    (f"q{q}", passage): LIKELIHOOD[q, n].log().item()
    for q, passages in enumerate(PASSAGES)
    for n, passage in enumerate(passages)
}


class Judge:
    """Knows the likelihoods above, but of `failing` passages; keeps what it was asked."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, tuple[str, ...]] = {}

    def __call__(self, questions, passages, with_labels):
        assert not with_labels, "a label costs an answer"
        self.asked += [(q.id, p.id) for q, p in zip(questions, passages, strict=True)]
        self.answers |= {q.id: q.golden_answers for q in questions}
        return [
            RewardError(f"{passage.id} is lost")
            if passage.id in self.failing
            else Judgement(KNOWN[question.id, passage.id], None)
            for question, passage in zip(questions, passages, strict=True)
        ]


def domain() -> Domain:
    rows_BN = np.array([[4, 1, 2], [3, 0, -1]])
    return Domain(rows_BN, PRIOR.log(), PROPOSAL.log(), texts=(), leaves=())


def sample(judge: Judge, max_failed_share: float = 0.0, **settings):
    config = JSAConfig(**{"mis_steps": NUM_STEPS} | settings)
    sampler = PosteriorSampler(CORPUS, judge, WordPrompts(), config, max_failed_share)
    return sampler.sample(QUESTIONS, domain(), SEEDS)


def posterior(*powers: float) -> torch.Tensor:
    """p(h | x) p(y | x, h)^power of each question, normalised."""
    powers_B1 = torch.tensor(powers)[:, None]
    joint_BN = PRIOR * LIKELIHOOD.nan_to_num() ** powers_B1
    return joint_BN / joint_BN.sum(dim=1, keepdim=True)


def mean_logp(weights_BN: torch.Tensor) -> float:
    """Of the answers under the weights, summed over the questions."""
    return (weights_BN * LIKELIHOOD.log().nan_to_num()).sum().item()


def chains_of(*powers: float) -> tuple[list[jsa.Chain], float]:
    """The chain of each question, and the effective sample sizes of their proposals, summed.

    Of a question's random numbers the first row draws proposals, the second accepts them.
    """
    ratios_BN = PRIOR * LIKELIHOOD ** torch.tensor(powers)[:, None] / PROPOSAL
    chains, ess = [], 0.0
    for q_N, ratios_N, seed in zip(PROPOSAL, ratios_BN, SEEDS, strict=True):
        drawing, accepting = np.random.default_rng(seed).random((2, NUM_STEPS))
        drawn = torch.from_numpy(np.searchsorted(q_N.cumsum(0).numpy(), drawing, side="right"))
        ess += (ratios_N[drawn].sum() ** 2 / ratios_N[drawn].square().sum()).item()
        log_N = ratios_N.log()[None]
        chains.append(jsa.independence_chain(log_N, drawn[None], torch.from_numpy(accepting)[None]))
    return chains, ess


def test_weights_are_the_posterior_and_metrics_describe_both_retrievers():
    judge = Judge()
    found = sample(judge)
    assert torch.allclose(found.weights_BN, posterior(1.0, 1.0), atol=1e-12)
    assert sorted(judge.asked) == sorted(KNOWN)
    chains, ess = chains_of(1.0, 1.0)
    assert found.sums == pytest.approx(
        {
            "num_accepted": sum(chain.accepted_BM[:, 1:].sum().item() for chain in chains),
            "num_tested": 2 * (NUM_STEPS - 1),
            "num_weighed": 2,
            "num_visited": sum(len(chain.states_BM.unique()) for chain in chains),
            "ess": ess,
            "kl": torch.special.xlogy(PROPOSAL, (PROPOSAL / PRIOR).nan_to_num()).sum().item(),
            "answer_logp": mean_logp(posterior(1.0, 1.0)),
            "num_domain": 5,
            "num_scored": 5,
            "num_failed": 0,
        }
    )
    visits_BN = torch.cat([jsa.visit_frequencies(chain.states_BM, 3) for chain in chains])
    assert torch.equal(sample(Judge(), weights="visits").weights_BN, visits_BN)


def test_only_what_was_proposed_is_scored():
    judge = Judge()
    found = sample(judge, mis_steps=1)
    assert len(judge.asked) == 2
    assert found.weights_BN.sum(dim=1).tolist() == found.weights_BN.amax(dim=1).tolist() == [1, 1]
    assert (found.sums["num_scored"], found.sums["num_domain"]) == (2, 5)


@pytest.mark.parametrize(
    ("settings", "powers", "answers"),
    [
        ({}, (1.0, 1.0), {"q0": ("ab",), "q1": ("yes",)}),
        ({"answer": "likeliest"}, (1.0, 1.0), {"q0": ("ab", "c"), "q1": ("no", "yes")}),
        ({"likelihood_temperature": 4.0}, (0.25, 0.25), {"q0": ("ab",), "q1": ("yes",)}),
        # The answer has two tokens, and of a choice the first is scored.
        ({"likelihood": "mean"}, (0.5, 1.0), {"q0": ("ab",), "q1": ("yes",)}),
    ],
)
def test_the_configuration_says_whose_likelihood_counts_and_how(settings, powers, answers):
    """The metric of the answer stays the log-likelihood of the whole one."""
    judge = Judge()
    found = sample(judge, **settings)
    assert judge.answers == answers
    assert torch.allclose(found.weights_BN, posterior(*powers), atol=1e-12)
    assert found.sums["answer_logp"] == pytest.approx(mean_logp(posterior(*powers)))
    assert found.sums["ess"] == pytest.approx(chains_of(*powers)[1])


def test_an_answer_of_one_token_has_the_same_likelihood_under_both():
    one_token = replace(QUESTIONS[0], golden_answers=("a",))
    for likelihood in ("product", "mean"):
        config = JSAConfig(mis_steps=NUM_STEPS, likelihood=likelihood)
        sampler = PosteriorSampler(CORPUS, Judge(), WordPrompts(), config, 0.0)
        found = sampler.sample([one_token, QUESTIONS[1]], domain(), SEEDS)
        assert torch.allclose(found.weights_BN, posterior(1.0, 1.0), atol=1e-12)


def test_what_could_not_be_scored_is_left_out_named_and_bounded():
    lost = ("p1", "p3", "p0")
    found = sample(Judge(*lost), max_failed_share=0.6)
    assert found.weights_BN[0].tolist() == pytest.approx([0.2 / 0.24, 0.0, 0.04 / 0.24])
    assert found.weights_BN[1].tolist() == [0.0] * 3
    assert found.failures == ["p0 is lost", "p1 is lost", "p3 is lost"]
    assert (found.sums["num_failed"], found.sums["num_weighed"]) == (3, 1)
    with pytest.raises(GenerationError, match=r"3 of 5 passages .* 0\.59 allows; the first: p1"):
        sample(Judge(*lost), max_failed_share=0.59)
