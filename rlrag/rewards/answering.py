"""Rewards selections: generates or scores an answer for each and calls the reward functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlrag.errors import (
    ConfigError,
    GenerationError,
    PromptTooLongError,
    RewardError,
    RlragError,
)
from rlrag.generation.prompts import PromptCounts
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Generation, Passage, Prompt, Question, RewardResult, Score
from rlrag.rewards.answer_match import passages_contain_answer
from rlrag.rewards.composite import RewardModel, Rollout

if TYPE_CHECKING:  # a prompt builder brings a tokenizer, which PassageReward does without
    from rlrag.generation.prompts import PromptBuilder


class AnsweringReward:
    """Shows the picked passages to a generator and rewards what it answers.

    A batch makes one `generate` call and one `score` call, each only if some reward function wants
    its result. Equal pairs of question and picks inside a batch are computed once and share their
    result; with a temperature above 0 they share the answer that was drawn.

    Each distinct golden answer of a question is scored, and `answer_logp` is the largest of their
    summed log-probabilities, that of the likeliest, or the log of their summed probabilities where
    `reward.golden_answers` is `all`; in nats. A question without golden answers has none to score,
    so its reward is then a `RewardError`. A prompt that cannot be built gives its pair the
    `PromptTooLongError`, and one that the generator cannot survive its `GenerationError`. A failure
    of the generator itself is raised, because it concerns the whole batch.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: PromptBuilder,
        rewards: RewardModel,
        sampling: Sampling,
    ) -> None:
        self._generator = generator
        self._prompts = prompts
        self._rewards = rewards
        self._sampling = sampling
        self.prompt_counts = PromptCounts()
        """Of all prompts that were built for rewards and answers."""

    def __deepcopy__(self, memo: dict[int, object]) -> AnsweringReward:
        """Itself: Gymnasium copies an environment's arguments to tell its `spec`.

        A copy would hold the language model a second time.
        """
        return self

    def __call__(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[RewardResult | RlragError]:
        """Reward each pair; see `SelectionReward`."""
        rollouts, places = _distinct(questions, selections)
        results: dict[int, RewardResult | RlragError] = {}
        if self._rewards.needs_answer or self._rewards.needs_score:
            prompts, too_long = self._build(rollouts)
            results |= too_long
            if self._rewards.needs_score:
                self._score(rollouts, prompts, results)
            if self._rewards.needs_answer:
                open_rows = [row for row in prompts if row not in results]
                answers = self._generate([prompts[row] for row in open_rows])
                for row, answer in zip(open_rows, answers, strict=True):
                    if isinstance(answer, GenerationError):
                        results[row] = _about(rollouts[row].question, answer)
                    else:
                        rollouts[row] = replace(rollouts[row], answer=answer.text)
        open_rows = [row for row in range(len(rollouts)) if row not in results]
        rewarded = self._rewards([rollouts[row] for row in open_rows])
        results.update(zip(open_rows, rewarded, strict=True))
        return [results[place] for place in places]

    def answer(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[Generation | RlragError]:
        """Only the generator's answers, for evaluation; equal pairs are answered once.

        An answer that the generator could not give is its `GenerationError` in that place, a
        question that leaves no room in the prompt its `PromptTooLongError`.
        """
        rollouts, places = _distinct(questions, selections)
        prompts, too_long = self._build(rollouts)
        found: dict[int, Generation | RlragError] = {**too_long}
        for row, answer in zip(prompts, self._generate(list(prompts.values())), strict=True):
            if isinstance(answer, GenerationError):
                found[row] = _about(rollouts[row].question, answer)
            else:
                found[row] = answer
        return [found[place] for place in places]

    def _build(
        self, rollouts: Sequence[Rollout]
    ) -> tuple[dict[int, Prompt], dict[int, PromptTooLongError]]:
        """Prompts by row, and why the other rows have none."""
        prompts, too_long = {}, {}
        for row, rollout in enumerate(rollouts):
            try:
                prompts[row] = self._prompts.build(rollout.question, rollout.passages)
            except PromptTooLongError as error:
                too_long[row] = error
            else:
                self.prompt_counts.add(prompts[row], len(rollout.passages))
        return prompts, too_long

    def _generate(self, prompts: Sequence[Prompt]) -> Sequence[Generation | GenerationError]:
        return self._generator.generate(prompts, self._sampling) if prompts else []

    def _score(
        self,
        rollouts: list[Rollout],
        prompts: dict[int, Prompt],
        results: dict[int, RewardResult | RlragError],
    ) -> None:
        """Put the golden answers' log-probability into each rollout, or an error."""
        rows: list[int] = []
        answers: list[tuple[int, ...]] = []
        for row in prompts:
            golden = distinct_answers(self._prompts, rollouts[row].question)
            if not golden:
                results[row] = _unscorable(rollouts[row].question)
                continue
            rows += [row] * len(golden)
            answers += map(self._prompts.encode_answer, golden)
        if not rows:
            return
        scores = self._generator.score([prompts[row] for row in rows], answers)
        scored: dict[int, list[Score]] = {}
        for row, score in zip(rows, scores, strict=True):
            question = rollouts[row].question
            if isinstance(score, GenerationError):
                results[row] = _about(question, score)
            elif not math.isfinite(score.logp):
                results[row] = RewardError(
                    f"answer_logp for question {question.id!r}: the generator scored a "
                    f"golden answer as {score.logp}; check its weights and dtype"
                )
            else:
                scored.setdefault(row, []).append(score)
        for row, found in scored.items():
            likeliest = max(found, key=lambda score: score.logp)
            logps = tuple(score.logp for score in found)
            rollouts[row] = replace(
                rollouts[row],
                answer_logp=_log_sum(logps) if self._rewards.counts_all_answers else max(logps),
                num_answer_tokens=likeliest.num_tokens,
                golden_logps=logps,
            )


def distinct_answers(prompts: PromptBuilder, question: Question) -> list[str]:
    """The golden answers that have a text, the first of those that have the same tokens."""
    found: dict[tuple[int, ...], str] = {}
    for text in question.golden_answers:
        if text.strip():
            found.setdefault(prompts.encode_answer(text), text)
    return list(found.values())


def _log_sum(logps: Sequence[float]) -> float:
    """The log of the summed probabilities of at least one answer."""
    highest = max(logps)
    return highest + math.log(sum(math.exp(logp - highest) for logp in logps))


class PassageReward:
    """Rewards the picks without a language model: golden answer found, less a cost per passage.

    reward = [some picked passage contains a golden answer] - cost_per_passage * number of picks.
    It depends on the selection alone. An unanswerable question gives 1 iff nothing was picked.

    Raises:
        ConfigError: `cost_per_passage` is negative or not finite.

    Example:
        >>> reward = PassageReward(cost_per_passage=0.1)
        >>> france = Question(id="q1", question="capital of France?", golden_answers=("Paris",))
        >>> passage = Passage(id="fr", title="France", text="Its capital is Paris.")
        >>> reward([france, france], [[passage], []])[0].total
        0.9
        >>> reward([france, france], [[passage], []])[1].total
        0.0
    """

    def __init__(self, cost_per_passage: float = 0.1) -> None:
        if not (math.isfinite(cost_per_passage) and cost_per_passage >= 0):
            raise ConfigError(
                f"cost_per_passage is {cost_per_passage}; give a finite number of at least 0"
            )
        self.cost_per_passage = cost_per_passage

    def __call__(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[RewardResult | RlragError]:
        """Reward each pair; see `SelectionReward`."""
        return [
            self._reward(question, selection)
            for question, selection in zip(questions, selections, strict=True)
        ]

    def _reward(self, question: Question, selection: Sequence[Passage]) -> RewardResult:
        contained = passages_contain_answer(selection, question.golden_answers)
        cost = float(-len(selection))
        return RewardResult(
            total=contained + self.cost_per_passage * cost,
            terms={"selection_contains_answer": contained, "selection_cost": cost},
        )


def _distinct(
    questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
) -> tuple[list[Rollout], list[int]]:
    """The distinct pairs of question and picks, and for each given pair its place among them."""
    rollouts: list[Rollout] = []
    place_of: dict[tuple[str, tuple[str, ...]], int] = {}
    places = []
    for question, selection in zip(questions, selections, strict=True):
        key = (question.id, tuple(passage.id for passage in selection))
        if key not in place_of:
            place_of[key] = len(rollouts)
            rollouts.append(Rollout(question, tuple(selection)))
        places.append(place_of[key])
    return rollouts, places


def _about(question: Question, error: GenerationError) -> GenerationError:
    """The generator's error, with the question that it concerns."""
    return type(error)(f"question {question.id!r}: {error}")


def _unscorable(question: Question) -> RewardError:
    return RewardError(
        f"answer_logp for question {question.id!r}: it has no golden answer to score; leave such "
        "questions out, or choose reward.functions that need none, such as selection_recall "
        "where metadata has gold_ids, or your own function"
    )
