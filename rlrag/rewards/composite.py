"""The weighted sum of reward functions, with each term recorded."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.config import RewardConfig
from rlrag.errors import ConfigError, RewardError
from rlrag.records import Passage, Question, RewardResult
from rlrag.rewards.bounded_calls import CallFailure, Keywords, LoopCalls, ThreadCalls
from rlrag.rewards.judged import JUDGE, JudgeCalls
from rlrag.rewards.plugin import RewardFunction, load_reward


@dataclass(frozen=True, slots=True)
class Rollout:
    """One question, its ordered picks and, where some reward wants them, the answer and its score.

    `answer_logp` belongs to a golden answer of `num_answer_tokens` tokens: a sum, in nats. Where
    all golden answers count it is that of the set, `num_answer_tokens` belongs to the likeliest,
    and `golden_logps` are their own.
    """

    question: Question
    passages: tuple[Passage, ...]
    answer: str | None = None
    answer_logp: float | None = None
    num_answer_tokens: int | None = None
    golden_logps: tuple[float, ...] | None = None

    def keywords(self, wants: frozenset[str]) -> Keywords:
        """The keyword arguments of a reward function that wants these."""
        known = {
            "question": self.question.question,
            "answer": self.answer,
            "golden_answers": self.question.golden_answers,
            "selection": tuple(passage.id for passage in self.passages),
            "passages": self.passages,
            "answer_logp": self.answer_logp,
            "num_answer_tokens": self.num_answer_tokens,
            "metadata": self.question.metadata,
        }
        return {keyword: value for keyword, value in known.items() if keyword in wants}


class RewardModel:
    """The weighted sum of reward functions, computed for a batch of rollouts.

    total = sum over functions f of weight_f * value_f. A function that returns a dict gives one
    term `name/key` for each entry, and its value is their sum. Terms are recorded unweighted; one
    with weight 0 is recorded and does not count.

    A built-in function runs in the calling thread. A custom one runs in threads of its own, or in
    an event loop if it is `async def`: `max_concurrent` calls at once, each of which may take
    `timeout_s`. One that raises, returns anything but finite numbers, or overruns gives its rollout
    a `RewardError` that names the function, the question's id and the cause, and the remaining
    functions are not called for it.
    `judge` asks a language model for a whole batch, `max_concurrent` answers at once, and keeps its
    verdicts in `cache_dir`.

    Raises:
        ConfigError: a function is named twice or cannot be loaded, or all golden answers are to
            count and no function wants their likelihood.

    Example:
        >>> model = RewardModel(
        ...     RewardConfig(functions=("exact_match", "selection_cost"), weights=(1.0, 0.1))
        ... )
        >>> france = Question(id="q1", question="capital of France?", golden_answers=("Paris",))
        >>> passage = Passage(id="fr", title="France", text="Its capital is Paris.")
        >>> result = model([Rollout(france, (passage,), answer="Paris.")])[0]
        >>> result.total, result.terms
        (0.9, {'exact_match': 1.0, 'selection_cost': -1.0})
    """

    def __init__(
        self,
        config: RewardConfig,
        cache_dir: Path | None = None,
    ) -> None:
        repeated = sorted({name for name in config.functions if config.functions.count(name) > 1})
        if repeated:
            raise ConfigError(
                f"reward.functions names {', '.join(repeated)} more than once; name it once, "
                "with the sum of the weights"
            )
        self.functions = tuple(load_reward(name) for name in config.functions)
        self.weights = config.weights
        self.counts_all_answers = config.golden_answers == "all"
        if self.counts_all_answers and not self.needs_score:
            raise ConfigError(
                "reward.golden_answers is 'all', but none of reward.functions "
                f"{config.functions} uses answer_logp; add it, with weight 0 if it should not "
                "count"
            )
        self._callers = tuple(_caller(function, config, cache_dir) for function in self.functions)

    @property
    def wants(self) -> frozenset[str]:
        """The keywords that some function wants."""
        return frozenset().union(*(function.wants for function in self.functions))

    @property
    def needs_answer(self) -> bool:
        """Whether the generator has to answer."""
        return "answer" in self.wants

    @property
    def needs_score(self) -> bool:
        """Whether the generator has to score the golden answers."""
        return bool(self.wants & {"answer_logp", "num_answer_tokens"})

    def __call__(self, rollouts: Sequence[Rollout]) -> list[RewardResult | RewardError]:
        """One result, or the error that says why there is none, for each rollout, in order."""
        terms: list[dict[str, float]] = [{} for _ in rollouts]
        totals = [0.0] * len(rollouts)
        errors: dict[int, RewardError] = {}
        for function, weight, call in zip(self.functions, self.weights, self._callers, strict=True):
            rows = [row for row in range(len(rollouts)) if row not in errors]
            outcomes = call([rollouts[row].keywords(function.wants) for row in rows])
            for row, outcome in zip(rows, outcomes, strict=True):
                found = _terms(function.name, outcome)
                if isinstance(found, CallFailure):
                    question_id = rollouts[row].question.id
                    errors[row] = RewardError(
                        f"reward {function.name!r} for question {question_id!r}: {found.cause}"
                    )
                    continue
                terms[row].update(found)
                totals[row] += weight * sum(found.values())
        return [
            errors[row]
            if row in errors
            else RewardResult(
                totals[row],
                terms[row],
                rollout.answer,
                rollout.answer_logp,
                rollout.golden_logps if self.counts_all_answers else None,
            )
            for row, rollout in enumerate(rollouts)
        ]


def _caller(
    function: RewardFunction, config: RewardConfig, cache_dir: Path | None
) -> Callable[[Sequence[Keywords]], list[Any]]:
    if function.name == JUDGE:
        return JudgeCalls(config, cache_dir)
    if function.is_builtin:
        return _BuiltinCalls(function.function)
    kind = LoopCalls if function.is_async else ThreadCalls
    return kind(function.function, config.timeout_s, config.max_concurrent)


class _BuiltinCalls:
    """Calls a built-in function directly; only the failure that it declares is a `CallFailure`."""

    def __init__(self, function: Callable[..., float]) -> None:
        self._function = function

    def __call__(self, calls: Sequence[Keywords]) -> list[Any]:
        return [self._call(keywords) for keywords in calls]

    def _call(self, keywords: Keywords) -> float | CallFailure:
        try:
            return self._function(**keywords)
        except RewardError as error:
            return CallFailure(str(error))


def _terms(name: str, outcome: Any) -> dict[str, float] | CallFailure:
    """The named terms of what a function returned, or why it is of no use."""
    if isinstance(outcome, CallFailure):
        return outcome
    if not isinstance(outcome, Mapping):
        outcomes = {name: outcome}
    elif outcome:
        outcomes = {f"{name}/{key}": value for key, value in outcome.items()}
    else:
        return CallFailure("returned an empty dict; return a number or named numbers")
    terms = {}
    for term, value in outcomes.items():
        shown = reprlib.repr(value)
        if not isinstance(value, Real | np.bool_):
            kind = type(value).__name__
            return CallFailure(f"returned {shown} of type {kind} as {term!r}, not a number")
        terms[term] = _to_float(value)
        if not math.isfinite(terms[term]):
            return CallFailure(f"returned {shown} as {term!r}, not a finite number")
    return terms


def _to_float(value: Real | np.bool_) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of floats
        return math.inf
