"""The JSA trainer: retriever and generator.

    domain     both retrievers search the index with their present encoders of questions
    sample     the posterior retriever proposes passages, the generator scores them, and each gets
               the weight of its posterior or of a Metropolis chain's visits (`jsa.weights`)
    step       both retrievers, and the generator where it is a part, move towards the weights

All of it is joint stochastic approximation (JSA-RAG, arXiv 2508.18168): one step each from one set
of weights, computed with the parts before the step. The passages' vectors never change, so that
what is searched in training is what the tuned retriever searches. The posterior retriever serves
training alone and is no part of the bundle.

Departures from the released code, besides those of `rlrag.algorithms.jsa`: several questions a
step; the learning rate falls linearly and not by a cosine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import numpy as np
import torch

from rlrag.config import RunConfig
from rlrag.data.questions import answerable_rows
from rlrag.generation.prompt_counts import shares_of
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import Library, TrainingData
from rlrag.retrieval.query_encoder import static_index
from rlrag.rewards.answering import AnsweringReward
from rlrag.storage import restore_weights
from rlrag.training.generator_model import TrainableGenerator
from rlrag.training.jsa_generator import JSAGenerator
from rlrag.training.jsa_retrievers import JSARetrievers
from rlrag.training.jsa_sampling import PosteriorSampler
from rlrag.training.loop import Before, Files, Metrics
from rlrag.training.passage_judge import PassageJudge
from rlrag.training.retriever_validation import best_retriever_by, validate_retriever
from rlrag.training.schedule import jsa_schedule
from rlrag.training.watchdog import under_way
from rlrag.training.workers import Workers

_PER_WEIGHED = ("num_visited", "answer_logp")
_PER_QUESTION = ("num_domain", "num_scored", "ess", "kl")


class JSATrainer:
    """JSA-RAG (arXiv 2508.18168); implements `loop.Trainer`.

    Args:
        config: The whole run.
        library: The corpus and the retriever whose encoder of questions is trained.
        data: Training questions and held-back ones.
        generator: Scores and answers; counts the tokens.
        prompts: Builds what it is asked.
        judge: Scores answers behind single passages.
        answering: Answers for validation.
        workers: This worker's view of the group.
    """

    before = Before()

    def __init__(
        self,
        config: RunConfig,
        library: Library,
        data: TrainingData,
        generator: Generator,
        prompts: PromptBuilder,
        judge: PassageJudge,
        answering: AnsweringReward,
        workers: Workers,
    ) -> None:
        self._config = config
        self._corpus = library.corpus
        self._validation = data.validation
        self.best_by = best_retriever_by(data.validation)
        self._generator = generator
        self._judge = judge
        self._answering = answering
        self._workers = workers
        self._questions = data.train.questions
        self._usable = answerable_rows(data.train.questions)
        self._schedule = jsa_schedule(config, len(self._usable))
        index = static_index(library.retrievers.primary)
        self.retrievers = JSARetrievers(config, index, len(library.corpus), self.num_steps, workers)
        self._sampler = PosteriorSampler(
            library.corpus, judge, prompts, config.jsa, config.training.max_failed_share
        )
        self._trained_generator: JSAGenerator | None = None
        if config.trains_generator:
            self._trained_generator = JSAGenerator(
                config, library.corpus, prompts, generator, self.num_steps, workers
            )

    @property
    def generator(self) -> TrainableGenerator | None:
        """The generator that learns, where it does."""
        return self._trained_generator.model if self._trained_generator else None

    @property
    def num_steps(self) -> int:
        """Batches of all passes."""
        return self._schedule.num_steps

    def may_pause(self, step: int) -> bool:
        """Always: chains begin anew with every step."""
        return True

    def asks_generator(self, step: int) -> bool:
        """Always: weights are what it makes of passages."""
        return True

    def warm_start(self) -> None:
        """Nothing: step 0 is the retriever as it came."""

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Sample passages for each question of the batch and train on them."""
        started, before = time.monotonic(), self._tokens()
        prompts = self._judge.prompt_counts.values()
        self._publish(step)
        places = range(self._workers.rank, self._config.training.batch_size, self._workers.size)
        rows = self._usable[self._schedule.rows(step)[places]]
        seeds = [self._schedule.sampling_seed(step, place) for place in places]
        questions = [self._questions[row] for row in rows]
        domain = self.retrievers.domain(questions)
        weighed = self._sampler.sample(questions, domain, seeds)
        collected_at = time.monotonic()
        under_way(f"learning in step {step + 1}")
        metrics = self._described(weighed.sums)
        if weighed.failures:
            metrics["failures"] = weighed.failures
        # The generator learns from some of the same prompts.
        prompts = self._judge.prompt_counts.values() - prompts
        metrics |= shares_of(self._workers.sum(torch.from_numpy(prompts)).numpy())
        batch_size = self._config.training.batch_size
        metrics |= self.retrievers.update(domain, weighed.weights_BN, batch_size, step)
        if self._trained_generator is not None:
            thinning = [[self._config.seed, 2, step, int(row)] for row in rows]
            metrics |= self._trained_generator.update(
                questions, domain.rows_BN, weighed.weights_BN, step, thinning
            )
        tokens = self._workers.sum(torch.from_numpy(self._tokens() - before)).tolist()
        return metrics | {
            "epoch": self._schedule.epoch(step + 1),
            "generator_tokens_spent": tokens[0],
            "generator_tokens_saved": tokens[1],
            "collect_s": collected_at - started,
            "learn_s": time.monotonic() - collected_at,
        }

    def validate(self, step: int) -> Metrics:
        """Answers from the first K passages of the prior with present weights."""
        if self._validation is None:
            return {}
        self._publish(step)
        return dict(
            validate_retriever(
                self._validation,
                self.retrievers.search,
                self._corpus,
                self._answering,
                self._config.environment.num_selected,
                self._workers,
            )
        )

    def tensors(self) -> Files:
        """Both encoders of questions and their optimiser, and the generator where it learns."""
        files: dict[str, Mapping[str, torch.Tensor]] = {
            "retriever": copy.copy(dict(self.retrievers.prior.state_dict())),
            "posterior": copy.copy(dict(self.retrievers.posterior.state_dict())),
            "retriever_optimizer": self.retrievers.optimizer_tensors(),
        }
        if self._trained_generator is not None:
            files |= self._trained_generator.tensors()
        return files

    def load(self, files: Files) -> None:
        """Take over the weights and, where they are given, the optimisers' states."""
        for name, encoder in (
            ("retriever", self.retrievers.prior),
            ("posterior", self.retrievers.posterior),
        ):
            restore_weights(encoder, files[name], f"the {name} of the checkpoint")
        if "retriever_optimizer" in files:
            self.retrievers.load_optimizer(files["retriever_optimizer"])
        if self._trained_generator is not None:
            self._trained_generator.load(files)

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Continue; engines that outlived an earlier worker get the checkpoint's weights."""
        self.load(files)
        self._publish(step, again=True)

    def close(self) -> None:
        """Nothing runs ahead."""

    def _publish(self, version: int, again: bool = False) -> None:
        if self._trained_generator is not None:
            self._trained_generator.publish(version, again)

    def _described(self, sums: Mapping[str, float]) -> Metrics:
        """Means over the whole batch of what describes weights and chains.

        The acceptance rate is over the proposals that met a state, so that a chain of one step has
        none.
        """
        names = list(sums)
        totals = self._workers.sum(torch.tensor(list(sums.values()), dtype=torch.float64))
        found = dict(zip(names, totals.tolist(), strict=True))
        metrics: Metrics = {"num_failed": found["num_failed"]}
        if found["num_tested"]:
            metrics["jsa/acceptance"] = found["num_accepted"] / found["num_tested"]
        num_questions = self._config.training.batch_size
        metrics |= {f"jsa/{name}": found[name] / num_questions for name in _PER_QUESTION}
        num_weighed = max(found["num_weighed"], 1.0)
        return metrics | {f"jsa/{name}": found[name] / num_weighed for name in _PER_WEIGHED}

    def _tokens(self) -> np.ndarray:
        return np.array([self._generator.tokens.spent, self._generator.tokens.saved], np.float64)
