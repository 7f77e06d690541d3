"""A step of the retriever split over workers, and its distillation from likelihoods."""

from __future__ import annotations

import copy
import math
import multiprocessing

import numpy as np
import pytest
import torch
from retriever_tasks import (
    BATCH,
    NAN,
    QUESTIONS,
    WordEncoder,
    assert_close,
    gradient_of,
    make,
)

from rlrag.algorithms.contrastive import likelihood_distillation
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import TorchWorkers

WEIGHTS_ATOL = 1e-8


def run_group(shares, batch_of, update="update", **settings) -> list[tuple]:
    """Each worker's metrics, weights and moments after two steps on its share."""

    def task(worker, share):
        def work():
            encoder, learner = make(workers=worker, **settings)
            for step in range(2):
                metrics = getattr(learner, update)(*batch_of(share), step=step)
            return metrics, dict(encoder.named_parameters()), gradient_of(learner)

        return work

    group = make_group(len(shares))
    return run_together([task(w, s) for w, s in zip(group, shares, strict=True)])


def contrastive_share(share: slice) -> tuple[list[str], ...]:
    return tuple(part[share] for part in BATCH)


@pytest.mark.parametrize("micro_batch_texts", [3, 100])
@pytest.mark.parametrize(
    "shares",
    [
        [slice(0, 4), slice(4, 8)],
        [slice(0, 3), slice(3, 8)],
        [slice(0, 0), slice(0, 8)],
        [slice(0, 2), slice(2, 2), slice(2, 8)],
    ],
)
def test_workers_with_shares_take_the_steps_of_one_with_the_whole(shares, micro_batch_texts):
    ((alone, weights, gradient),) = run_group([slice(0, 8)], contrastive_share)
    for metrics, found, moments in run_group(
        shares, contrastive_share, micro_batch_texts=micro_batch_texts
    ):
        assert metrics == pytest.approx(alone, rel=1e-9)
        assert_close(found, weights, atol=WEIGHTS_ATOL)
        assert_close(moments, gradient, atol=1e-10)


def test_workers_without_bags_agree_too():
    def steps(shares):
        def task(worker, share):
            def work():
                _, learner = make(WordEncoder(with_bags=False), worker)
                return learner.update(*contrastive_share(share), step=0), gradient_of(learner)

            return work

        group = make_group(len(shares))
        return run_together([task(w, s) for w, s in zip(group, shares, strict=True)])

    ((alone, gradient),) = steps([slice(0, 8)])
    for metrics, found in steps([slice(0, 0), slice(0, 8)]):
        assert metrics == pytest.approx(alone, rel=1e-9)
        assert_close(found, gradient, atol=1e-10)


def _work(rank: int, port: int, out) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    encoder, learner = make(workers=TorchWorkers(), micro_batch_texts=5)
    share = slice(4 * rank, 4 * rank + 4)
    for step in range(2):
        metrics = learner.update(*contrastive_share(share), step=step)
    weights = {name: p.detach().numpy() for name, p in encoder.named_parameters()}
    out.put((rank, metrics, weights))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_four_take_the_steps_of_one_with_eight(unused_port):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=_work, args=(rank, unused_port, out)) for rank in range(2)]
    for process in processes:
        process.start()
    ((alone, weights, _),) = run_group([slice(0, 8)], contrastive_share)
    for _ in processes:
        _, metrics, found = out.get(timeout=600)
        assert metrics == pytest.approx(alone, rel=1e-9)
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        assert_close(tensors, weights, atol=WEIGHTS_ATOL)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


PASSAGES = [[f"text {q} {n} {'so ' * (n % 3)}" for n in range(2 + q % 3)] for q in range(8)]
LIKELIHOODS = np.full((8, 4), NAN)
for _q, _texts in enumerate(PASSAGES):
    LIKELIHOODS[_q, : len(_texts)] = [-1.0 - (3 * _q + 5 * n) % 7 for n in range(len(_texts))]
LIKELIHOODS[5, 1] = NAN  # a passage that could not be scored


def kl_share(share: slice) -> tuple[list[str], list[list[str]], np.ndarray]:
    width = max((len(texts) for texts in PASSAGES[share]), default=0)
    return QUESTIONS[share], PASSAGES[share], LIKELIHOODS[share, :width]


@pytest.mark.parametrize("micro_batch_texts", [1, 6, 100])
def test_a_distillation_step_is_that_of_a_loop_over_questions(micro_batch_texts):
    encoder, learner = make(micro_batch_texts=micro_batch_texts, likelihood_temperature=2.0)
    plain = copy.deepcopy(encoder)
    losses, hits = [], 0
    for question, texts, logp in zip(QUESTIONS, PASSAGES, LIKELIHOODS, strict=True):
        question_1D = plain.embed([question], "question").vectors_BD
        scores_1N = question_1D @ plain.embed(texts, "passage").vectors_BD.T
        kept = [n for n in range(len(texts)) if not math.isnan(logp[n])]
        logp_1N = torch.from_numpy(logp[kept])[None]
        losses.append(likelihood_distillation(scores_1N[:, kept], logp_1N, 0.5, 2.0))
        hits += int(scores_1N[0, kept].argmax() == logp_1N[0].argmax())
    loss = torch.cat(losses).mean()
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    metrics = learner.update_kl(QUESTIONS, PASSAGES, LIKELIHOODS, step=0)
    assert metrics["retriever/loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert metrics["retriever/accuracy"] == hits / 8
    names = [name for name, _ in plain.named_parameters()]
    assert_close(gradient_of(learner), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize(
    "shares", [[slice(0, 4), slice(4, 8)], [slice(0, 7), slice(7, 8)], [slice(0, 8), slice(8, 8)]]
)
def test_workers_distil_together_what_one_distils_alone(shares):
    ((alone, weights, gradient),) = run_group([slice(0, 8)], kl_share, "update_kl")
    for metrics, found, moments in run_group(shares, kl_share, "update_kl", micro_batch_texts=4):
        assert metrics == pytest.approx(alone, rel=1e-9)
        assert_close(found, weights, atol=WEIGHTS_ATOL)
        assert_close(moments, gradient, atol=1e-10)


def test_distillation_pulls_towards_the_likelier_passage():
    _, learner = make(num_steps=100)
    question, texts, logp = ["which"], [["first text", "other text"]], torch.tensor([[-9.0, -1.0]])
    losses = [
        learner.update_kl(question, texts, logp, step)["retriever/loss"] for step in range(40)
    ]
    assert losses[-1] < 0.1 * losses[0]
    assert learner.update_kl(question, texts, logp, 40)["retriever/accuracy"] == 1.0
