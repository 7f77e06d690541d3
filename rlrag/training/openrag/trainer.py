"""The OpenRAG trainer: trains the retriever.

    offline stage   pairs at random from the pools of the first retrieval
    online stage    pairs from what the retriever in training finds and the generator makes of it

Both stages take the same step on the pairs (OpenRAG, arXiv 2503.08398, sections 3.2 to 3.4). Which
passages a step trains on depends on the weights and the step's number alone.

Departures from the paper: the learning rate falls linearly over both stages together, and
checkpoints are validated on late-parametric retrieval of `algorithm.num_online` passages, not of
100.

Shape letters: B questions of a step, M passages found for each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping

import numpy as np
import torch

from rlrag.files.directories import restore_weights
from rlrag.generation.prompts import shares_of
from rlrag.pipeline import sampling_of
from rlrag.retrieval.trainable.late_parametric import LateParametricRetriever
from rlrag.retrieval.trainable.open import (
    open_first_stage,
    open_trainable_encoder,
    searched_index,
)
from rlrag.runs.watchdog import under_way
from rlrag.training.learners.retriever import RetrieverLearner
from rlrag.training.openrag.index_refresh import ProcessBuild, RayBuild, RefreshedIndex
from rlrag.training.openrag.pairs import PairFinder
from rlrag.training.openrag.passage_judge import PassageJudge
from rlrag.training.openrag.pools import load_pools
from rlrag.training.schedule import num_offline_steps, openrag_schedule
from rlrag.training.trainer import Before, Files, Metrics, Trainer, TrainerContext
from rlrag.training.validation import best_retriever_by, validate_retriever


class OpenRAGTrainer(Trainer):
    """OpenRAG (arXiv 2503.08398)."""

    def __init__(self, context: TrainerContext) -> None:
        """Build the untrained encoder.

        Raises:
            CheckpointError: when the pools of the offline stage are missing or damaged.
        """
        config, library, data = context.config, context.library, context.data
        workers, generator = context.workers, context.generator
        self._context, self._config, self._workers = context, config, workers
        self._validation = data.validation
        self.best_by = best_retriever_by(data.validation)
        self._judge = PassageJudge(generator, context.prompts, sampling_of(config))
        pools = load_pools(config, data.train, generator.identity, context.run_dir.pools)
        self._questions = data.train.questions
        self._corpus = library.corpus
        self.before = Before(pools.num_tokens, pools.seconds, pools.failures, pools.prompts)
        self._usable = pools.usable
        self._schedule = openrag_schedule(config, len(self._usable))
        self.num_steps = self._schedule.num_steps
        self._offline_steps = num_offline_steps(config, len(self._usable))
        unscored = bool(np.isnan(pools.logp_QN[self._usable]).any())
        self._scores_offline = config.openrag.loss == "kl" and unscored
        self.encoder = open_trainable_encoder(config.retrieval, config.openrag, config.cache_path)
        self._learner = RetrieverLearner(
            self.encoder, config.training, config.openrag, self.num_steps, workers
        )
        self._index: RefreshedIndex | None = None
        if config.openrag.refresh_every:
            first = searched_index(library.retrievers.primary)
            build = RayBuild() if config.training.launcher == "ray" else ProcessBuild()
            place = context.run_dir.indexes
            self._index = RefreshedIndex(config, library.corpus, first, place, workers, build)
        self._retriever = LateParametricRetriever(
            self.encoder,
            self._index
            or open_first_stage(
                library.retrievers,
                library.corpus,
                self.encoder,
                config.openrag,
                config.cache_path,
            ),
            library.corpus,
            config.openrag.num_online,
            config.openrag.micro_batch_texts,
        )
        self._pairs = PairFinder(
            self._questions,
            library.corpus,
            pools,
            self._judge if config.openrag.labels != "gold" else None,
            config.training.max_failed_share,
        )

    def asks_generator(self, step: int) -> bool:
        """In the online stage, and where likelihoods are distilled that the pools do not hold.

        Never where gold passages are the labels.
        """
        if self._config.openrag.labels == "gold":
            return False
        return step >= self._offline_steps or self._scores_offline

    def step(self, step: int, pauses_after: bool) -> Metrics:
        """Find a pair for each question of the batch and train on them."""
        started, before = time.monotonic(), self._context.num_tokens()
        prompts = self._judge.prompt_counts.values()
        if self._index is not None:
            self._index.before_step(step, self.encoder)
        places, seeds = self._schedule.share(step, self._workers)
        rows = self._usable[places]
        is_online = step >= self._offline_steps
        if self._config.openrag.loss == "kl":
            metrics, collected_at = self._learn_from_likelihoods(rows, step, is_online)
        else:
            metrics, collected_at = self._learn_from_pairs(rows, seeds, step, is_online)
        if self._pairs.failures:
            metrics["failures"] = self._pairs.failures
        if self.asks_generator(step):
            prompts = self._judge.prompt_counts.values() - prompts
            metrics |= shares_of(self._workers.sum(torch.from_numpy(prompts)).numpy())
        tokens = self._workers.sum(torch.from_numpy(self._context.num_tokens() - before)).tolist()
        if self._index is not None:
            metrics["index_age"] = float(step - self._index.version)
        return metrics | {
            "epoch": self._schedule.epoch(step + 1),
            "stage": float(is_online),
            "generator_tokens_spent": tokens[0],
            "generator_tokens_saved": tokens[1],
            "collect_s": collected_at - started,
            "learn_s": time.monotonic() - collected_at,
        }

    def _learn_from_likelihoods(
        self, rows: np.ndarray, step: int, is_online: bool
    ) -> tuple[Metrics, float]:
        questions, passages, logp_BM = self._pairs.listed(
            rows, self._retriever if is_online else None
        )
        num_failed = self._workers.sum(torch.tensor([float(np.isnan(logp_BM).sum())])).item()
        collected_at = time.monotonic()
        under_way(f"learning in step {step + 1}")
        metrics = self._learner.update_kl(questions, passages, logp_BM, step)
        return {"num_failed": num_failed} | metrics, collected_at

    def _learn_from_pairs(
        self, rows: np.ndarray, seeds: list[list[int]], step: int, is_online: bool
    ) -> tuple[Metrics, float]:
        described: Metrics = {}
        if is_online:
            pairs, sums = self._pairs.online(rows, seeds, self._retriever)
            total = self._workers.sum(torch.tensor(list(sums.values()), dtype=torch.float64))
            described = dict(zip(sums, total.tolist(), strict=True))
        else:
            pairs = self._pairs.offline(rows, seeds)
        collected_at = time.monotonic()
        under_way(f"learning in step {step + 1}")
        metrics = self._learner.update(
            [self._questions[row].question for row in rows],
            [self._corpus[pair.positive].contents for pair in pairs],
            [self._corpus[pair.negative].contents for pair in pairs],
            step,
        )
        return described | metrics, collected_at

    def validate(self, step: int) -> Metrics:
        """Answers from the first K passages of late-parametric retrieval with present weights.

        A question that the generator could not answer does not count.
        """
        if self._validation is None:
            return {}
        return dict(
            validate_retriever(
                self._validation,
                lambda questions, k: self._retriever.search(questions, k).rows_BK,
                self._corpus,
                self._context.reward,
                self._config.environment.num_selected,
                self._workers,
            )
        )

    def tensors(self) -> Files:
        """The encoder's weights and its optimiser."""
        files: dict[str, Mapping[str, torch.Tensor]] = {
            "retriever": copy.copy(dict(self.encoder.state_dict())),
            "retriever_optimizer": self._learner.optimiser.tensors(),
        }
        if self._index is not None:
            files["retriever_index"] = {
                "step": torch.tensor(self._index.version_to_save()),
                "under_way": torch.tensor(self._index.under_way),
            }
        return files

    def load(self, files: Files) -> None:
        """Take over the weights and, where it is given, the optimiser's state."""
        restore_weights(self.encoder, files["retriever"], "the retriever of the checkpoint")
        if "retriever_optimizer" in files:
            self._learner.optimiser.load(files["retriever_optimizer"])

    def resume(self, step: int, files: Files, first: Files) -> None:
        """Continue from a checkpoint, with the index that it was searched with.

        Weights of another run come without one: the first index is searched until a refresh.
        """
        self.load(files)
        if self._index is not None and "retriever_index" in files:
            found = files["retriever_index"]
            self._index.resume(int(found["step"].item()), int(found["under_way"].item()))

    def close(self) -> None:
        """Begin no more refreshes of the index; nothing else runs ahead."""
        if self._index is not None:
            self._index.close()
