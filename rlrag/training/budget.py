"""Estimates how many generator tokens a run will use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlrag.config import RunConfig
from rlrag.data.questions import answerable_rows
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.errors import PromptTooLongError
from rlrag.generation.prompts import PromptBuilder
from rlrag.pipeline import TrainingData, open_policy
from rlrag.plugins import is_own
from rlrag.records import Passage, Prompt, Question
from rlrag.selection.protocol import Draws
from rlrag.training.schedule import BatchSchedule, jsa_schedule, openrag_schedule

_SAMPLE = 40


@dataclass(frozen=True)
class Budget:
    """Expected work of a run with an empty cache.

    `num_requests` counts distinct (question, selection) pairs that training and validation are
    expected to reward; `num_tokens` their prompt and answer tokens. `num_steps` is None where a
    trainer of somebody's own decides, and what they cost is not known.
    """

    num_steps: int | None
    num_rollouts: int
    num_requests: int
    num_tokens: int
    sample_prompts: tuple[Prompt, ...]

    def describe(self, tokens_per_s: float, limit: int | None = None) -> str:
        """One line for people.

        Args:
            tokens_per_s: What the generator does.
            limit: Tokens after which training stops, if there is a limit.
        """
        minutes = self.num_tokens / tokens_per_s / 60
        known = (
            f"{self.num_steps} steps, {self.num_rollouts:,} rollouts, about "
            f"{self.num_requests:,} different prompts = {self.num_tokens / 1e6:.2f} M generator "
            f"tokens; at {tokens_per_s:,.0f} tokens/s about {minutes:.0f} min, less what the cache "
            "already holds"
        )
        if self.num_steps is None:
            known = (
                "what a trainer of your own costs is not known before it runs; the generator does "
                f"{tokens_per_s:,.0f} tokens/s"
            )
        return known + ("" if limit is None else f"; training stops at {limit / 1e6:.2f} M tokens")


def estimate_budget(config: RunConfig, data: TrainingData, prompts: PromptBuilder) -> Budget:
    """Simulate the draws of the untrained policy on a sample of questions.

    As training sharpens the policy it repeats itself more, so the estimate is on the high side.
    """
    if config.algorithm.name == "jsa":
        return _jsa_budget(config, data, prompts)
    if config.algorithm.name == "openrag":
        return _openrag_budget(config, data, prompts)
    if is_own(config.algorithm.name):
        return Budget(None, 0, 0, 0, _first_prompts(data, prompts))
    schedule = BatchSchedule(config.training, config.dro, len(data.train), config.seed)
    policy = open_policy(config, data.train)
    rows = _sampled(np.arange(len(data.train)))
    passes = schedule.epoch(schedule.num_steps)
    num_draws = max(1, round(passes * config.dro.num_samples))
    draws = Draws([[config.seed, int(r)] for r in rows], num_draws)
    episodes = open_episodes(config.environment, len(rows) * num_draws, data.train, Unrewarded())
    evidence = play(episodes, policy, rows, draws).evidence
    episodes.close()
    distinct = [
        sorted(set(evidence[start : start + num_draws]), key=lambda found: [p.id for p in found])
        for start in range(0, len(evidence), num_draws)
    ]
    sample = _sample_prompts(
        prompts,
        ((data.train.questions[row], found[0]) for row, found in zip(rows, distinct, strict=True)),
    )
    per_question = float(np.mean([len(found) for found in distinct]))
    num_validation = len(data.validation or ())
    num_rollouts = round(passes * len(data.train)) * config.dro.num_samples
    if config.algorithm.name == "sft":
        num_rollouts = 0
    if config.trains_generator:  # new weights answer everything anew
        num_validations = 1 + schedule.num_steps // config.training.validate_every
        num_requests = num_rollouts + num_validations * num_validation
    else:
        # A validated question is answered anew for each candidate that the policy comes to prefer.
        num_requests = round(per_question * len(data.train) * min(1.0, passes))
        num_requests += 2 * num_validation
    return _budget(config, schedule.num_steps, num_rollouts, num_requests, sample)


def _openrag_budget(config: RunConfig, data: TrainingData, prompts: PromptBuilder) -> Budget:
    """Each training question with each of its first candidates is answered once and scored once.

    Of the online stage it counts one new passage a question and pass, or all that are distilled; of
    validation one answer a question. Passages found before are cached.
    """
    openrag = config.openrag
    num_questions = len(data.train)
    sample = _first_prompts(data, prompts)
    num_requests = 0
    if openrag.labels != "gold":
        num_requests = 2 * data.train.rows_QN.size
        if "online" in openrag.stages:
            per_question = openrag.num_online if openrag.loss == "kl" else openrag.online_epochs
            num_requests += per_question * num_questions
    num_steps = openrag_schedule(config, num_questions).num_steps
    num_validation = len(data.validation or ())
    num_requests += (1 + num_steps // config.training.validate_every) * num_validation
    num_rollouts = data.train.rows_QN.size if openrag.labels != "gold" else 0
    return _budget(config, num_steps, num_rollouts, num_requests, sample)


def _jsa_budget(config: RunConfig, data: TrainingData, prompts: PromptBuilder) -> Budget:
    """Each question is scored with every passage of its domain, and answered when it is validated.

    With a frozen generator once, as passages found before are cached; with one that is trained in
    every pass and validation. Chains visit fewer passages as the posterior gets sharper, so that
    the estimate is on the high side.
    """
    questions, jsa, training = data.train.questions, config.jsa, config.training
    usable = answerable_rows(questions)
    num_steps = jsa_schedule(config, len(usable)).num_steps
    rows = _sampled(usable)
    sample = _sample_prompts(
        prompts, ((questions[row], data.train.passages(int(row))[:1]) for row in rows)
    )
    num_validation = len(data.validation or ())
    num_validations = 1 + num_steps // training.validate_every
    seen = training.batch_size * num_steps
    scored = seen if config.trains_generator else min(seen, len(usable))
    num_requests = scored * min(jsa.num_prior + jsa.num_posterior, jsa.mis_steps)
    num_requests += num_validations * num_validation
    return _budget(config, num_steps, seen * jsa.mis_steps, num_requests, sample)


def _budget(
    config: RunConfig,
    num_steps: int,
    num_rollouts: int,
    num_requests: int,
    sample: tuple[Prompt, ...],
) -> Budget:
    """Every request has a prompt of the sample's mean length and half of the longest answer."""
    tokens = float(np.mean([len(prompt.token_ids) for prompt in sample]))
    tokens += config.generator.max_new_tokens / 2
    return Budget(num_steps, num_rollouts, num_requests, round(num_requests * tokens), sample)


def _sampled(rows: np.ndarray) -> np.ndarray:
    """At most 40 of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int)]


def _first_prompts(data: TrainingData, prompts: PromptBuilder) -> tuple[Prompt, ...]:
    """Prompts of some training questions, each with its first candidate."""
    rows = _sampled(np.arange(len(data.train)))
    return _sample_prompts(
        prompts, ((data.train.questions[row], data.train.passages(int(row))[:1]) for row in rows)
    )


def _sample_prompts(
    prompts: PromptBuilder, asked: Iterable[tuple[Question, Sequence[Passage]]]
) -> tuple[Prompt, ...]:
    """Prompts of some questions, without those that leave no room for an answer.

    Raises:
        PromptTooLongError: when none does.
    """
    built: list[Prompt] = []
    error: PromptTooLongError | None = None
    for question, passages in asked:
        try:
            built.append(prompts.build(question, passages))
        except PromptTooLongError as found:  # training counts it as failed
            error = found
    if error is not None and not built:
        raise error
    return tuple(built)
