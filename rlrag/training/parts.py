"""Builds the selector and the generator that a run trains, with their learners.

The selector is a policy over selections, the generator a causal language model. Each has its own
learner and optimiser; a part that is not trained has none. Both M-steps use the weights of one
E-step, so that neither waits for the other.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, GenerationError
from rlrag.files.directories import restore_weights
from rlrag.generation.build import resolve_config
from rlrag.generation.prompts import PromptBuilder, shares_of
from rlrag.generation.weights import GeneratorWeights
from rlrag.models.directories import resolve_model
from rlrag.pipeline import TrainingData, open_policy
from rlrag.retrieval.cut_tokens import sampled_texts
from rlrag.selection.build import TrainablePolicy
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.selection.unread import count_unread, unread_warning
from rlrag.training.distributed.workers import Workers
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.dro.imitation import LEARNING_RATE, imitate, orders_of_run
from rlrag.training.learners.generator import (
    BuiltExamples,
    GeneratorLearner,
    thinned,
    weighted_examples,
)
from rlrag.training.learners.generator_model import TrainableGenerator, load_base
from rlrag.training.learners.selector import SelectorLearner
from rlrag.training.schedule import BatchSchedule
from rlrag.training.trainer import Files, Metrics

logger = logging.getLogger(__name__)


class TrainedParts:
    """Selector and generator of one worker; all workers hold the same weights at every step."""

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        prompts: PromptBuilder,
        schedule: BatchSchedule,
        workers: Workers,
    ) -> None:
        """Build the untrained parts; `warm_start` or `load` comes next."""
        self._config = config
        self._data = data
        self._prompts = prompts
        self._schedule = schedule
        self._workers = workers
        base = _open_base(config) if config.generator_training.share_base else None
        self.policy: TrainablePolicy = open_policy(config, data.train, base)
        self.initial = copy.deepcopy(self.policy)
        self._warn_of_unread()
        self._selector: SelectorLearner | None = None
        if "selector" in config.algorithm.parts:
            self._selector = SelectorLearner(
                self.policy,
                self.initial,
                config.dro,
                config.training,
                schedule.num_steps,
                workers,
            )
        self.generator: TrainableGenerator | None = None
        self._generator: GeneratorLearner | None = None
        if "generator" in config.algorithm.parts:
            self.generator = open_trainable_generator(config, base)
            self._generator = GeneratorLearner(
                self.generator,
                config.generator_training,
                config.training,
                schedule.num_steps,
                workers,
            )

    def _warn_of_unread(self) -> None:
        """Say once what the policy does not read of passages, where it reads their texts."""
        selector = self._config.selector
        if not selector.reads_texts or self._workers.rank:
            return
        model_dir = resolve_model(selector.model, self._config.cache_path)
        texts = sampled_texts(self._data.train.corpus)
        if warning := unread_warning(count_unread(selector, model_dir, texts)):
            logger.warning("%s", warning)

    def warm_start(self) -> None:
        """Bring a policy that starts anywhere to the order that is imitated, where configured.

        Raises:
            DataError: when `selector.imitation_run` is missing, no run, or one of other questions.
        """
        selector = self._config.selector
        if selector.imitation_steps and isinstance(self.policy, ListwiseLMPolicy):
            imitate(
                self.policy,
                self._data.train,
                steps=selector.imitation_steps,
                batch_size=self._config.training.batch_size,
                learning_rate=LEARNING_RATE,
                seed=self._config.seed,
                orders=self._orders_to_imitate(),
                prior_scale=selector.prior_scale,
            )
            self.initial.load_state_dict(self.policy.state_dict())

    def _orders_to_imitate(self) -> np.ndarray | None:
        """Positions of shape (Q, K) as a given run ranks them; None for the retriever's order."""
        path = self._config.selector.imitation_run
        if path is None:
            return None
        num_selected = self._config.environment.num_selected
        found = orders_of_run(Path(path).expanduser(), self._data.train, num_selected)
        if (found.num_short or found.num_missing) and self._workers.rank == 0:
            logger.warning(
                "selector.imitation_run %s has no ranking for %d of %d questions and fewer than "
                "%d candidates for %d others; their rankings are completed in the retriever's "
                "order",
                path,
                found.num_missing,
                len(self._data.train),
                num_selected,
                found.num_short,
            )
        return found.positions_QK

    def update(self, batch: RewardedBatch, weights_BM: torch.Tensor, step: int) -> Metrics:
        """One M-step of every trained part on this worker's share of a batch.

        Raises:
            GenerationError: when fine-tuning cannot build more prompts than is allowed.
        """
        metrics: Metrics = {}
        if self._selector is not None:
            metrics |= self._selector.update(batch, weights_BM, step)
        if self._generator is not None:
            counted = any(batch.trajectories.golden_logps)
            if self._config.reward.golden_answers == "all" and not counted:
                raise ConfigError(
                    f"environment.id {self._config.environment.id!r} has no golden_logps in its "
                    "info, which reward.golden_answers 'all' needs; use 'likeliest'"
                )
            seeds = [[self._config.seed, 2, step, int(row)] for row in batch.question_rows]
            limit = self._config.generator_training.sequences_per_question
            built = weighted_examples(
                self._data.train.questions,
                self._prompts,
                batch,
                thinned(weights_BM, limit, seeds),
            )
            if self._config.algorithm.name == "sft":  # no reward has counted these prompts
                metrics |= self._described(built)
            batch_size = self._config.training.batch_size
            metrics |= self._generator.update(built.examples, batch_size, step)
        return metrics

    def _described(self, built: BuiltExamples) -> Metrics:
        """What the prompts of the whole batch left out, and how many could not be built."""
        sums = torch.from_numpy(np.append(built.prompt_counts.values(), len(built.errors)))
        *counts, num_failed = self._workers.sum(sums).tolist()
        training = self._config.training
        if num_failed > training.max_failed_share * training.batch_size:
            first = built.errors[0] if built.errors else "see the other workers' logs"
            raise GenerationError(
                f"{num_failed:.0f} of {training.batch_size} prompts of a batch could not be built, "
                f"more than training.max_failed_share {training.max_failed_share} allows; the "
                f"first: {first}"
            )
        metrics: Metrics = {**shares_of(np.array(counts)), "num_failed": num_failed}
        if built.errors:
            metrics["failures"] = sorted({str(error) for error in built.errors})
        return metrics

    def generator_weights(self, version: int) -> GeneratorWeights | None:
        """The trained generator as engines take it over; None where it is not trained."""
        if self.generator is None:
            return None
        dtype = resolve_config(self._config.generator, self._config.training.launcher).dtype
        return self.generator.published_weights(version, getattr(torch, dtype))

    def tensors(self) -> Files:
        """Everything that a checkpoint keeps, by file."""
        files: dict[str, Mapping[str, torch.Tensor]] = {
            "policy": copy.copy(self.policy.state_dict())
        }
        if self._selector is not None:
            files["optimizer"] = self._selector.optimiser.tensors()
        if self.generator is not None and self._generator is not None:
            files["generator"] = self.generator.trainable_tensors()
            files["generator_optimizer"] = self._generator.optimiser.tensors()
        return files

    def load(self, files: Files) -> None:
        """Take over the weights and, where they are given, the optimisers' states.

        Raises:
            CheckpointError: when tensors do not fit the configured parts.
        """
        restore_weights(self.policy, files["policy"], "the policy of the checkpoint")
        if self._selector is not None and "optimizer" in files:
            self._selector.optimiser.load(files["optimizer"])
        if self.generator is not None and self._generator is not None:
            self.generator.load_trainable(files["generator"])
            if "generator_optimizer" in files:
                self._generator.optimiser.load(files["generator_optimizer"])

    def load_initial(self, files: Files) -> None:
        """Take over the policy that training started from."""
        restore_weights(self.initial, files["policy"], "the first policy")


def open_trainable_generator(config: RunConfig, base: Any = None) -> TrainableGenerator:
    """The untrained generator of a run, on a worker's device, around `base` where it is given."""
    return TrainableGenerator(
        resolve_model(config.generator.model, config.cache_path),
        config.generator_training,
        _device(config),
        config.seed,
        base,
    )


def _open_base(config: RunConfig) -> Any:
    """The one model whose weights selector and generator adapt, on a worker's device."""
    model_dir = resolve_model(config.generator.model, config.cache_path)
    return load_base(model_dir).to(_device(config))


def _device(config: RunConfig) -> str:
    return "cuda" if config.training.worker_gpus else "cpu"


def open_whole_generator(config: RunConfig) -> TrainableGenerator:
    """The same in one process, whatever it was sharded over in training."""
    training = config.generator_training.model_copy(update={"sharding": "replicated"})
    return open_trainable_generator(config.model_copy(update={"generator_training": training}))
