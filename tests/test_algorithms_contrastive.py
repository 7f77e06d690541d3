"""The retriever's losses against hand computation, loops, another library and their edges."""

from __future__ import annotations

import math

import pytest
import torch

from rlrag.algorithms.contrastive import (
    likelihood_distillation,
    openrag_loss,
    symmetric_info_nce,
    vdr_loss,
)
from rlrag.errors import DataError
from rlrag.retrieval.trainable.protocol import Embedded

INF, NAN = float("inf"), float("nan")
N, P, D = 4, 8, 5


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bags(*shape: int, seed: int = 0) -> torch.Tensor:
    return (vectors(*shape, seed=seed) > 0).double()


def mask() -> torch.Tensor:
    """Some false negatives, in a positive's column and in a negative's."""
    excluded_NP = torch.zeros(N, P, dtype=torch.bool)
    for question, passage in ((0, 1), (0, 6), (3, 4), (2, 0)):
        excluded_NP[question, passage] = True
    return excluded_NP


def by_loops(question_ND, passage_PD, temperature, excluded_NP) -> list[float]:
    """The equation, one exponential at a time."""

    def f(question: int, passage: int) -> float:
        return math.fsum((question_ND[question] * passage_PD[passage]).tolist()) / temperature

    losses = []
    for i in range(len(question_ND)):
        passages = [p for p in range(len(passage_PD)) if p == i or not bool(excluded_NP[i, p])]
        questions = [q for q in range(len(question_ND)) if q == i or not bool(excluded_NP[q, i])]
        over_passages = math.fsum(math.exp(f(i, p)) for p in passages)
        over_questions = math.fsum(math.exp(f(q, i)) for q in questions)
        own = math.exp(f(i, i))
        losses.append(-math.log(own / over_passages) - math.log(own / over_questions))
    return losses


def test_two_questions_with_four_passages_by_hand():
    """e^f = [[3, 1, 2, 4], [1, 5, 1, 2]]: 3 of 10 and 3 of 4; 5 of 9 and 5 of 6."""
    questions = torch.eye(2, dtype=torch.float64)
    passages = torch.tensor(
        [[3.0, 1.0], [1.0, 5.0], [2.0, 1.0], [4.0, 2.0]], dtype=torch.float64
    ).log()
    found = symmetric_info_nce(questions, passages, temperature=1.0)
    expected = [-math.log(0.3) - math.log(0.75), -math.log(5 / 9) - math.log(5 / 6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_loops(temperature, masked):
    questions, passages = vectors(N, D), vectors(P, D, seed=1)
    excluded = mask() if masked else None
    found = symmetric_info_nce(questions, passages, temperature, excluded)
    expected = by_loops(questions, passages, temperature, mask() if masked else torch.zeros(N, P))
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_another_library_has_half_of_it():
    """sentence-transformers averages both directions and the questions."""
    from sentence_transformers import SentenceTransformer, util
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    library = MultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()], device="cpu"),
        scale=1 / 0.3,
        similarity_fct=util.dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    questions, passages = vectors(N, D), vectors(2 * N, D, seed=1)
    theirs = library.compute_loss_from_embeddings(
        [questions, passages[:N], passages[N:]], torch.zeros(0)
    )
    ours = symmetric_info_nce(questions, passages, temperature=0.3).mean()
    assert ours.item() == pytest.approx(2 * theirs.item(), rel=1e-12)


def test_leaving_a_pair_out_is_a_batch_without_it():
    questions, passages = vectors(N, D), vectors(P, D, seed=1)
    excluded = torch.zeros(N, P, dtype=torch.bool)
    excluded[2, 6] = True
    found = symmetric_info_nce(questions, passages, 1.0, excluded)
    without = symmetric_info_nce(questions, passages[[0, 1, 2, 3, 4, 5, 7]], 1.0)
    plain = symmetric_info_nce(questions, passages, 1.0)
    assert found[2].item() == pytest.approx(without[2].item(), rel=1e-12)
    assert found[[0, 1, 3]].tolist() == pytest.approx(plain[[0, 1, 3]].tolist(), rel=1e-12)


def test_what_is_left_out_has_no_gradient_through_the_pair():
    questions, passages = vectors(1, D), vectors(3, D, seed=1).requires_grad_()
    excluded = torch.tensor([[False, True, False]])
    (gradient,) = torch.autograd.grad(
        symmetric_info_nce(questions, passages, 1.0, excluded).sum(), passages
    )
    assert gradient[1].tolist() == [0.0] * D
    assert gradient.isfinite().all()
    assert gradient[2].abs().sum() > 0


def test_a_questions_own_positive_is_never_left_out():
    questions, passages = vectors(N, D), vectors(P, D, seed=1)
    own = torch.eye(N, P, dtype=torch.bool)
    found = symmetric_info_nce(questions, passages, 1.0, own)
    assert torch.equal(found, symmetric_info_nce(questions, passages, 1.0))
    everything = symmetric_info_nce(questions, passages, 1.0, torch.ones(N, P, dtype=torch.bool))
    assert everything.tolist() == [0.0] * N


def test_edges_of_the_contrastive_loss():
    alone = symmetric_info_nce(vectors(1, D), vectors(1, D, seed=1), 1.0)
    assert alone.tolist() == [0.0]
    equal = symmetric_info_nce(torch.ones(N, D), torch.ones(P, D), 1.0)
    assert equal.tolist() == pytest.approx([math.log(P) + math.log(N)] * N)
    huge = symmetric_info_nce(1e4 * torch.eye(N), torch.cat([torch.eye(N), -torch.eye(N)]), 1.0)
    assert huge.tolist() == [0.0] * N
    broken = symmetric_info_nce(torch.tensor([[NAN], [1.0]]), torch.ones(2, 1), 1.0)
    assert broken.isnan().all()


def test_the_order_of_negatives_changes_nothing():
    questions, passages = vectors(N, D), vectors(P, D, seed=1)
    order = [0, 1, 2, 3, 7, 5, 4, 6]
    found = symmetric_info_nce(questions, passages[order], 1.0, mask()[:, order])
    expected = symmetric_info_nce(questions, passages, 1.0, mask())
    assert torch.allclose(found, expected, rtol=1e-12)


def test_the_whole_loss_adds_half_of_each_side_with_bags():
    questions = Embedded(vectors(N, D), bags(N, D, seed=2))
    passages = Embedded(vectors(P, D, seed=1), bags(P, D, seed=3))
    found = openrag_loss(questions, passages, 0.7, mask())
    parts = [
        by_loops(q, d, 0.7, mask())
        for q, d in (
            (questions.vectors_BD, passages.vectors_BD),
            (questions.vectors_BD, passages.bags_BD),
            (questions.bags_BD, passages.vectors_BD),
        )
    ]
    expected = [para + (left + right) / 2 for para, left, right in zip(*parts, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_the_loss_of_vdr_has_a_whole_side_in_each_of_its_four_terms():
    questions = Embedded(vectors(N, D).exp(), bags(N, D, seed=2))
    passages = Embedded(vectors(P, D, seed=1).exp(), bags(P, D, seed=3))
    kept_ND, kept_PD = bags(N, D, seed=4).bool(), bags(P, D, seed=5).bool()
    found = vdr_loss(questions, passages, kept_ND, kept_PD, 0.7, mask())
    parts = [
        by_loops(q, d, 0.7, mask())
        for q, d in (
            (torch.where(kept_ND, questions.vectors_BD, 0.0), passages.vectors_BD),
            (questions.vectors_BD, torch.where(kept_PD, passages.vectors_BD, 0.0)),
            (questions.bags_BD, passages.vectors_BD),
            (questions.vectors_BD, passages.bags_BD),
        )
    ]
    expected = [math.fsum(terms) / 2 for terms in zip(*parts, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    for sides in (
        (Embedded(questions.vectors_BD), passages),
        (questions, Embedded(passages.vectors_BD)),
    ):
        with pytest.raises(DataError, match="bags of tokens"):
            vdr_loss(*sides, kept_ND, kept_PD, 0.7)


def test_in_the_loss_of_vdr_every_token_of_a_gold_passage_has_a_gradient():
    """Passages keep entries 0 to 3, questions 3 to 5: sparse on both sides 0 to 2 have none."""
    whole_ND, whole_PD = vectors(2, 6).exp(), vectors(4, 6, seed=1).exp()
    kept_ND = torch.tensor([[False, False, False, True, True, True]] * 2)
    kept_PD = torch.tensor([[True, True, True, True, False, False]] * 4)

    def gradient(loss_of) -> torch.Tensor:
        passage_PD = whole_PD.clone().requires_grad_()
        return torch.autograd.grad(loss_of(passage_PD).sum(), passage_PD)[0][:2]

    def sparse(passage_PD: torch.Tensor) -> torch.Tensor:
        questions = Embedded(whole_ND * kept_ND, kept_ND.double())
        return openrag_loss(questions, Embedded(passage_PD * kept_PD, kept_PD.double()), 1.0)

    def one_whole(passage_PD: torch.Tensor) -> torch.Tensor:
        questions = Embedded(whole_ND, kept_ND.double())
        passages = Embedded(passage_PD, kept_PD.double())
        return vdr_loss(questions, passages, kept_ND, kept_PD, 1.0)

    assert (gradient(sparse)[:, :3] == 0).all()
    assert (gradient(one_whole) != 0).all()


def test_without_bags_the_parametric_part_is_all():
    questions, passages = vectors(N, D), vectors(P, D, seed=1)
    expected = symmetric_info_nce(questions, passages, 0.7)
    for one, other in ((None, None), (None, bags(P, D)), (bags(N, D), None)):
        found = openrag_loss(Embedded(questions, one), Embedded(passages, other), 0.7)
        assert torch.equal(found, expected)


def test_bags_of_another_number_format_are_taken():
    questions = Embedded(vectors(N, D).float(), bags(N, D).bool())
    passages = Embedded(vectors(P, D, seed=1).float(), bags(P, D, seed=3).to(torch.int8))
    same = (
        Embedded(questions.vectors_BD, bags(N, D).float()),
        Embedded(passages.vectors_BD, bags(P, D, seed=3).float()),
    )
    kept = bags(N, D, seed=4).bool(), bags(P, D, seed=5).bool()
    assert torch.equal(openrag_loss(questions, passages, 1.0), openrag_loss(*same, 1.0))
    assert torch.equal(vdr_loss(questions, passages, *kept, 1.0), vdr_loss(*same, *kept, 1.0))


def test_the_gradient_is_that_of_finite_differences():
    questions = vectors(N, D).requires_grad_()
    passages = vectors(P, D, seed=1).requires_grad_()

    def loss(q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        left, right = Embedded(q, bags(N, D, seed=2)), Embedded(d, bags(P, D, seed=3))
        return openrag_loss(left, right, 0.7, mask())

    assert torch.autograd.gradcheck(loss, (questions, passages), eps=1e-6, atol=1e-7)


def divergence(target: list[float], found: list[float]) -> float:
    return math.fsum(q * math.log(q / p) for q, p in zip(target, found, strict=True) if q > 0)


def softmax(values: list[float]) -> list[float]:
    total = math.fsum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_distillation_by_hand():
    """Q = (3/4, 1/4) and P = (1/3, 2/3): 3/4 log(9/4) + 1/4 log(3/8)."""
    found = likelihood_distillation(
        torch.tensor([[0.0, math.log(2)]]), torch.tensor([[0.3, 0.1]]).log(), 1.0, 1.0
    )
    expected = 0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_distillation_is_the_divergence_of_two_softmaxes():
    scores, logp = vectors(3, 6), vectors(3, 6, seed=1) - 2
    found = likelihood_distillation(scores, logp, 0.5, 2.0)
    expected = [
        divergence(softmax([v / 2 for v in target]), softmax([v / 0.5 for v in own]))
        for target, own in zip(logp.tolist(), scores.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    library = torch.nn.functional.kl_div(
        (scores / 0.5).log_softmax(1), (logp / 2).softmax(1), reduction="none"
    )
    assert torch.allclose(found, library.sum(1))


def test_the_distillations_gradient_is_the_difference_of_the_distributions():
    scores, logp = vectors(3, 6).requires_grad_(), vectors(3, 6, seed=1)
    (gradient,) = torch.autograd.grad(likelihood_distillation(scores, logp, 0.5, 2.0).sum(), scores)
    expected = ((scores / 0.5).softmax(1) - (logp / 2).softmax(1)) / 0.5
    assert torch.allclose(gradient, expected)
    assert torch.autograd.gradcheck(
        lambda s: likelihood_distillation(s, logp, 0.5, 2.0), (scores,), eps=1e-6, atol=1e-7
    )


def test_no_gradient_reaches_the_generators_likelihoods():
    logp = vectors(2, 3).requires_grad_()
    assert not likelihood_distillation(vectors(2, 3, seed=1), logp, 1.0, 1.0).requires_grad


@pytest.mark.parametrize(
    ("scores", "logp", "expected"),
    [
        ([4.0], [-3.0], 0.0),  # one passage
        ([4.0, -INF], [-3.0, -1.0], 0.0),  # one passage and padding
        ([4.0, 1.0], [-3.0, NAN], 0.0),  # one passage that was scored
        ([2.0, 2.0], [-3.0, -3.0], 0.0),  # equal on both sides
        ([math.log(3), 0.0], [-9.0, -9.0], 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)),
        ([math.log(3), 0.0], [-5.0, -INF], -math.log(0.75)),  # a likelihood of 0
        ([1.0, 2.0], [-INF, -INF], 0.0),  # nothing is likely
        ([1.0, 2.0], [NAN, NAN], 0.0),  # nothing is known
        ([-INF, -INF], [-1.0, -1.0], 0.0),  # nothing but padding
    ],
)
def test_edges_of_the_distillation(scores, logp, expected):
    scores_BN = torch.tensor([scores, scores], dtype=torch.float64, requires_grad=True)
    loss = likelihood_distillation(scores_BN, torch.tensor([logp, logp]).double(), 1.0, 1.0)
    assert loss.tolist() == pytest.approx([expected, expected], abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), scores_BN)
    assert gradient.isfinite().all()
    if expected == 0.0:
        assert gradient.abs().max().item() < 1e-12


def test_what_does_not_count_changes_nothing():
    scores, logp = vectors(1, 3), vectors(1, 3, seed=1)
    padded = torch.cat([scores, torch.tensor([[-INF, 7.0]])], dim=1)
    with_noise = torch.cat([logp, torch.tensor([[-0.1, NAN]])], dim=1)
    found = likelihood_distillation(padded, with_noise, 1.0, 1.0)
    assert found.item() == pytest.approx(likelihood_distillation(scores, logp, 1.0, 1.0).item())


def test_an_infinite_likelihood_is_not_hidden():
    assert likelihood_distillation(vectors(1, 2), torch.tensor([[INF, 0.0]]), 1.0, 1.0).isnan()
