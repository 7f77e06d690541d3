"""Plackett-Luce: a distribution over permutations that starts as the retriever's order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from torch import nn

from rlrag.errors import ConfigError, EpisodeError
from rlrag.retrieval.candidates import CandidateBatch
from rlrag.selection import plackett_luce
from rlrag.selection.feature_scorer import FeatureScorer
from rlrag.selection.plackett_luce import PlackettLucePolicy


def make_batch(num_questions: int = 3, num_candidates: int = 5, seed: int = 0) -> CandidateBatch:
    rng = np.random.default_rng(seed)
    scores = -np.sort(-rng.normal(size=(num_questions, num_candidates, 3)), axis=1)
    words = np.array(["isle", "port", "fish", "king", "rain", "1834", "tower", "salt", "ridge"])
    return CandidateBatch(
        question_texts=tuple(f"what is {rng.choice(words)}" for _ in range(num_questions)),
        passage_texts=tuple(
            tuple(
                f"{rng.choice(words)}\n{' '.join(rng.choice(words, 4))}"
                for _ in range(num_candidates)
            )
            for _ in range(num_questions)
        ),
        scores_BNC=scores.astype(np.float32),
        question_vectors_BD=rng.normal(size=(num_questions, 8)).astype(np.float32),
        passage_vectors_BND=rng.normal(size=(num_questions, num_candidates, 8)).astype(np.float32),
    )


def make_scorer(trained: bool, num_selected: int = 2) -> FeatureScorer:
    torch.manual_seed(0)
    scorer = FeatureScorer(
        num_scores=3,
        vector_size=8,
        num_selected=num_selected,
        hidden_size=16,
        projection_size=4,
        prior_scale=0.5,
    )
    if trained:
        nn.init.normal_(scorer.out.weight, std=2.0)
        nn.init.normal_(scorer.project_passage.weight, std=0.3)
    return scorer


def make_policy(trained: bool, num_selected: int = 2) -> PlackettLucePolicy:
    return PlackettLucePolicy(make_scorer(trained, num_selected), num_selected)


@pytest.mark.parametrize("num_selected", [1, 2, 4])
def test_probabilities_of_all_permutations_sum_to_one(num_selected):
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor(list(itertools.permutations(range(4), num_selected)))
    logp = episodes.log_prob_of(logits, positions.expand(2, -1, -1))
    assert logp.exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_log_prob_by_hand_and_at_its_edges():
    strengths = [4.0, 2.0, 1.0]
    logits = torch.tensor([strengths]).log()
    positions = torch.tensor([[[2, 0], [0, 1]]])
    expected = [1 / 7 * 4 / 6, 4 / 7 * 2 / 3]
    assert episodes.log_prob_of(logits, positions).exp()[0].tolist() == pytest.approx(expected)
    with pytest.raises(EpisodeError, match="chose 1, which the environment's action_mask"):
        episodes.log_prob_of(logits, torch.tensor([[[1, 1]]]))


def test_samples_follow_the_distribution_and_their_seed():
    logits = np.log(np.array([[4.0, 2.0, 1.0]]))
    draws = plackett_luce.sample(logits, 60_000, 2, seeds=[3])[0]
    assert np.array_equal(draws, plackett_luce.sample(logits, 60_000, 2, seeds=[3])[0])
    assert not np.array_equal(draws, plackett_luce.sample(logits, 60_000, 2, seeds=[4])[0])
    for permutation in itertools.permutations(range(3), 2):
        expected = episodes.log_prob_of(
            torch.from_numpy(logits), torch.tensor([[permutation]])
        ).exp()
        share = np.mean(np.all(draws == permutation, axis=1))
        assert share == pytest.approx(expected.item(), abs=4 * math.sqrt(0.25 / 60_000))


WAYS_TO_DRAW = [
    {},
    {"temperature": 2.0},
    {"replacement": False},
    {"temperature": 2.0, "replacement": False},
]


@pytest.mark.parametrize("way", WAYS_TO_DRAW)
def test_a_question_is_drawn_alike_in_any_batch(way):
    policy = make_policy(trained=True, num_selected=3)
    whole = make_batch(num_questions=8)
    together = episodes.sample(policy, whole, 4, seeds=list(range(10, 18)), **way)
    for row in range(8):
        alone = episodes.sample(policy, take(whole, [row]), 4, seeds=[10 + row], **way)
        assert np.array_equal(alone.positions_BMK[0], together.positions_BMK[row])
        assert alone.logp_BM[0] == pytest.approx(together.logp_BM[row], abs=1e-5)
        assert alone.log_weights_BM[0] == pytest.approx(together.log_weights_BM[row], abs=1e-5)


@pytest.mark.parametrize("way", WAYS_TO_DRAW)
def test_one_seed_repeats_and_two_differ(way):
    policy = make_policy(trained=True, num_selected=3)
    first, again, other = (
        episodes.sample(policy, make_batch(1), 6, seeds=[seed], **way)
        for seed in ([5, 1], [5, 1], [5, 2])
    )
    assert np.array_equal(first.positions_BMK, again.positions_BMK)
    assert np.array_equal(first.log_weights_BM, again.log_weights_BM)
    assert not np.array_equal(first.positions_BMK, other.positions_BMK)


@pytest.mark.parametrize("way", WAYS_TO_DRAW)
def test_sampled_log_probabilities_are_those_of_the_learner(way):
    policy = make_policy(trained=True, num_selected=3)
    drawn = episodes.sample(policy, make_batch(), 6, seeds=[1, 2, 3], **way)
    ratio = (
        episodes.log_prob(policy, make_batch(), drawn.positions_BMK)
        - torch.from_numpy(drawn.logp_BM)
    ).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))


class FixedLogits(nn.Module):
    """The same logits for every question."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits_N = nn.Parameter(torch.tensor(logits))

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return self.logits_N.expand(len(batch), -1)


def test_independent_draws_weigh_one_over_m_exactly():
    policy = make_policy(trained=True, num_selected=3)
    drawn = episodes.sample(policy, make_batch(), 6, seeds=[1, 2, 3])
    assert drawn.log_weights_BM.tolist() == [[-math.log(6)] * 6] * 3
    logits = policy.logits(make_batch()).detach().double().numpy()
    assert np.array_equal(
        drawn.positions_BMK, plackett_luce.sample(logits, 6, 3, seeds=[1, 2, 3])
    ), "temperature 1 draws what the policy always drew"


def test_a_tempered_draw_weighs_the_ratio_of_both_probabilities():
    """p = (4, 1) / 5 and at temperature 2 q = (2, 1) / 3: a = p / (m q) = 1.2 / m or 0.6 / m."""
    policy = PlackettLucePolicy(FixedLogits([math.log(4.0), 0.0]), num_selected=1)
    drawn = episodes.sample(policy, make_batch(1, 2), 3000, seeds=[0], temperature=2.0)
    picks_M = drawn.positions_BMK[0, :, 0]
    assert np.mean(picks_M == 0) == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / 3000))
    expected_M = np.where(picks_M == 0, 1.2, 0.6) / 3000
    assert np.exp(drawn.log_weights_BM[0]) == pytest.approx(expected_M, rel=1e-6)
    assert np.exp(drawn.logp_BM[0]) == pytest.approx(np.where(picks_M == 0, 0.8, 0.2), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_without_replacement_differ_and_pad_when_there_are_too_few(temperature):
    policy = PlackettLucePolicy(FixedLogits([1.0, 0.0, -1.0]), num_selected=2)
    some = episodes.sample(
        policy, make_batch(2, 3), 4, seeds=[0, 1], temperature=temperature, replacement=False
    )
    for row in some.positions_BMK.tolist():
        assert len({tuple(selection) for selection in row}) == 4
    every = episodes.sample(
        policy, make_batch(2, 3), 8, seeds=[0, 1], temperature=temperature, replacement=False
    )
    assert every.positions_BMK.shape == (2, 8, 2)
    weights_BM = np.exp(every.log_weights_BM)
    assert weights_BM[:, :6] == pytest.approx(np.exp(every.logp_BM[:, :6]), rel=1e-5)
    assert weights_BM.sum(axis=1).tolist() == pytest.approx([1.0, 1.0])
    assert np.all(every.log_weights_BM[:, 6:] == -np.inf)
    assert np.array_equal(every.positions_BMK[:, 6:], every.positions_BMK[:, [5, 5]])


def test_untrained_greedy_is_the_retrievers_order_exactly():
    policy = make_policy(trained=False, num_selected=5)
    assert episodes.greedy(policy, make_batch()).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_trained_greedy_follows_the_logits():
    policy = make_policy(trained=True, num_selected=5)
    logits_BKN = policy.logits(make_batch()).detach().numpy()
    for logits_KN, found in zip(logits_BKN, episodes.greedy(policy, make_batch()), strict=True):
        left = list(range(5))
        for logits_N, pick in zip(logits_KN, found, strict=True):
            assert pick == max(left, key=lambda n: logits_N[n])
            left.remove(pick)


def test_logits_of_each_pick_give_the_probability_of_a_loop():
    """The last place may want what the first place does not; one row of logits cannot say so."""
    logits_BKN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    every = list(itertools.permutations(range(4), 3))
    found = episodes.log_prob_of(logits_BKN, torch.tensor([every] * 2))
    for logits_KN, logp_M in zip(logits_BKN.tolist(), found.tolist(), strict=True):
        for picks, logp in zip(every, logp_M, strict=True):
            expected, left = 0.0, set(range(4))
            for logits_N, pick in zip(logits_KN, picks, strict=True):
                expected += logits_N[pick] - math.log(sum(math.exp(logits_N[n]) for n in left))
                left.remove(pick)
            assert logp == pytest.approx(expected)
    assert found.exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    last_first = torch.tensor([[[0.0, 1.0, 9.0], [9.0, 0.0, 0.0]]])
    policy = PlackettLucePolicy(episodes.GivenLogits(last_first), 2)
    assert episodes.greedy(policy, make_batch(1, 3)).tolist() == [[2, 0]]


def test_logits_of_each_pick_are_drawn_in_their_proportions():
    logits_BKN = np.random.default_rng(3).normal(size=(1, 2, 4))
    drawn = plackett_luce.sample(logits_BKN, 20_000, 2, seeds=[5])
    every = list(itertools.permutations(range(4), 2))
    p_M = episodes.log_prob_of(torch.from_numpy(logits_BKN), torch.tensor([every])).exp()[0]
    for picks, p in zip(every, p_M.tolist(), strict=True):
        share = (drawn[0] == picks).all(axis=1).mean()
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 20_000)
    after = plackett_luce.next_action(logits_BKN[0], may_stop=False)
    for first, second in every:
        joint = np.exp(after(np.zeros((1, 0), dtype=int))[0, first])
        joint *= np.exp(after(np.array([[first]]))[0, second])
        assert joint == pytest.approx(p_M[every.index((first, second))].item())


def test_equal_logits_at_every_pick_are_the_classical_model():
    logits_BN = torch.randn(2, 5, generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([list(itertools.permutations(range(5), 3))] * 2)
    repeated = logits_BN[:, None].expand(-1, 3, -1)
    assert torch.equal(
        episodes.log_prob_of(logits_BN, positions), episodes.log_prob_of(repeated, positions)
    )
    assert np.array_equal(
        plackett_luce.sample(logits_BN.numpy(), 4, 3, [1, 2]),
        plackett_luce.sample(repeated.numpy(), 4, 3, [1, 2]),
    )


class ShapedScorer(nn.Module):
    """Logits of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, batch: CandidateBatch) -> torch.Tensor:
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(3, 5, 1), (3, 1, 5), (3, 3, 5), (2, 5), (5,)])
def test_a_scorer_whose_logits_have_another_shape_is_refused(shape):
    policy = PlackettLucePolicy(ShapedScorer(*shape), num_selected=2)
    with pytest.raises(ConfigError, match=r"ShapedScorer gave .*give \(3, 5\).* or \(3, 2, 5\)"):
        episodes.sample(policy, make_batch(), 4, [0, 1, 2])


def take(batch: CandidateBatch, rows: list[int]) -> CandidateBatch:
    return CandidateBatch(
        tuple(batch.question_texts[r] for r in rows),
        tuple(batch.passage_texts[r] for r in rows),
        batch.scores_BNC[rows],
        batch.question_vectors_BD[rows],
        batch.passage_vectors_BND[rows],
    )


def permuted(batch: CandidateBatch, order: list[int]) -> CandidateBatch:
    return CandidateBatch(
        batch.question_texts,
        tuple(tuple(texts[i] for i in order) for texts in batch.passage_texts),
        batch.scores_BNC[:, order],
        batch.question_vectors_BD,
        batch.passage_vectors_BND[:, order],
    )


def test_permuting_the_logits_permutes_the_log_probabilities():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    positions = torch.tensor([list(itertools.permutations(range(5), 2))])
    original = episodes.log_prob_of(logits, order[positions])
    assert torch.allclose(episodes.log_prob_of(logits[:, order], positions), original)


def test_permuting_the_candidates_permutes_what_is_learned():
    """Logits are prior by rank plus learned part; the learned part sees ranks only as features."""
    scorer = make_scorer(trained=True)
    scorer.prior_scale = 1e-9
    rank_columns = slice(6, 8)
    with torch.no_grad():
        scorer.hidden.weight[:, rank_columns] = 0.0
    order = [3, 0, 4, 1, 2]
    original = scorer(make_batch())
    assert torch.allclose(scorer(permuted(make_batch(), order)), original[:, :, order], atol=1e-5)


def test_gradient_reaches_every_parameter_after_a_step():
    policy = make_policy(trained=True, num_selected=2)
    episodes.log_prob(policy, make_batch(), np.array([[[4, 1]]] * 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory) -> Path:
    """A random two-layer BERT with a word-level tokenizer, saved as a Hugging Face directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "what",
        "is",
        "isle",
        "port",
        "fish",
        "king",
        "rain",
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    directory = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["BiEncoderScorer", "CrossEncoderScorer"])
def test_encoder_scorers_start_at_the_retrievers_order_and_learn(kind, tiny_encoder):
    from rlrag.selection import encoder_scorers

    scorer = getattr(encoder_scorers, kind)(tiny_encoder, 32, num_selected=2, prior_scale=0.5)
    policy = PlackettLucePolicy(scorer, num_selected=2)
    batch = make_batch()
    assert episodes.greedy(policy, batch).tolist() == [[0, 1]] * 3
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    target = np.array([[[3, 1]]] * 3)
    before = episodes.log_prob(policy, batch, target).sum().item()
    for _ in range(3):
        optimizer.zero_grad()
        loss = -episodes.log_prob(policy, batch, target).sum()
        loss.backward()
        optimizer.step()
    assert episodes.log_prob(policy, batch, target).sum().item() > before
    alone = policy.logits(take(batch, [1]))
    assert torch.allclose(alone[0], policy.logits(batch)[1], atol=1e-4), "padding changes nothing"


def test_a_question_longer_than_the_encoder_reads_leaves_half_of_it_to_the_passage(tiny_encoder):
    from rlrag.selection.encoder_scorers import CrossEncoderScorer

    scorer = CrossEncoderScorer(tiny_encoder, 32, num_selected=1, prior_scale=0.5)
    nn.init.normal_(scorer.out.weight)
    batch = make_batch()
    asked = replace(batch, question_texts=("a b " * 40,) * len(batch))
    logits_BKN = scorer(asked)
    assert torch.isfinite(logits_BKN).all()
    other = replace(asked, passage_texts=(batch.passage_texts[0][::-1],) * len(batch))
    assert not torch.allclose(scorer(other), logits_BKN), "the passage is read too"


@pytest.mark.parametrize("kind", ["BiEncoderScorer", "CrossEncoderScorer"])
def test_an_encoder_that_reads_fewer_tokens_is_refused(kind, tiny_encoder):
    from rlrag.selection import encoder_scorers

    with pytest.raises(ConfigError, match=r"selector\.max_tokens is 513.*at most 512"):
        getattr(encoder_scorers, kind)(tiny_encoder, 513, num_selected=1, prior_scale=0.5)
