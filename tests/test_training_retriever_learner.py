"""A step of the retriever against the plain computation, and what it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from retriever_tasks import (
    BATCH,
    NAN,
    NEGATIVES,
    POSITIVES,
    QUESTIONS,
    WordEncoder,
    assert_close,
    gradient_of,
    make,
    plain_gradient,
)
from tiny_models import save_tiny_encoder, save_tiny_masked_lm

from rlrag.algorithms.contrastive import vdr_loss
from rlrag.config import OpenRAGConfig, RetrievalConfig, RunConfig
from rlrag.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from rlrag.retrieval.trainable.protocol import Embedded, Role
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder


@pytest.mark.parametrize("with_bags", [True, False])
@pytest.mark.parametrize("micro_batch_texts", [1, 3, 8, 16, 23, 24, 100])
def test_the_gradient_is_that_of_the_plain_computation(micro_batch_texts, with_bags):
    encoder, learner = make(WordEncoder(with_bags), micro_batch_texts=micro_batch_texts)
    loss, expected = plain_gradient(copy.deepcopy(encoder), BATCH)
    metrics = learner.update(*BATCH, step=0)
    assert_close(gradient_of(learner), expected)
    assert metrics["retriever/loss"] == pytest.approx(loss, rel=1e-12)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert metrics["retriever/grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert metrics["retriever/learning_rate"] == 0.01


def test_the_gradient_in_single_precision_is_within_a_millionth():
    encoder, learner = make(WordEncoder(dtype=torch.float32), micro_batch_texts=5)
    _, expected = plain_gradient(copy.deepcopy(encoder), BATCH)
    norm = learner.update(*BATCH, step=0)["retriever/grad_norm"]
    assert_close(gradient_of(learner), expected, atol=1e-6 * norm)


def test_no_more_texts_than_a_piece_have_a_graph():
    """Eight questions and sixteen passages: a piece whose graph can be kept is embedded once."""
    for micro_batch_texts, num_texts, most_graphs in (
        (24, 24, 24),  # everything once
        (16, 24 + 8, 16),  # the questions again
        (8, 24 + 16, 8),
        (5, 24 + 19, 5),
        (1, 24 + 23, 1),
    ):
        encoder, learner = make(micro_batch_texts=micro_batch_texts)
        learner.update(*BATCH, step=0)
        assert (encoder.num_texts, encoder.most_graphs) == (num_texts, most_graphs)
        assert encoder.num_graphs == 0


def test_texts_of_unlike_length_are_embedded_apart_where_they_are_many():
    """Passages of 100, 90 and 40 letters: 40 is mostly padding beside 100, and 90 is not."""
    positives = [f"{i:100}" for i in range(5)] + [f"{i:90}" for i in range(5)]
    negatives = [f"{i:40}" for i in range(10)]
    questions = [f"{i:7}" for i in range(9)] + ["q"]
    encoder, learner = make()
    _, expected = plain_gradient(copy.deepcopy(encoder), (questions, positives, negatives))
    learner.update(questions, positives, negatives, step=0)
    assert sorted(encoder.lengths) == [[1], [7], [40], [90, 100]]
    assert_close(gradient_of(learner), expected)
    few, learner = make()
    learner.update(questions[-3:], positives[-3:], negatives[-3:], step=0)
    assert sorted(few.lengths) == [[1, 7], [40, 90]]


def test_a_positive_of_the_question_is_no_negative_of_it():
    """Questions 0 and 3 share the positive; 1's positive is 2's negative; 4 and 5 are one question.

    Columns: positives 0 to 5, then negatives 6 to 11.
    """
    questions = [*QUESTIONS[:5], QUESTIONS[4]]
    positives = [*POSITIVES[:3], POSITIVES[0], *POSITIVES[4:6]]
    negatives = [*NEGATIVES[:2], POSITIVES[1], *NEGATIVES[3:6]]
    excluded_NP = torch.zeros(6, 12, dtype=torch.bool)
    for question, passage in ((0, 3), (3, 0), (1, 8), (4, 5), (5, 4)):
        excluded_NP[question, passage] = True
    encoder, learner = make(micro_batch_texts=4)
    batch = (questions, positives, negatives)
    loss, expected = plain_gradient(copy.deepcopy(encoder), batch, excluded_NP)
    assert loss != pytest.approx(plain_gradient(copy.deepcopy(encoder), batch)[0], rel=1e-3)
    metrics = learner.update(*batch, step=0)
    assert metrics["retriever/loss"] == pytest.approx(loss, rel=1e-12)
    assert_close(gradient_of(learner), expected)


class FixedVectors(torch.nn.Module):
    """One trained vector for each known text."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        super().__init__()
        self.rows = {text: row for row, text in enumerate(vectors)}
        self.weight = torch.nn.Parameter(torch.tensor(list(vectors.values())))

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        return Embedded(self.weight[[self.rows[text] for text in texts]])


def test_metrics_by_hand():
    """Scores of q0 are (2, 3, 0, 1) and of q1 (1, 4, 0, 3): one of two finds its positive first.

    The gaps to their own negatives are 2 - 0 and 4 - 3.
    """
    _, learner = make(
        FixedVectors(
            {
                "q0": [1.0, 0.0],
                "q1": [0.0, 1.0],
                "p0": [2.0, 1.0],
                "p1": [3.0, 4.0],
                "n0": [0.0, 0.0],
                "n1": [1.0, 3.0],
            }
        )
    )
    metrics = learner.update(["q0", "q1"], ["p0", "p1"], ["n0", "n1"], step=0)
    assert metrics["retriever/accuracy"] == 0.5
    assert metrics["retriever/score_gap"] == 1.5
    assert set(metrics) == {
        f"retriever/{name}"
        for name in ("loss", "accuracy", "score_gap", "grad_norm", "learning_rate")
    }


def test_a_passage_that_is_right_too_does_not_count_against_accuracy():
    _, learner = make(FixedVectors({"q": [1.0], "p": [1.0], "r": [3.0], "n": [0.0]}))
    metrics = learner.update(["q", "q"], ["p", "r"], ["n", "n"], step=0)
    assert metrics["retriever/accuracy"] == 1.0


def test_a_positive_that_scores_as_another_passage_does_is_not_above_it():
    _, learner = make(FixedVectors({"q": [1.0], "p": [2.0], "n": [2.0]}))
    assert learner.update(["q"], ["p"], ["n"], step=0)["retriever/accuracy"] == 0.0


# AdamW blows a gradient of 0 up that rounding leaves at 1e-16: to 1e-8 of a step.
def test_the_gradient_is_clipped_and_reported_unclipped():
    _, plain = make()
    norm = plain.update(*BATCH, step=0)["retriever/grad_norm"]
    _, clipped = make(max_grad_norm=norm / 4)
    assert clipped.update(*BATCH, step=0)["retriever/grad_norm"] == pytest.approx(norm)
    expected = {name: g / 4 for name, g in gradient_of(plain).items()}
    assert_close(gradient_of(clipped), expected)


def test_the_rate_follows_the_schedule():
    _, learner = make(warmup_steps=2, learning_rate=0.1)
    rates = [learner.update(*BATCH, step=step)["retriever/learning_rate"] for step in (0, 1, 6)]
    assert rates == pytest.approx([0.05, 0.1, 0.05])


def test_frozen_weights_stay():
    encoder = WordEncoder()
    encoder.question.requires_grad_(False)
    before = encoder.question.clone()
    _, learner = make(encoder)
    learner.update(*BATCH, step=0)
    assert torch.equal(encoder.question, before)
    assert gradient_of(learner).keys() == {"passage"}


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step():
    encoder, learner = make()
    with torch.no_grad():
        encoder.passage[0, 0] = NAN
    before = encoder.question.clone()
    with pytest.raises(NonFiniteLossError, match="loss of step 4 is nan; lower"):
        learner.update(*BATCH, step=4)
    assert torch.equal(encoder.question, before)
    assert learner.optimiser.tensors() == {}


class Exploding(torch.nn.Module):
    """Finite vectors whose gradient is not: the square root of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        lengths_B1 = torch.tensor([[float(len(text))] for text in texts])
        return Embedded(lengths_B1 + self.weight.sqrt())


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step():
    encoder, learner = make(Exploding())
    with pytest.raises(NonFiniteLossError, match="gradient of step 4 is not finite; lower"):
        learner.update(*BATCH, step=4)
    assert encoder.weight.tolist() == [0.0, 0.0]
    assert learner.optimiser.tensors() == {}


def test_likelihoods_that_are_not_finite_end_the_run():
    _, learner = make()
    with pytest.raises(NonFiniteLossError, match="loss of step 0 is nan"):
        learner.update_kl(["q"], [["a", "b"]], np.array([[math.inf, 0.0]]), step=0)


def test_batches_that_do_not_fit_are_refused():
    _, learner = make()
    with pytest.raises(DataError, match="2 questions have 1 positives and 2 negatives"):
        learner.update(["a", "b"], ["c"], ["d", "e"], step=0)
    with pytest.raises(DataError, match="a batch has no questions"):
        learner.update([], [], [], step=0)
    for passages, shape in (([["a"]], (1, 2)), ([["a"], []], (2, 1)), ([["a"]], (2, 1))):
        with pytest.raises(
            DataError, match="give each question at least one passage, and each passage a"
        ):
            learner.update_kl(["q"] * shape[0], passages, np.zeros(shape), step=0)


def test_a_restored_run_goes_on_bit_by_bit():
    encoder, learner = make(micro_batch_texts=5)
    for step in range(2):
        learner.update(*BATCH, step=step)
    restored, restored_learner = make(copy.deepcopy(encoder), micro_batch_texts=5)
    given = learner.optimiser.tensors()
    kept = {name: tensor.clone() for name, tensor in given.items()}
    restored_learner.optimiser.load(given)
    for step in range(2, 4):
        assert learner.update(*BATCH, step=step) == restored_learner.update(*BATCH, step=step)
    assert all(torch.equal(kept[name], tensor) for name, tensor in given.items())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name])


def test_an_optimiser_of_other_weights_is_refused():
    _, learner = make()
    with pytest.raises(CheckpointError, match="state for 'elsewhere', which is not"):
        learner.optimiser.load({"elsewhere:exp_avg": torch.zeros(1)})


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


def test_a_real_encoder_has_the_plain_gradient_too(encoder_dir):
    """Pieces pad their texts otherwise than the whole batch does."""
    plain, _ = make(TrainableTextEncoder(encoder_dir, 32))
    loss, expected = plain_gradient(plain, BATCH)
    for micro_batch_texts in (5, 100):
        _, learner = make(
            TrainableTextEncoder(encoder_dir, 32), micro_batch_texts=micro_batch_texts
        )
        metrics = learner.update(*BATCH, step=0)
        assert metrics["retriever/loss"] == pytest.approx(loss, rel=1e-6)
        assert_close(gradient_of(learner), expected, atol=1e-6)


def test_steps_teach_a_real_encoder_its_pairs(encoder_dir):
    _, learner = make(
        TrainableTextEncoder(encoder_dir, 32),
        micro_batch_texts=7,
        temperature=0.1,
        learning_rate=3e-3,
        num_steps=40,
    )
    found = [learner.update(*BATCH, step=step) for step in range(30)]
    assert found[0]["retriever/accuracy"] < 0.6
    assert found[-1]["retriever/accuracy"] == 1.0
    assert found[-1]["retriever/score_gap"] > found[0]["retriever/score_gap"]
    assert found[-1]["retriever/loss"] < 0.2 * found[0]["retriever/loss"]


def test_with_one_side_whole_the_gradient_is_that_of_the_loss_of_vdr(tmp_path):
    save_tiny_masked_lm(tmp_path)
    encoder = VocabularyEncoder(tmp_path, max_tokens=32, top_k=4, head="layer_norm")
    batch = (["which holds amber"], ["the box holds amber"], ["a rumour of a box"])
    questions = encoder.embed_whole(batch[0], "question")
    passages = encoder.embed_whole([*batch[1], *batch[2]], "passage")
    kept = [encoder.kept(side.vectors_BD, side.bags_BD) for side in (questions, passages)]
    loss = vdr_loss(questions, passages, *kept, 5.0).mean()
    trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    expected = dict(
        zip(
            trained,
            torch.autograd.grad(loss, list(trained.values()), allow_unused=True),
            strict=True,
        )
    )
    _, learner = make(
        encoder, temperature=5.0, vectors="one_whole", max_grad_norm=1e9, micro_batch_texts=1
    )
    metrics = learner.update(*batch, step=0)
    assert metrics["retriever/loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = gradient_of(learner)
    for name, gradient in expected.items():
        if gradient is not None:
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_one_side_whole_is_refused_for_an_encoder_whose_vectors_are_whole():
    with pytest.raises(ConfigError, match="'one_whole' is for"):
        make(vectors="one_whole")
    with pytest.raises(ValidationError, match="'one_whole' is for semi_parametric"):
        RunConfig(
            retrieval=RetrievalConfig(kind="dense"),
            algorithm=OpenRAGConfig(vectors="one_whole"),
        )
