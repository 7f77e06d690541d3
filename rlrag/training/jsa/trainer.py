"""The JSA trainer: trains retriever and generator jointly.

    domain     both retrievers search the index with their present encoders of questions
    sample     the posterior retriever proposes passages, the generator scores them, and each gets
               the weight of its posterior or of a Metropolis chain's visits (`algorithm.weights`)
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

import torch

from rlrag.data.questions import answerable_rows
from rlrag.files.directories import restore_weights
from rlrag.generation.prompts import shares_of
from rlrag.pipeline import sampling_of
from rlrag.retrieval.trainable.query_encoder import static_index
from rlrag.runs.watchdog import under_way
from rlrag.training.jsa.generator import JSAGenerator
from rlrag.training.jsa.retrievers import JSARetrievers
from rlrag.training.jsa.sampling import PosteriorSampler
from rlrag.training.openrag.passage_judge import PassageJudge
from rlrag.training.schedule import jsa_schedule
from rlrag.training.trainer import Files, Metrics, Trainer, TrainerContext
from rlrag.training.validation import best_retriever_by, validate_retriever

_PER_WEIGHED = ("num_visited", "answer_logp")
_PER_QUESTION = ("num_domain", "num_scored", "ess", "kl")


class JSATrainer(Trainer):
    """JSA-RAG (arXiv 2508.18168)."""

    def __init__(self, context: TrainerContext) -> None:
        config, library, data = context.config, context.library, context.data
        self._context, self._config, self._workers = context, config, context.workers
        self._corpus = library.corpus
        self._validation = data.validation
        self.best_by = best_retriever_by(data.validation)
        self._judge = PassageJudge(context.generator, context.prompts, sampling_of(config))
        self._questions = data.train.questions
        self._usable = answerable_rows(data.train.questions)
        self._schedule = jsa_schedule(config, len(self._usable))
        self.num_steps = self._schedule.num_steps
        index = static_index(library.retrievers.primary)
        self.retrievers = JSARetrievers(
            config, index, len(library.corpus), self.num_steps, context.workers
        )
        self._sampler = PosteriorSampler(
            library.corpus,
            self._judge,
            context.prompts,
            config.jsa,
            config.training.max_failed_share,
        )
        self._trained_generator: JSAGenerator | None = None
        if config.trains_generator:
            self._trained_generator = JSAGenerator(
                config,
                library.corpus,
                context.prompts,
                context.generator,
                self.num_steps,
                context.workers,
            )
            self.generator = self._trained_generator.model

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Sample passages for each question of the batch and train on them."""
        started, before = time.monotonic(), self._context.num_tokens()
        prompts = self._judge.prompt_counts.values()
        self._publish(step)
        places, seeds = self._schedule.share(step, self._workers)
        rows = self._usable[places]
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
        tokens = self._workers.sum(torch.from_numpy(self._context.num_tokens() - before)).tolist()
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
                self._context.reward,
                self._config.environment.num_selected,
                self._workers,
            )
        )

    def tensors(self) -> Files:
        """Both encoders of questions and their optimiser, and the generator where it learns."""
        files: dict[str, Mapping[str, torch.Tensor]] = {
            "retriever": copy.copy(dict(self.retrievers.prior.state_dict())),
            "posterior": copy.copy(dict(self.retrievers.posterior.state_dict())),
            "retriever_optimizer": self.retrievers.optimiser.tensors(),
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
            self.retrievers.optimiser.load(files["retriever_optimizer"])
        if self._trained_generator is not None:
            self._trained_generator.load(files)

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Continue; engines that outlived an earlier worker get the checkpoint's weights."""
        self.load(files)
        self._publish(step, again=True)

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
