"""The two retrievers of JSA: their domain, their gradient, and what is saved of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jsa_runs import jsa_config
from loop_runs import changed
from openrag_runs import Task, make_task
from tiny_models import save_tiny_encoder

from rlrag.algorithms import jsa
from rlrag.config import RunConfig
from rlrag.errors import ConfigError, NonFiniteLossError
from rlrag.records import Question
from rlrag.retrieval.dense.encoder import TextEncoder
from rlrag.retrieval.trainable.query_encoder import (
    open_query_encoder,
    save_with_passages,
    static_index,
)
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.jsa.retrievers import Domain, JSARetrievers, target_answer
from rlrag.training.learners.optimiser import linear_schedule


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """An untrained encoder, and what all runs share on disk."""
    directory = tmp_path_factory.mktemp("jsa_retrievers")
    save_tiny_encoder(directory / "encoder")
    return directory


@pytest.fixture(scope="module")
def config(models) -> RunConfig:
    return jsa_config(models)


@pytest.fixture(scope="module")
def task(config) -> Task:
    return make_task(config)


@pytest.fixture(scope="module")
def retrievers(config, task) -> JSARetrievers:
    index = static_index(task.library.retrievers.primary)
    return JSARetrievers(config, index, len(task.library.corpus), 10, SingleWorker())


def test_a_domain_is_what_either_retriever_ranks_first_normalised_on_it(retrievers, task, config):
    """Against the index's own search and a softmax by hand."""
    questions = task.data.train.questions[:3]
    domain = retrievers.domain(questions)
    corpus = task.library.corpus
    vectors_PD = torch.tensor(np.array(task.library.retrievers.passage_vectors))
    for place, question in enumerate(questions):
        texts = [question.question, f"{question.question} [SEP] {question.golden_answers[0]}"]
        with torch.no_grad():
            both_2D = retrievers.prior.embed(texts, "question").vectors_BD
        scores_2P = (both_2D @ vectors_PD.T).double()
        first = [set(scores_P.topk(6).indices.tolist()) for scores_P in scores_2P]
        union = sorted(first[0] | first[1])
        rows_N = domain.rows_BN[place]
        assert rows_N[rows_N >= 0].tolist() == union
        for scores_P, logp_BN in zip(
            scores_2P, (domain.prior_logp_BN, domain.posterior_logp_BN), strict=True
        ):
            expected = (scores_P[union] / config.jsa.temperature).softmax(dim=0)
            found = logp_BN[place].detach().exp()
            assert torch.allclose(found[: len(union)], expected, atol=1e-4)
            assert found[len(union) :].sum() == 0
    assert all(0 <= row < len(corpus) for row in domain.rows_BN.max(axis=1))


def test_the_weights_gradient_is_that_of_one_pass_without_pieces(config, task, models):
    """AdamW's first moment after one step against autograd; the posterior's own and the prior's."""
    index = static_index(task.library.retrievers.primary)
    pieces = changed(config, algorithm={"micro_batch_texts": 2, "max_grad_norm": 1e9})
    learner = JSARetrievers(pieces, index, len(task.library.corpus), 10, SingleWorker())
    questions = task.data.train.questions[:5]
    domain = learner.domain(questions)
    f_BN = torch.rand(domain.rows_BN.shape, generator=torch.Generator().manual_seed(0)).double()
    f_BN = f_BN.masked_fill(torch.from_numpy(domain.rows_BN < 0), 0.0)
    f_BN /= f_BN.sum(dim=1, keepdim=True)
    texts = {
        "prior": [q.question for q in questions],
        "posterior": [f"{q.question} [SEP] {target_answer(q)}" for q in questions],
    }
    expected = {}
    for name, encoder in (("prior", learner.prior), ("posterior", learner.posterior)):
        vectors_BD = encoder.embed(texts[name], "question").vectors_BD
        rows_BN = torch.from_numpy(domain.rows_BN)
        passages = torch.from_numpy(index.vectors(np.maximum(domain.rows_BN, 0).ravel()))
        scores_BN = torch.einsum("bnd,bd->bn", passages.view(*rows_BN.shape, -1), vectors_BD)
        scores_BN = scores_BN.masked_fill(rows_BN < 0, -math.inf)
        logp_BN = jsa.domain_logp(scores_BN.double(), config.jsa.temperature)
        loss = -(f_BN * logp_BN.masked_fill(rows_BN < 0, 0.0)).sum() / len(questions)
        names, parameters = zip(*encoder.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        expected |= {f"{name}.{n}": g for n, g in zip(names, found, strict=True) if g is not None}
    learner.update(domain, f_BN, len(questions), 0)
    moments = learner.optimiser.tensors()
    assert expected
    for name, gradient in expected.items():
        found = moments[f"{name}:exp_avg"] / 0.1
        assert torch.allclose(found, gradient, rtol=1e-3, atol=1e-5), name


def open_learner(config: RunConfig, task: Task) -> JSARetrievers:
    index = static_index(task.library.retrievers.primary)
    return JSARetrievers(config, index, len(task.library.corpus), 10, SingleWorker())


def even_weights(domain: Domain) -> torch.Tensor:
    present_BN = torch.from_numpy(domain.rows_BN >= 0).double()
    return present_BN / present_BN.sum(dim=1, keepdim=True)


def test_the_gradient_is_clipped_and_reported_unclipped(config, task):
    """AdamW's first moment after one step is a tenth of the gradient that it was given."""
    questions = task.data.train.questions[:4]
    norms, moments = [], []
    for limit in (1e9, 1e-3):
        learner = open_learner(changed(config, algorithm={"max_grad_norm": limit}), task)
        domain = learner.domain(questions)
        norms.append(learner.update(domain, even_weights(domain), 4, 0)["retriever/grad_norm"])
        state = learner.optimiser.tensors()
        given = [10 * t.flatten() for name, t in state.items() if name.endswith(":exp_avg")]
        moments.append(torch.cat(given).norm().item())
    assert norms[0] == norms[1] > 1e-3
    assert moments == pytest.approx([norms[0], 1e-3], rel=1e-4)


def test_the_rate_warms_up_and_weights_decay_as_they_are_told_to(config, task):
    """Without a gradient AdamW shrinks each weight by rate times decay."""
    settings = changed(
        config,
        training={"warmup_steps": 4},
        algorithm={"weight_decay": 0.5, "learning_rate": 0.1, "max_grad_norm": 1e-30},
    )
    learner = open_learner(settings, task)
    before = {name: p.detach().clone() for name, p in learner.prior.named_parameters()}
    domain = learner.domain(task.data.train.questions[:2])
    metrics = learner.update(domain, even_weights(domain), 2, 1)
    rate = linear_schedule(1, 10, 4, 0.1)
    assert metrics["retriever/learning_rate"] == rate < linear_schedule(1, 10, 0, 0.1)
    for name, parameter in learner.prior.named_parameters():
        assert torch.allclose(parameter, before[name] * (1 - rate * 0.5), atol=1e-6), name


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(config, task):
    learner = open_learner(config, task)
    domain = learner.domain(task.data.train.questions[:2])
    for parameter in learner.posterior.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)  # the loss is finite
    before = [p.detach().clone() for p in learner.prior.parameters()]
    with pytest.raises(
        NonFiniteLossError, match=r"gradient of step 7 is not finite; lower algorithm"
    ):
        learner.update(domain, even_weights(domain), 2, 7)
    assert all(torch.equal(*both) for both in zip(before, learner.prior.parameters(), strict=True))


def test_a_search_in_pieces_is_one_search(config, task, retrievers):
    questions = [question.question for question in task.data.train.questions[:7]]
    pieces = open_learner(changed(config, algorithm={"micro_batch_texts": 3}), task)
    assert pieces.search(questions, 4).tolist() == retrievers.search(questions, 4).tolist()


def test_the_answer_that_is_trained_on():
    assert target_answer(Question("a", "?", (" ", "b", "c"))) == "b"
    assert target_answer(Question("a", "?", ("x", "B"), {"choices": ["A", "B"]})) == "B"


def test_what_is_saved_searches_the_index_that_it_was_trained_with(config, task, models, tmp_path):
    """The passages' encoder keeps its identity, so that their vectors need not be made again."""
    encoder = open_query_encoder(config.retrieval, config.cache_path)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    save_with_passages(encoder, config.retrieval, config.cache_path, tmp_path / "saved")
    before, after = (
        TextEncoder(place, "float32", 32, batch_size=4)
        for place in (models / "encoder", tmp_path / "saved")
    )
    texts = ["what does the lamp hold?", "the ledger says"]
    assert after.identity == before.identity
    assert before.question_weights_hash is None
    assert after.question_weights_hash is not None
    assert np.array_equal(before.encode(texts), after.encode(texts))
    with torch.no_grad():
        expected = encoder.embed(texts, "question").vectors_BD.numpy()
    assert np.allclose(after.encode(texts, "question"), expected, atol=1e-5)
    assert not np.allclose(expected, before.encode(texts, "question"), atol=1e-3)
    # Trained again it starts from the tuned encoder of questions.
    again = config.retrieval.model_copy(update={"encoder": str(tmp_path / "saved")})
    with torch.no_grad():
        found = open_query_encoder(again, config.cache_path).embed(texts, "question").vectors_BD
    assert np.allclose(found.numpy(), expected, atol=1e-5)


def test_a_retriever_without_vectors_is_refused(config, task):
    lexical = config.retrieval.model_copy(update={"kind": "bm25"})
    with pytest.raises(ConfigError, match="'bm25' has no encoder to train"):
        open_query_encoder(lexical, config.cache_path)
    with pytest.raises(ConfigError, match="'bm25' has no index that is searched by vectors"):
        static_index(task.library.retrievers.components["bm25"])
