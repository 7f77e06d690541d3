"""OpenRAG's offline stage: labels candidates of the training questions before training.

It runs once, before the loop and in the process that launches it. Every judgement goes through the
generator's cache, so a stage that was stopped continues without asking for one twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.config import RunConfig
from rlrag.errors import DataError
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator
from rlrag.pipeline import sampling_of
from rlrag.records import Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.runs.watchdog import Watchdog, under_way
from rlrag.training.dro.experience_log import labels_from_experience
from rlrag.training.openrag.passage_judge import PassageJudge
from rlrag.training.openrag.pools import (
    FAILED,
    Pools,
    filled_by_gold,
    gold_pools,
    judge_candidates,
    judging_order,
    offline_token_limit,
    pools_source,
)
from rlrag.training.schedule import openrag_batch_size

logger = logging.getLogger(__name__)

# Chance is .5; with less than this, labels that follow the score are little better.
MIN_AUC = 0.6
_SMALLEST_BATCH = 2  # one question has no other's passages to tell its own from


def run_offline_stage(
    config: RunConfig,
    candidates: CandidateTable,
    generator: Generator,
    prompts: PromptBuilder,
    directory: Path,
    say: Callable[[str], None],
    experience: Path | None = None,
) -> Pools:
    """Label the first candidates of every question, or load what an earlier call saved.

    Args:
        config: The run.
        candidates: Training questions with `algorithm.num_offline` candidates each.
        generator: Judges the passages.
        prompts: Shows them to it.
        directory: Where the pools are kept.
        say: Takes lines of progress.
        experience: Log of selections that were rewarded before; what they tell is not judged again.

    Raises:
        DataError: when no question has both a positive and a negative passage.
        GenerationError: when too many passages cannot be judged.
    """
    source = pools_source(config, candidates, generator.identity)
    pools = Pools.load(directory, source)
    if pools is None:
        # First, for questions may name no gold passages.
        gold = None if config.openrag.labels == "generator" else gold_pools(candidates, source)
        if gold is not None and config.openrag.labels == "gold":
            pools = gold
        else:
            before, started = replace(generator.tokens), time.monotonic()
            margin = config.openrag.contribution_margin
            known = labels_from_experience(experience, margin) if experience else {}
            if known:
                num_known = sum(map(len, known.values()))
                say(f"offline stage: {num_known:,} labels from selections that were rewarded")
            judge = PassageJudge(generator, prompts, sampling_of(config))
            max_failed, told = config.training.max_failed_share, partial(_tell, say)
            limit = offline_token_limit(config)
            order = judging_order(len(candidates), limit, config.seed, lambda: _asked(generator))
            with Watchdog("the offline stage"):
                pools = judge_candidates(candidates, judge, source, max_failed, known, told, order)
            after = generator.tokens
            spent, saved = after.spent - before.spent, after.saved - before.saved
            say(f"offline stage: {spent:,} generator tokens computed, {saved:,} cached")
            num_left_out = len(candidates) - len(pools.judged)
            if num_left_out:
                say(
                    f"offline stage: {num_left_out:,} of {len(candidates):,} questions are left "
                    f"out, as judging them would take more than {limit:,} generator tokens"
                )
            if gold is not None:
                pools, num_filled = filled_by_gold(pools, gold)
                say(f"offline stage: {num_filled:,} questions labelled by their gold passages")
            seconds = time.monotonic() - started
            cut = judge.prompt_counts.shares()
            pools = replace(pools, num_tokens=spent + saved, seconds=seconds, prompts=cut)
        pools.save(directory, describe_pools(pools, candidates.questions))
    _report(pools, config, say)
    return pools


def _asked(generator: Generator) -> int:
    return generator.tokens.spent + generator.tokens.saved


def _tell(say: Callable[[str], None], done: int, of: int) -> None:
    line = f"offline stage: {done:,} of {of:,} questions"
    under_way(line)
    say(line)


def describe_pools(pools: Pools, questions: Sequence[Question]) -> dict[str, Any]:
    """How many questions are of use and how well the score predicts the label, by question type.

    The type of a question is its `metadata.type`; those without one count as `other`.
    """
    types = np.array([str(question.metadata.get("type", "other")) for question in questions])
    groups = {"all": np.arange(len(questions))}
    groups |= {name: np.flatnonzero(types == name) for name in sorted(set(types.tolist()))}
    return {name: _describe_group(pools, rows) for name, rows in groups.items()}


def _describe_group(pools: Pools, rows: np.ndarray) -> dict[str, float | int | None]:
    judged = rows[np.isin(rows, pools.judged)]
    labels = pools.labels_QN[judged]
    positive = labels == 1
    auc = pools.auc_of(judged)
    return {
        "num_questions": len(rows),
        "num_left_out": len(rows) - len(judged),
        "num_usable": int(np.isin(judged, pools.usable).sum()),
        "num_without_positive": int((~positive.any(axis=1)).sum()),
        "num_without_negative": int((~(labels == 0).any(axis=1)).sum()),
        "num_failed": int((labels == FAILED).sum()),
        "positive_share": float(positive.mean()) if len(judged) else None,
        "first_is_positive": float(positive[:, 0].mean()) if len(judged) else None,
        "best_score_is_positive": _share_of_best(pools, judged),
        "auc": None if math.isnan(auc) else auc,
    }


def _share_of_best(pools: Pools, rows: np.ndarray) -> float | None:
    """How often the passage with the highest score is positive; None without scores."""
    logp = pools.logp_QN[rows]
    known = rows[np.isfinite(logp).any(axis=1)]
    if not len(known):
        return None
    best = np.nanargmax(pools.logp_QN[known], axis=1)
    return float((pools.labels_QN[known, best] == 1).mean())


def _report(pools: Pools, config: RunConfig, say: Callable[[str], None]) -> None:
    num_judged, num_usable = len(pools.judged), len(pools.usable)
    batch_size = openrag_batch_size(config, num_usable)
    if batch_size < _SMALLEST_BATCH:
        raise DataError(
            f"only {num_usable} of {num_judged} questions have both a passage that helps the "
            "generator and one that does not, too few to train on; use more questions, a larger "
            "algorithm.num_offline, a generator or prompt that answers more questions correctly, "
            "or, if it is set, a larger training.max_generator_tokens"
        )
    if batch_size < config.training.batch_size:
        logger.warning(
            "only %d of %d questions have both a passage that helps the generator and one that "
            "does not: steps use %d questions instead of training.batch_size %d",
            num_usable,
            num_judged,
            batch_size,
            config.training.batch_size,
        )
    judged = pools.labels_QN[pools.judged]
    auc = pools.auc_of(pools.judged)
    say(
        f"offline stage: {num_usable:,} of {num_judged:,} questions have positives and "
        f"negatives; {(judged == 1).mean():.1%} of the passages are positive"
        + ("" if math.isnan(auc) else f"; score against label: AUC {auc:.3f}")
    )
    if auc < MIN_AUC:
        logger.warning(
            "the generator's score is a poor predictor of correct answers (AUC %.3f, below "
            "%.2f), so labels of the online stage will be unreliable; try another prompt or "
            "generator, or algorithm.online_epochs 0",
            auc,
            MIN_AUC,
        )
