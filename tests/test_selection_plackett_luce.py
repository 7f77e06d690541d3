"""Plackett-Luce: a distribution over permutations that starts as the retriever's order."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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


def make_scorer(trained: bool) -> FeatureScorer:
    torch.manual_seed(0)
    scorer = FeatureScorer(
        num_scores=3, vector_size=8, hidden_size=16, projection_size=4, prior_scale=0.5
    )
    if trained:
        nn.init.normal_(scorer.out.weight, std=2.0)
        nn.init.normal_(scorer.project_passage.weight, std=0.3)
    return scorer


@pytest.mark.parametrize("num_selected", [1, 2, 4])
def test_probabilities_of_all_permutations_sum_to_one(num_selected):
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor(list(itertools.permutations(range(4), num_selected)))
    logp = plackett_luce.log_prob(logits, positions.expand(2, -1, -1))
    assert logp.exp().sum(dim=1).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_log_prob_by_hand_and_at_its_edges():
    strengths = [4.0, 2.0, 1.0]
    logits = torch.tensor([strengths]).log()
    positions = torch.tensor([[[2, 0], [0, 1]]])
    expected = [1 / 7 * 4 / 6, 4 / 7 * 2 / 3]
    assert plackett_luce.log_prob(logits, positions).exp()[0].tolist() == pytest.approx(expected)
    none = plackett_luce.log_prob(logits, torch.zeros(1, 2, 0, dtype=torch.long))
    assert none.tolist() == [[0.0, 0.0]]
    repeated = plackett_luce.log_prob(logits, torch.tensor([[[1, 1]]]))
    assert repeated.item() == -math.inf


def test_samples_follow_the_distribution_and_their_seed():
    logits = np.log(np.array([[4.0, 2.0, 1.0]]))
    draws = plackett_luce.sample(logits, 60_000, 2, seeds=[3])[0]
    assert np.array_equal(draws, plackett_luce.sample(logits, 60_000, 2, seeds=[3])[0])
    assert not np.array_equal(draws, plackett_luce.sample(logits, 60_000, 2, seeds=[4])[0])
    for permutation in itertools.permutations(range(3), 2):
        expected = plackett_luce.log_prob(
            torch.from_numpy(logits), torch.tensor([[permutation]])
        ).exp()
        share = np.mean(np.all(draws == permutation, axis=1))
        assert share == pytest.approx(expected.item(), abs=4 * math.sqrt(0.25 / 60_000))


def test_a_question_is_drawn_alike_in_any_batch():
    policy = PlackettLucePolicy(make_scorer(trained=True), num_selected=3)
    whole = make_batch()
    together = policy.sample(whole, 4, seeds=[10, 11, 12])
    for row in range(3):
        alone = policy.sample(take(whole, [row]), 4, seeds=[10 + row])
        assert np.array_equal(alone.positions_BMK[0], together.positions_BMK[row])
        assert alone.logp_BM[0] == pytest.approx(together.logp_BM[row], abs=1e-5)


def test_sampled_log_probabilities_are_those_of_the_learner():
    policy = PlackettLucePolicy(make_scorer(trained=True), num_selected=3)
    drawn = policy.sample(make_batch(), 6, seeds=[1, 2, 3])
    ratio = (
        policy.log_prob(make_batch(), drawn.positions_BMK) - torch.from_numpy(drawn.logp_BM)
    ).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio))


def test_untrained_greedy_is_the_retrievers_order_exactly():
    policy = PlackettLucePolicy(make_scorer(trained=False), num_selected=5)
    assert policy.greedy(make_batch()).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_trained_greedy_follows_the_logits():
    policy = PlackettLucePolicy(make_scorer(trained=True), num_selected=5)
    logits = policy.logits(make_batch()).detach()
    assert policy.greedy(make_batch()).tolist() == logits.argsort(descending=True).tolist()


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
    original = plackett_luce.log_prob(logits, order[positions])
    assert torch.allclose(plackett_luce.log_prob(logits[:, order], positions), original)


def test_permuting_the_candidates_permutes_what_is_learned():
    """Logits are prior by rank plus learned part; the learned part sees ranks only as features."""
    scorer = make_scorer(trained=True)
    scorer.prior_scale = 1e-9
    rank_columns = slice(6, 8)
    with torch.no_grad():
        scorer.hidden.weight[:, rank_columns] = 0.0
    order = [3, 0, 4, 1, 2]
    original = scorer(make_batch())
    assert torch.allclose(scorer(permuted(make_batch(), order)), original[:, order], atol=1e-5)


def test_gradient_reaches_every_parameter_after_a_step():
    policy = PlackettLucePolicy(make_scorer(trained=True), num_selected=2)
    policy.log_prob(make_batch(), np.array([[[4, 1]]] * 3)).sum().backward()
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

    scorer = getattr(encoder_scorers, kind)(tiny_encoder, max_tokens=32, prior_scale=0.5)
    policy = PlackettLucePolicy(scorer, num_selected=2)
    batch = make_batch()
    assert policy.greedy(batch).tolist() == [[0, 1]] * 3
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    target = np.array([[[3, 1]]] * 3)
    before = policy.log_prob(batch, target).sum().item()
    for _ in range(3):
        optimizer.zero_grad()
        loss = -policy.log_prob(batch, target).sum()
        loss.backward()
        optimizer.step()
    assert policy.log_prob(batch, target).sum().item() > before
    alone = policy.logits(take(batch, [1]))
    assert torch.allclose(alone[0], policy.logits(batch)[1], atol=1e-4), "padding changes nothing"
