"""A small encoder with bags of words and a batch: what the retriever's learner is tested on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from rlrag.algorithms.contrastive import openrag_loss
from rlrag.config import OpenRAGConfig, TrainingConfig
from rlrag.retrieval.trainable.protocol import Embedded, Role
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.learners.retriever import RetrieverLearner

BETA1 = 0.9  # AdamW's default; its first moment after one step is (1 - BETA1) * gradient
SIZE = 12
NAN = float("nan")
SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.0, "max_grad_norm": 1e6}
QUESTIONS = [f"what is {'very ' * (i % 3)}item {i}" for i in range(8)]
POSITIVES = [f"item {i} is {'long ' * (7 * i % 5)}answer {i}" for i in range(8)]
NEGATIVES = [f"nothing {i} {'more ' * (5 * i % 7)}of it" for i in range(8)]
BATCH = (QUESTIONS, POSITIVES, NEGATIVES)


class WordEncoder(torch.nn.Module):
    """Vectors in the space of hashed words, from counts of words; questions have own weights.

    It counts the texts that it embeds, and those that it holds a graph of at once.
    """

    def __init__(self, with_bags: bool = True, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.question = torch.nn.Parameter(
            torch.randn(SIZE, SIZE, generator=generator).to(dtype) / 2
        )
        self.passage = torch.nn.Parameter(
            torch.randn(SIZE, SIZE, generator=generator).to(dtype) / 2
        )
        self.with_bags = with_bags
        self.num_texts, self.num_graphs, self.most_graphs = 0, 0, 0
        self.lengths: list[list[int]] = []

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        weight = self.question if role == "question" else self.passage
        counts_BD = torch.zeros(len(texts), SIZE, dtype=weight.dtype)
        for row, text in enumerate(texts):
            for word in text.split():
                counts_BD[row, zlib.crc32(word.encode()) % SIZE] += 1
        vectors_BD = torch.nn.functional.elu(counts_BD @ weight) + 1
        self.num_texts += len(texts)
        self.lengths.append(sorted({len(text) for text in texts}))
        if vectors_BD.requires_grad:
            self.num_graphs += len(texts)
            self.most_graphs = max(self.most_graphs, self.num_graphs)
            vectors_BD.register_hook(lambda gradient: self._release(len(gradient)))
        return Embedded(vectors_BD, (counts_BD > 0).float() if self.with_bags else None)

    def _release(self, num: int) -> None:
        self.num_graphs -= num

    def save_pretrained(self, directory: Path) -> None:
        torch.save(self.state_dict(), directory / "weights.pt")


def make(
    encoder: torch.nn.Module | None = None,
    workers=None,
    micro_batch_texts: int = 100,
    num_steps: int = 10,
    temperature: float = 0.5,
    likelihood_temperature: float = 1.0,
    warmup_steps: int = 0,
    **settings,
) -> tuple[torch.nn.Module, RetrieverLearner]:
    encoder = encoder or WordEncoder()
    openrag = OpenRAGConfig(
        temperature=temperature,
        likelihood_temperature=likelihood_temperature,
        micro_batch_texts=micro_batch_texts,
        **SETTINGS | settings,
    )
    training = TrainingConfig(warmup_steps=warmup_steps)
    learner = RetrieverLearner(encoder, training, openrag, num_steps, workers or SingleWorker())
    return encoder, learner


def gradient_of(learner: RetrieverLearner) -> dict[str, torch.Tensor]:
    """The gradient of a learner's only step."""
    return {
        name.removesuffix(":exp_avg"): tensor / (1 - BETA1)
        for name, tensor in learner.optimiser.tensors().items()
        if name.endswith(":exp_avg")
    }


def plain_gradient(encoder, batch, excluded_NP=None) -> tuple[float, dict[str, torch.Tensor]]:
    """Everything embedded at once, and one backward pass."""
    questions, positives, negatives = batch
    loss = openrag_loss(
        encoder.embed(questions, "question"),
        encoder.embed([*positives, *negatives], "passage"),
        0.5,
        excluded_NP,
    ).mean()
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {
        name: torch.zeros_like(parameter) if found is None else found
        for name, parameter, found in zip(names, parameters, gradients, strict=True)
    }


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol=1e-12) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=atol), name
