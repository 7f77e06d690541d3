"""JSA's prior and posterior retrievers, and their updates.

The prior retriever reads the question, the posterior one 'question [SEP] answer'; each has its own
encoder of questions, and both start as the retriever came. Passages keep the vectors of the index.
A question's domain is what either of the two ranks first (JSA-RAG, arXiv 2508.18168).

Questions are treated one by one, so that workers need not exchange vectors: their gradients are
summed, and one worker and many do the same mathematics.

Shape letters: B questions of this worker, N passages of a domain, D vector length, K hits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlrag.algorithms import jsa
from rlrag.config import RunConfig
from rlrag.errors import NonFiniteLossError
from rlrag.records import Question
from rlrag.retrieval.trainable.protocol import TrainableEncoder
from rlrag.retrieval.trainable.query_encoder import StaticIndex, open_query_encoder
from rlrag.training.distributed.workers import Workers
from rlrag.training.learners.gradient_cache import CachedTexts
from rlrag.training.learners.optimiser import Optimiser

_SEPARATOR = " [SEP] "
_PADDING = -1
_ADVICE = "lower algorithm.learning_rate, or raise algorithm.temperature"


@dataclass(frozen=True)
class Domain:
    """The passages that may be proposed for a batch's questions, under both retrievers.

    Log-probabilities are float64 with the gradient of the vectors in `leaves`.
    """

    rows_BN: np.ndarray
    """Rows of the corpus, ascending; -1 is padding."""
    prior_logp_BN: torch.Tensor
    """log p(h | x); -inf for padding."""
    posterior_logp_BN: torch.Tensor
    """log q(h | x, y); -inf for padding."""
    texts: tuple[CachedTexts, CachedTexts]
    leaves: tuple[torch.Tensor, torch.Tensor]


class JSARetrievers:
    """The prior and the posterior retriever, and the optimiser of both.

    Args:
        config: The whole run.
        index: Vectors of all passages.
        num_passages: How many there are.
        num_steps: Steps of the whole run, for the learning rate.
        workers: Whom a batch is shared with.
    """

    def __init__(
        self,
        config: RunConfig,
        index: StaticIndex,
        num_passages: int,
        num_steps: int,
        workers: Workers,
    ) -> None:
        self._jsa = config.jsa
        self._index = index
        self._num_passages = num_passages
        self._workers = workers
        self.prior = open_query_encoder(config.retrieval, config.cache_path)
        self.posterior = open_query_encoder(config.retrieval, config.cache_path)
        parameters = {
            f"{name}.{parameter_name}": parameter
            for name, encoder in (("prior", self.prior), ("posterior", self.posterior))
            for parameter_name, parameter in encoder.named_parameters()
        }
        self.optimiser = Optimiser(
            parameters,
            config.jsa.learning_rate,
            config.training.warmup_steps,
            num_steps,
            workers,
            _ADVICE,
            name="the retrievers' gradient",
            fused=True,
            weight_decay=config.jsa.weight_decay,
            max_grad_norm=config.jsa.max_grad_norm,
        )

    def search(self, questions: Sequence[str], k: int) -> np.ndarray:
        """Rows of the passages that the prior ranks first, shape (B, K)."""
        size = self._jsa.micro_batch_texts
        parts = [
            self._search(self._vectors(questions[start : start + size]), k)
            for start in range(0, len(questions), size)
        ]
        return np.concatenate([np.zeros((0, min(k, self._num_passages)), np.int64), *parts])

    def domain(self, questions: Sequence[Question]) -> Domain:
        """What may be proposed for these questions, with the present weights."""
        asked = [question.question for question in questions]
        answered = [
            question.question + _SEPARATOR + target_answer(question) for question in questions
        ]
        prior, prior_BD = self._embedded(self.prior, asked)
        posterior, posterior_BD = self._embedded(self.posterior, answered)
        by_prior_BK = self._search(prior_BD, self._jsa.num_prior)
        by_posterior_BK = self._search(posterior_BD, self._jsa.num_posterior)
        unions = [np.union1d(*found) for found in zip(by_prior_BK, by_posterior_BK, strict=True)]
        rows_BN = np.full((len(unions), max(map(len, unions), default=0)), _PADDING)
        prior_scores, posterior_scores = [], []
        for place, rows_N in enumerate(unions):
            rows_BN[place, : len(rows_N)] = rows_N
            passages_ND = torch.from_numpy(self._index.vectors(rows_N)).to(prior_BD)
            prior_scores.append(passages_ND @ prior_BD[place])
            posterior_scores.append(passages_ND @ posterior_BD[place])
        return Domain(
            rows_BN,
            self._logp(prior_scores),
            self._logp(posterior_scores),
            (prior, posterior),
            (prior_BD, posterior_BD),
        )

    def update(
        self, domain: Domain, weights_BN: torch.Tensor, num_questions: int, step: int
    ) -> dict[str, float]:
        """One optimiser step of both on - sum f(h) [log p(h|x) + log q(h|x,y)] / num_questions.

        Args:
            domain: This worker's share of the batch.
            weights_BN: The weight f(h) of each passage.
            num_questions: Questions of the whole batch, over all workers.
            step: Number of this step, from 0.

        Returns:
            Metrics over the whole batch, before the step, named `retriever/...`.

        Raises:
            NonFiniteLossError: when the loss or the gradient is not finite; nothing was changed.
        """
        loss_B = jsa.retriever_loss(
            domain.prior_logp_BN, domain.posterior_logp_BN, weights_BN.to(domain.prior_logp_BN)
        )
        loss = loss_B.sum() / num_questions
        total = self._workers.sum(loss.detach()).item()
        if not math.isfinite(total):
            raise NonFiniteLossError(f"the retrievers' loss of step {step} is {total}; {_ADVICE}")
        self.optimiser.zero_grad()
        for texts, gradient_BD in zip(
            domain.texts, torch.autograd.grad(loss, domain.leaves), strict=True
        ):
            texts.backward({"question": gradient_BD})
        norm, rate = self.optimiser.step(step)
        return {
            "retriever/loss": total,
            "retriever/grad_norm": norm,
            "retriever/learning_rate": rate,
        }

    def _embedded(
        self, encoder: TrainableEncoder, texts: Sequence[str]
    ) -> tuple[CachedTexts, torch.Tensor]:
        cached = CachedTexts(encoder, {"question": texts}, self._jsa.micro_batch_texts)
        return cached, cached.embedded["question"].vectors_BD.requires_grad_()

    def _vectors(self, questions: Sequence[str]) -> torch.Tensor:
        with torch.no_grad():
            return self.prior.embed(questions, "question").vectors_BD

    def _search(self, vectors_BD: torch.Tensor, k: int) -> np.ndarray:
        vectors = vectors_BD.detach().float().cpu().numpy()
        return self._index.search_vectors(vectors, min(k, self._num_passages)).rows_BK

    def _logp(self, scores: Sequence[torch.Tensor]) -> torch.Tensor:
        scores_BN = nn.utils.rnn.pad_sequence(
            list(scores), batch_first=True, padding_value=-math.inf
        )
        return jsa.domain_logp(scores_BN.double(), self._jsa.temperature)


def target_answer(question: Question) -> str:
    """The golden answer y that a question is trained on: the first that has a text.

    Of a closed-set question it is the first that is among its choices.
    """
    answers = [text for text in question.golden_answers if text.strip()]
    choices = question.metadata.get("choices", answers)
    return next((text for text in answers if text in choices), answers[0])
