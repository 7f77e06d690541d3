"""The retriever's optimiser step on contrastive and distillation losses.

The loss of a batch compares every question with every passage of the batch, so that neither the
batch's texts nor its workers can be treated one by one. Vectors are computed in pieces that fit
memory and gathered over the workers; the loss and its gradient with respect to the vectors are
computed on all of them; each worker feeds the gradient of its own vectors back to the weights,
piece by piece (gradient caching, Gao et al., 2021, arXiv 2101.06983). The result is that of one
worker that embeds everything at once.

Shape letters: N questions of the whole batch, P passages, D vector length, W workers; B questions
of this worker. A leading 3 stands for questions, positives, negatives.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlrag.algorithms.contrastive import likelihood_distillation, openrag_loss, vdr_loss
from rlrag.config import OpenRAGConfig, TrainingConfig
from rlrag.errors import ConfigError, DataError, NonFiniteLossError
from rlrag.retrieval.trainable.protocol import Embedded, Role, TrainableEncoder
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.training.distributed.workers import Workers
from rlrag.training.learners.gradient_cache import CachedTexts
from rlrag.training.learners.optimiser import Optimiser

_ADVICE = "lower algorithm.learning_rate, or raise algorithm.temperature"


class RetrieverLearner:
    """Takes one step on a retriever's encoder for each batch of questions with passages.

    Every worker sees its share of the batch; shares may differ in size and may be empty. Losses
    are means over the questions of the whole batch, which all workers compare with the passages of
    all workers: one worker and many do the same mathematics.

    Args:
        encoder: What is trained.
        config: Learning rate and limits.
        openrag: Temperatures and the number of texts that are embedded at once.
        num_steps: Steps of the whole run, for the learning rate.
        workers: Whom the batch is shared with.
    """

    def __init__(
        self,
        encoder: TrainableEncoder,
        config: TrainingConfig,
        openrag: OpenRAGConfig,
        num_steps: int,
        workers: Workers,
    ) -> None:
        self._encoder = encoder
        self._whole = _WholeVectors.of(encoder) if openrag.vectors == "one_whole" else None
        self._openrag = openrag
        self._workers = workers
        self.optimiser = Optimiser(
            dict(encoder.named_parameters()),
            openrag.learning_rate,
            config.warmup_steps,
            num_steps,
            workers,
            _ADVICE,
            name="the retriever's gradient",
            fused=True,
            weight_decay=openrag.weight_decay,
            max_grad_norm=openrag.max_grad_norm,
        )

    def update(
        self,
        questions: Sequence[str],
        positives: Sequence[str],
        negatives: Sequence[str],
        step: int,
    ) -> dict[str, float]:
        """One optimiser step on the contrastive loss L_para + L_semi.

        Where `algorithm.vectors` is `one_whole` that is `vdr_loss`, else `openrag_loss`.

        Each question is compared with the positives of all questions and then with the negatives
        of all. A passage whose text is that of a positive of the question is no negative of it: it
        is left out of the question's sum, and the question out of the passage's. Positives of a
        question are all that stand in the batch beside its text.

        Args:
            questions: This worker's share of the batch.
            positives: A passage for each that is right for it.
            negatives: A passage for each that is not.
            step: Number of this step, from 0.

        Returns:
            Metrics over the whole batch, before the step, named `retriever/...`. `accuracy` is the
            share of questions whose positive scores above every other passage, and `score_gap` the
            mean of f(q, d+) - f(q, d-) for their own negative, as inner products of vectors.

        Raises:
            DataError: when the arguments differ in length, or no worker has a question.
            NonFiniteLossError: when the loss or the gradient is not finite; nothing was changed.
        """
        if not len(questions) == len(positives) == len(negatives):
            raise DataError(
                f"{len(questions)} questions have {len(positives)} positives and {len(negatives)} "
                "negatives; give each question one of each"
            )
        texts = CachedTexts(
            self._whole or self._encoder,
            {"question": questions, "passage": [*positives, *negatives]},
            self._openrag.micro_batch_texts,
        )
        share = self._share(len(questions), texts)
        all_3ND, bags_3ND = self._gather_embedded(texts, share)
        keys = [[_key(text) for text in each] for each in (questions, positives, negatives)]
        keys_3N = self._gather(torch.tensor(keys, dtype=torch.int64), share)
        excluded_NP = _false_negatives(keys_3N).to(all_3ND.device)
        all_3ND.requires_grad_()
        sides, searched_3ND = _sides(all_3ND, bags_3ND), all_3ND.detach()
        if self._whole is None:
            loss = openrag_loss(*sides, self._openrag.temperature, excluded_NP).mean()
        else:
            kept_ND, kept_PD = (self._whole.kept(side) for side in sides)
            temperature = self._openrag.temperature
            loss = vdr_loss(*sides, kept_ND, kept_PD, temperature, excluded_NP).mean()
            kept_3ND = torch.cat([kept_ND, kept_PD]).unflatten(0, (3, -1))
            searched_3ND = searched_3ND.masked_fill(~kept_3ND, 0.0)
        self._check_finite(loss.item(), step)
        (gradient_3ND,) = torch.autograd.grad(loss, all_3ND)
        metrics = {"retriever/loss": loss.item()}
        metrics |= _ranking_metrics(searched_3ND, excluded_NP)
        own_3BD = gradient_3ND[:, share.start : share.stop]
        gradients: dict[Role, torch.Tensor] = {
            "question": own_3BD[0],
            "passage": own_3BD[1:].flatten(0, 1),
        }
        return metrics | self._step(texts, gradients, step)

    def update_kl(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[str]],
        answer_logp_BN: np.ndarray | torch.Tensor,
        step: int,
    ) -> dict[str, float]:
        """One optimiser step on the divergence between the generator's view and the retriever's.

        See `likelihood_distillation`. Questions are compared with their own passages alone, by the
        inner products of vectors; bags of tokens play no part.

        Args:
            questions: This worker's share of the batch.
            passages: The passages of each; a question may have fewer than another.
            answer_logp_BN: log p(y | x, d) of each, in nats. What stands behind a question's last
                passage is ignored; NaN marks a passage that could not be scored.
            step: Number of this step, from 0.

        Returns:
            Metrics over the whole batch, before the step, named `retriever/...`. `accuracy` is the
            share of questions whose highest-scored passage is the generator's likeliest.

        Raises:
            DataError: when the arguments do not fit, or no worker has a question.
            NonFiniteLossError: when the loss or the gradient is not finite; nothing was changed.
        """
        answer_logp_BN = torch.as_tensor(answer_logp_BN)
        counts = [len(each) for each in passages]
        shape = (len(questions), max(counts, default=answer_logp_BN.shape[-1]))
        if len(counts) != len(questions) or 0 in counts or answer_logp_BN.shape != shape:
            raise DataError(
                f"{len(questions)} questions have {counts} passages and likelihoods of shape "
                f"{tuple(answer_logp_BN.shape)}; give each question at least one passage, and "
                "each passage a likelihood"
            )
        texts = CachedTexts(
            self._encoder,
            {"question": questions, "passage": [text for each in passages for text in each]},
            self._openrag.micro_batch_texts,
        )
        share = self._share(len(questions), texts)
        loss, hits, gradients = self._distil(texts, counts, answer_logp_BN, share.total)
        loss, hits = self._workers.sum(torch.tensor([loss, hits], dtype=torch.float64)).tolist()
        self._check_finite(loss, step)
        metrics = {"retriever/loss": loss, "retriever/accuracy": hits / share.total}
        return metrics | self._step(texts, gradients, step)

    def _distil(
        self,
        texts: CachedTexts,
        counts: Sequence[int],
        answer_logp_BN: torch.Tensor,
        num_questions: int,
    ) -> tuple[float, float, dict[Role, torch.Tensor]]:
        """This worker's share of the loss, its hits, and the gradients of its vectors."""
        if not counts:
            return 0.0, 0.0, {}
        question_BD = texts.embedded["question"].vectors_BD.requires_grad_()
        passage_PD = texts.embedded["passage"].vectors_BD.requires_grad_()
        passages = passage_PD.split(list(counts))
        scores = [
            own_ND @ question_D for question_D, own_ND in zip(question_BD, passages, strict=True)
        ]
        scores_BN = nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=-math.inf)
        answer_logp_BN = answer_logp_BN.to(scores_BN)
        openrag = self._openrag
        loss_B = likelihood_distillation(
            scores_BN, answer_logp_BN, openrag.temperature, openrag.likelihood_temperature
        )
        loss = loss_B.sum() / num_questions
        gradients = torch.autograd.grad(loss, [question_BD, passage_PD])
        unknown_BN = (scores_BN == -math.inf) | answer_logp_BN.isnan()
        first_B = scores_BN.masked_fill(unknown_BN, -math.inf).argmax(dim=1)
        likeliest_B = answer_logp_BN.masked_fill(unknown_BN, -math.inf).argmax(dim=1)
        hits = (first_B == likeliest_B).sum().item()
        return loss.item(), hits, {"question": gradients[0], "passage": gradients[1]}

    def _share(self, num: int, texts: CachedTexts) -> _Share:
        """Where this worker's questions stand in the whole batch, and what vectors look like."""
        found_W3 = torch.zeros(self._workers.size, 3, dtype=torch.int64)
        found_W3[self._workers.rank] = torch.tensor([num, texts.vector_size, texts.has_bags])
        counts, sizes, bags = self._workers.sum(found_W3).T.tolist()
        if not sum(counts):
            raise DataError(
                "a batch has no questions; skip it, or check why all questions were dropped"
            )
        start = sum(counts[: self._workers.rank])
        return _Share(start, start + num, sum(counts), max(sizes), any(bags))

    def _gather_embedded(
        self, texts: CachedTexts, share: _Share
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors and bags of questions, positives and negatives of all workers, (3, N, D)."""
        if texts.embedded:
            both = [texts.embedded[role] for role in ("question", "passage")]
            vectors_3BD = torch.cat([each.vectors_BD for each in both]).unflatten(0, (3, -1))
            bags = [each.bags_BD.to(vectors_3BD) for each in both if each.bags_BD is not None]
        else:  # nothing of its own, yet the others' sums need its zeros
            weight = next(iter(self.optimiser.parameters.values()))
            vectors_3BD, bags = weight.new_zeros(3, 0, share.vector_size), []
        all_3ND = self._gather(vectors_3BD, share)
        if not share.has_bags:
            return all_3ND, None
        bags_3BD = torch.cat(bags).unflatten(0, (3, -1)) if bags else vectors_3BD
        return all_3ND, self._gather(bags_3BD, share)

    def _gather(self, own_3B: torch.Tensor, share: _Share) -> torch.Tensor:
        """Each worker's columns side by side, in the order of the workers."""
        if self._workers.size == 1:
            return own_3B
        all_3N = own_3B.new_zeros(3, share.total, *own_3B.shape[2:])
        all_3N[:, share.start : share.stop] = own_3B
        return self._workers.sum(all_3N)

    def _step(
        self, texts: CachedTexts, gradients: Mapping[Role, torch.Tensor], step: int
    ) -> dict[str, float]:
        """Feed the vectors' gradients back and step; returns norm and rate."""
        self.optimiser.zero_grad()
        texts.backward(gradients)
        norm, rate = self.optimiser.step(step)
        return {"retriever/grad_norm": norm, "retriever/learning_rate": rate}

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the retriever's loss of step {step} is {loss}; {_ADVICE}")


@dataclass(frozen=True, slots=True)
class _WholeVectors:
    """An encoder into vocabulary space that drops no entries."""

    encoder: VocabularyEncoder

    @classmethod
    def of(cls, encoder: TrainableEncoder) -> _WholeVectors:
        if not isinstance(encoder, VocabularyEncoder):
            raise ConfigError(
                "algorithm.vectors 'one_whole' is for retrieval.kind 'semi_parametric'; a dense "
                "encoder always uses whole vectors"
            )
        return cls(encoder)

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        """Vectors before entries are dropped, with gradient."""
        return self.encoder.embed_whole(texts, role)

    def kept(self, side: Embedded) -> torch.Tensor:
        """Which entries a search keeps."""
        assert side.bags_BD is not None  # an encoder into vocabulary space gives them
        return self.encoder.kept(side.vectors_BD.detach(), side.bags_BD)


@dataclass(frozen=True, slots=True)
class _Share:
    """This worker's columns `start` to `stop` of `total`, and what all workers' vectors are."""

    start: int
    stop: int
    total: int
    vector_size: int
    has_bags: bool


def _sides(all_3ND: torch.Tensor, bags_3ND: torch.Tensor | None) -> tuple[Embedded, Embedded]:
    """Questions, and passages: the positives of all workers, then the negatives of all."""
    bags = (None, None) if bags_3ND is None else (bags_3ND[0], bags_3ND[1:].flatten(0, 1))
    return Embedded(all_3ND[0], bags[0]), Embedded(all_3ND[1:].flatten(0, 1), bags[1])


def _key(text: str) -> int:
    """64 bits of a hash: equal texts of all workers are found by it."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _false_negatives(keys_3N: torch.Tensor) -> torch.Tensor:
    """Which passages are a positive of which question, bool of shape (N, 2 N)."""
    question_N, positive_N, _ = keys_3N
    same_question_NN = question_N[:, None] == question_N
    same_passage_NP = positive_N[:, None] == keys_3N[1:].flatten()
    return (same_question_NN.float() @ same_passage_NP.float()) > 0


def _ranking_metrics(all_3ND: torch.Tensor, positive_NP: torch.Tensor) -> dict[str, float]:
    """How the vectors rank the passages of the batch; `positive_NP` has each question's own."""
    question_ND, _, negative_ND = all_3ND
    scores_NP = question_ND @ all_3ND[1:].flatten(0, 1).T
    positive_N = scores_NP.diagonal()
    other_N = scores_NP.masked_fill(positive_NP, -math.inf).amax(dim=1)
    gap_N = positive_N - (question_ND * negative_ND).sum(dim=1)
    return {
        "retriever/accuracy": (positive_N > other_N).double().mean().item(),
        "retriever/score_gap": gap_N.double().mean().item(),
    }
