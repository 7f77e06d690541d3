"""JSA's generator update, including the weights of the engines.

L_G = - sum_h f(h) log p(y | x, h) (JSA-RAG, arXiv 2508.18168), one passage in context. Where the
target's likelihood is the mean over an answer's tokens, so is the loss, as in the released code.

Shape letters: B questions, N passages of a domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import PromptTooLongError
from rlrag.generation.build import resolve_config
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.records import Question
from rlrag.training.distributed.engines import hand_over
from rlrag.training.distributed.workers import Workers
from rlrag.training.jsa.retrievers import target_answer
from rlrag.training.learners.generator import GeneratorLearner, WeightedExample, thinned
from rlrag.training.parts import open_trainable_generator
from rlrag.training.trainer import Files


class JSAGenerator:
    """The generator where it learns beside the retrievers.

    Args:
        config: The whole run.
        corpus: Where passages are looked up.
        prompts: Builds what the engines are asked too.
        engines: What scores and answers; they get the weights of every step.
        num_steps: Steps of the whole run, for the learning rate.
        workers: Whom a batch is shared with.
    """

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        prompts: PromptBuilder,
        engines: Generator,
        num_steps: int,
        workers: Workers,
    ) -> None:
        self._config = config
        self._corpus = corpus
        self._prompts = prompts
        self._engines = engines
        self._workers = workers
        self.model = open_trainable_generator(config)
        self._learner = GeneratorLearner(
            self.model, config.generator_training, config.training, num_steps, workers
        )
        self._published = 0

    def publish(self, version: int, again: bool = False) -> None:
        """Give the engines the present weights, if they have older ones; all workers together.

        Args:
            version: Number of the weights: the steps that they learned for.
            again: Send them whatever was published, as engines may have outlived a worker.
        """
        if version == self._published and not again:
            return
        dtype = resolve_config(self._config.generator, self._config.training.launcher).dtype
        weights = self.model.published_weights(version, getattr(torch, dtype))
        hand_over(weights, self._engines, self._workers)
        self._published = version

    def update(
        self,
        questions: Sequence[Question],
        rows_BN: np.ndarray,
        posterior_BN: torch.Tensor,
        step: int,
        seeds: Sequence[Sequence[int]],
    ) -> dict[str, float]:
        """One optimiser step on this worker's share of a batch; see `GeneratorLearner.update`.

        `posterior_BN` has the weights f(h) of the passages `rows_BN`.
        """
        limit = self._config.generator_training.sequences_per_question
        weights_BN = thinned(posterior_BN, limit, seeds).numpy()
        examples = [
            example
            for question, rows_N, weights_N in zip(questions, rows_BN, weights_BN, strict=True)
            for example in self._examples(question, rows_N, weights_N)
        ]
        return self._learner.update(examples, self._config.training.batch_size, step)

    def tensors(self) -> Files:
        """Weights and optimiser, for a checkpoint."""
        return {
            "generator": self.model.trainable_tensors(),
            "generator_optimizer": self._learner.optimiser.tensors(),
        }

    def load(self, files: Files) -> None:
        """Take over the weights and, where it is given, the optimiser's state."""
        self.model.load_trainable(files["generator"])
        if "generator_optimizer" in files:
            self._learner.optimiser.load(files["generator_optimizer"])

    def _examples(
        self, question: Question, rows_N: np.ndarray, weights_N: np.ndarray
    ) -> list[WeightedExample]:
        answer_ids = self._prompts.encode_target(target_answer(question))
        scale = len(answer_ids) if self._config.jsa.likelihood == "mean" else 1
        examples = []
        for n in np.flatnonzero(weights_N):
            try:
                prompt = self._prompts.build(question, [self._corpus[int(rows_N[n])]])
            except PromptTooLongError:  # its score failed and was counted
                continue
            weight = float(weights_N[n]) / scale
            examples.append(WeightedExample(prompt.token_ids, answer_ids, weight))
        return examples
