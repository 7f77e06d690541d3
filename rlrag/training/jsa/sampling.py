"""JSA's E-step: proposes passages from the posterior retriever, scores and weights them.

All proposals are drawn at once from the posterior retriever, and the generator scores each
different one, a single passage in context. The weights are the posterior on what was scored, or how
often a Metropolis chain on the proposals visits each (JSA-RAG, arXiv 2508.18168;
`rlrag.algorithms.jsa`). The chain asks for nothing more, and runs for both: it tells how well the
proposals fit the posterior. Chains begin anew with every step.

Shape letters: B questions, N passages of a domain, M steps of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from rlrag.algorithms import jsa
from rlrag.config import JSAConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import GenerationError, RlragError
from rlrag.generation.prompts import PromptBuilder
from rlrag.records import Question
from rlrag.training.jsa.retrievers import Domain, target_answer
from rlrag.training.openrag.passage_judge import PassageJudge


@dataclass(frozen=True)
class WeighedPassages:
    """The posterior of a batch's questions, as far as their passages were scored."""

    weights_BN: torch.Tensor
    """f(h), float64; rows sum to 1, or to 0 where nothing could be scored."""
    sums: dict[str, float]
    """Numbers that describe weights and chains, summed over the questions."""
    failures: list[str]
    """Why passages could not be scored."""


class PosteriorSampler:
    """Estimates the posterior p(h | x, y) of questions from proposed passages.

    Args:
        corpus: Where the rows of a domain are looked up.
        judge: Scores an answer behind a passage.
        prompts: Says how many tokens an answer has.
        config: Number of proposals, their target and their weights.
        max_failed_share: A batch ends with an error when more of its passages fail.
    """

    def __init__(
        self,
        corpus: Corpus,
        judge: PassageJudge,
        prompts: PromptBuilder,
        config: JSAConfig,
        max_failed_share: float,
    ) -> None:
        self._corpus = corpus
        self._judge = judge
        self._prompts = prompts
        self._config = config
        self._max_failed_share = max_failed_share

    def sample(
        self, questions: Sequence[Question], domain: Domain, seeds: Sequence[Sequence[int]]
    ) -> WeighedPassages:
        """Propose, score and weigh passages of each question.

        Raises:
            GenerationError: when more passages cannot be scored than is allowed.
        """
        prior_BN = domain.prior_logp_BN.detach().cpu()
        posterior_BN = domain.posterior_logp_BN.detach().cpu()
        shape = (2, self._config.mis_steps)
        drawn = [np.random.default_rng(seed).random(shape) for seed in seeds]
        uniforms_B2M = torch.from_numpy(np.array(drawn).reshape(-1, *shape))
        proposals_BM = jsa.draw_proposals(posterior_BN, uniforms_B2M[:, 0])
        answer_logp_BN, num_scored, failed = self._score(questions, domain, proposals_BM)
        target_BN = self._target(questions, answer_logp_BN)
        ratios_BN = jsa.log_weights(prior_BN, target_BN, posterior_BN)
        chain = jsa.independence_chain(ratios_BN, proposals_BM, uniforms_B2M[:, 1])
        visits_BN = jsa.visit_frequencies(chain.states_BM, prior_BN.shape[1])
        if self._config.weights == "visits":
            weights_BN = visits_BN
        else:
            weights_BN = jsa.posterior_weights(prior_BN, target_BN)
        answer_logp = (weights_BN * answer_logp_BN.masked_fill(weights_BN == 0, 0.0)).sum()
        sums = {
            "num_accepted": (chain.accepted_BM & chain.tested_BM).sum().item(),
            "num_tested": chain.tested_BM.sum().item(),
            "num_weighed": (weights_BN > 0).any(dim=1).sum().item(),
            "num_visited": (visits_BN > 0).sum().item(),
            "ess": jsa.proposal_ess(ratios_BN, proposals_BM).sum().item(),
            "kl": jsa.kl_divergence(posterior_BN, prior_BN).sum().item(),
            "answer_logp": answer_logp.item(),
            "num_domain": (domain.rows_BN >= 0).sum().item(),
            "num_scored": num_scored,
            "num_failed": len(failed),
        }
        return WeighedPassages(
            weights_BN,
            {name: float(value) for name, value in sums.items()},
            sorted({str(error) for error in failed}),
        )

    def _score(
        self, questions: Sequence[Question], domain: Domain, proposals_BM: torch.Tensor
    ) -> tuple[torch.Tensor, int, list[RlragError]]:
        """Scores log p(y | x, h) of what was proposed, NaN elsewhere; number asked; failures."""
        proposed_BN = np.zeros(domain.rows_BN.shape, dtype=bool)
        np.put_along_axis(proposed_BN, proposals_BM.numpy(), True, axis=1)
        places = np.argwhere(proposed_BN).tolist()
        targets = [self._asked(question) for question in questions]
        judgements = self._judge(
            [targets[question] for question, _ in places],
            [self._corpus[int(domain.rows_BN[question, n])] for question, n in places],
            with_labels=False,
        )
        answer_logp_BN = torch.full(domain.rows_BN.shape, float("nan"), dtype=torch.float64)
        failed: list[RlragError] = []
        for (question, n), judgement in zip(places, judgements, strict=True):
            if isinstance(judgement, RlragError):
                failed.append(judgement)
            else:
                answer_logp_BN[question, n] = judgement.logp
        if len(failed) > self._max_failed_share * len(places):
            raise GenerationError(
                f"{len(failed)} of {len(places)} passages could not be scored, more than "
                f"training.max_failed_share {self._max_failed_share} allows; the first: {failed[0]}"
            )
        return answer_logp_BN, len(places), failed

    def _target(self, questions: Sequence[Question], answer_logp_BN: torch.Tensor) -> torch.Tensor:
        num_tokens = [
            1 if "choices" in question.metadata else self._num_tokens(question)
            for question in questions
        ]
        return jsa.likelihood_logp(
            answer_logp_BN,
            torch.tensor(num_tokens, dtype=torch.float64),
            self._config.likelihood,
            self._config.likelihood_temperature,
        )

    def _num_tokens(self, question: Question) -> int:
        return len(self._prompts.encode_answer(target_answer(question)))

    def _asked(self, question: Question) -> Question:
        """The question with the answers whose likelihood counts."""
        if self._config.answer == "likeliest":
            return question
        return replace(question, golden_answers=(target_answer(question),))
