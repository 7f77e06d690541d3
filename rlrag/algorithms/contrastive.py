"""Contrastive losses for training a retriever (OpenRAG).

f(q, d) is the inner product of a question's and a passage's vector, divided by a temperature. The
batch B holds N questions, their N positives d+ in the same order, and further passages, which are
negatives. OpenRAG (arXiv 2503.08398, section 3.4) asks each question for its positive among all
passages, and each positive for its question among all questions:

    L(q_i, d) = - log( e^f(q_i, d_i+) / sum_{d in B} e^f(q_i, d) )
                - log( e^f(q_i, d_i+) / sum_{q in B} e^f(q, d_i+) )

Departures from the papers:

- A temperature, which OpenRAG has not; 1 is its form. Vectors of length 1 have inner products in
  [-1, 1], which a softmax at temperature 1 cannot tell apart.
- The loss is left for the caller to average over the questions; the paper sums it.
- The semi-parametric loss compares sparse vectors, as a search does. VDR's code, on which OpenRAG
  builds, keeps one side of each term whole: `vdr_loss`.
- False negatives may be left out of the sums; see `symmetric_info_nce`.
- `likelihood_distillation` has the other direction of the divergence than RePlug, and distils
  log-likelihoods; see there.

Shape letters: N questions with a positive each, P passages, D vector length; for the distillation B
questions with N passages each.
"""

from __future__ import annotations

import torch

from rlrag.errors import DataError
from rlrag.retrieval.trainable.protocol import Embedded


def symmetric_info_nce(
    question_ND: torch.Tensor,
    passage_PD: torch.Tensor,
    temperature: float,
    excluded_NP: torch.Tensor | None = None,
) -> torch.Tensor:
    """L(q_i, d) of each question, shape (N,), in nats; at least 0.

    The first N passages are the questions' positives, in their order.

    `excluded_NP` marks false negatives: passages that are right for a question although they stand
    in the batch for another one, or as its negative. A marked pair counts in neither sum, which is
    as if the passage were not in the batch when the question looks for its own, nor the question
    when the passage does. What is true of the pair holds in both directions, so one mask serves
    both. A question's own positive is never left out: marks on the diagonal are ignored.

    Edges: a single question without further passages has loss 0; equal vectors have
    log(P) + log(N). Vectors that are not finite make the losses of the batch so too.

    Example:
        >>> questions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> passages = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> symmetric_info_nce(questions, passages, temperature=1.0)  # log(1 + 2/e) + log(1 + 1/e)
        tensor([0.8647, 0.8647])
    """
    num_questions = len(question_ND)
    logits_NP = question_ND @ passage_PD.T / temperature
    positive_N = logits_NP.diagonal()
    if excluded_NP is not None:
        own_NP = torch.eye(*logits_NP.shape, dtype=torch.bool, device=logits_NP.device)
        logits_NP = logits_NP.masked_fill(excluded_NP & ~own_NP, float("-inf"))
    over_passages_N = logits_NP.logsumexp(dim=1) - positive_N
    over_questions_N = logits_NP[:, :num_questions].logsumexp(dim=0) - positive_N
    return over_passages_N + over_questions_N


def openrag_loss(
    questions: Embedded,
    passages: Embedded,
    temperature: float,
    excluded_NP: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_final = L_para + L_semi of each question, shape (N,), in nats.

    - L_para = L(V(q), V(d)), between two vectors of the encoder.
    - L_semi = 1/2 L(V(q), BoT(d)) + 1/2 L(BoT(q), V(d)), between a vector and a bag of tokens, so
      that the index of bags keeps finding what the encoder means.

    L_para alone unless both sides have bags. Passages and `excluded_NP` as in `symmetric_info_nce`.

    Example:
        >>> vector, bag = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> passages = Embedded(torch.eye(2), torch.eye(2))
        >>> openrag_loss(Embedded(vector), passages, 1.0)  # log(1 + 1/e)
        tensor([0.3133])
        >>> openrag_loss(Embedded(vector, bag), passages, 1.0)  # + (log(1 + 1/e) + log(1 + e)) / 2
        tensor([1.1265])
    """
    loss_N = symmetric_info_nce(questions.vectors_BD, passages.vectors_BD, temperature, excluded_NP)
    if questions.bags_BD is None or passages.bags_BD is None:
        return loss_N
    question_bags_ND = questions.bags_BD.to(passages.vectors_BD.dtype)
    passage_bags_PD = passages.bags_BD.to(questions.vectors_BD.dtype)
    from_vectors_N = symmetric_info_nce(
        questions.vectors_BD, passage_bags_PD, temperature, excluded_NP
    )
    from_bags_N = symmetric_info_nce(
        question_bags_ND, passages.vectors_BD, temperature, excluded_NP
    )
    return loss_N + (from_vectors_N + from_bags_N) / 2


def vdr_loss(
    questions: Embedded,
    passages: Embedded,
    question_kept_ND: torch.Tensor,
    passage_kept_PD: torch.Tensor,
    temperature: float,
    excluded_NP: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_para + L_semi as the code of VDR has them, shape (N,), in nats.

    One side of each of the four terms is a whole vector V, and the other is sparse: S keeps the
    entries that a search does, and BoT is the bag of tokens.

        L_para = 1/2 L(S(q), V(d)) + 1/2 L(V(q), S(d))
        L_semi = 1/2 L(BoT(q), V(d)) + 1/2 L(V(q), BoT(d))

    Entries of V are above 0, so that every entry that a passage keeps has a gradient, also where
    no question of the batch keeps it; in `openrag_loss` its gradient is exactly 0 there. VDR's code
    has the mean of the four terms, half of this.

    Args:
        questions: Whole vectors of the questions, and their bags.
        passages: Whole vectors of the passages, and their bags.
        question_kept_ND: True for the entries of the questions that a search keeps.
        passage_kept_PD: The same of the passages.
        temperature: Divides the inner products.
        excluded_NP: See `symmetric_info_nce`.

    Raises:
        DataError: when a side has no bags.
    """
    if questions.bags_BD is None or passages.bags_BD is None:
        raise DataError(
            "VDR's loss needs bags of tokens, which a dense encoder does not produce; use "
            "openrag_loss"
        )
    whole_ND, whole_PD = questions.vectors_BD, passages.vectors_BD
    terms = (
        (whole_ND * question_kept_ND, whole_PD),
        (whole_ND, whole_PD * passage_kept_PD),
        (questions.bags_BD.to(whole_PD.dtype), whole_PD),
        (whole_ND, passages.bags_BD.to(whole_ND.dtype)),
    )
    losses = [symmetric_info_nce(*sides, temperature, excluded_NP) for sides in terms]
    return torch.stack(losses).sum(dim=0) / 2


def likelihood_distillation(
    scores_BN: torch.Tensor,
    answer_logp_BN: torch.Tensor,
    temperature: float,
    likelihood_temperature: float,
) -> torch.Tensor:
    """KL(Q || P) over the passages of each question, shape (B,), in nats; at least 0.

    Q = softmax(log p(y | x, d) / likelihood_temperature), constant, is what the generator says;
    P = softmax(f / temperature), with gradient, is what the retriever says (RePlug, Shi et al.,
    2023, arXiv 2301.12652, section 4). Two departures from RePlug:

    - It has KL(P || Q). Q || P has the gradient of a cross-entropy, (P - Q) / temperature, which
      is bounded and does not vanish where the retriever overlooks a good passage; and it is finite
      where a likelihood is 0.
    - It takes the softmax of likelihoods. That of log-likelihoods at temperature 1 is
      p(y | x, d) / sum, the weight that DRO gives a passage.

    A passage counts when its score is above -inf, which marks padding, and its log-likelihood is
    not NaN, which marks one that could not be computed. -inf is a likelihood of 0: P is pushed off
    that passage. The loss is 0, and so is its gradient, for one passage, for none, and where all
    likelihoods are 0, as then Q is not defined. With equal likelihoods Q is uniform.

    Example:
        >>> logp = torch.log(torch.tensor([[0.3, 0.1]]))
        >>> likelihood_distillation(torch.zeros(1, 2), logp, 1.0, 1.0)  # log 2 - H(3/4, 1/4)
        tensor([0.1308])
    """
    counted_BN = (scores_BN.detach() > float("-inf")) & ~answer_logp_BN.isnan()
    target_BN = answer_logp_BN.detach().to(scores_BN.dtype) / likelihood_temperature
    target_BN = torch.where(counted_BN, target_BN, float("-inf"))
    # A row of -inf has no softmax: it gets finite numbers in both distributions and weight 0.
    defined_B1 = (target_BN > float("-inf")).any(dim=1, keepdim=True)
    target_BN = torch.where(defined_B1, target_BN, 0.0).softmax(dim=1) * defined_B1
    logits_BN = torch.where(counted_BN, scores_BN / temperature, float("-inf"))
    logp_BN = torch.where(defined_B1, logits_BN, 0.0).log_softmax(dim=1)
    cross_B = torch.where(target_BN > 0, target_BN * logp_BN, 0.0).sum(dim=1)
    return torch.special.xlogy(target_BN, target_BN).sum(dim=1) - cross_B
