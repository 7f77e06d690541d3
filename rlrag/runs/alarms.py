"""Warns when the metrics of a run show that training goes wrong.

An alarm never changes a run. It names what was seen and what to try. Alarms depend on the metrics
alone, so that feeding the records of a stopped run again raises the same ones. What is remembered
of them does not grow with the run.

    collapse                 one selection has all the weight, or the policy no choice left
    zero_signal              nearly all questions have equal rewards: nothing to learn from
    reward_up_quality_down   the reward goes on rising while validation EM and F1 have fallen
    constant_policy          the policy does the same with nearly every question
    length_drift             validation answers are far longer or shorter than at the start
    failures                 rewards could not be computed and were left out
    cut_prompts              prompts had no room for all tokens of the passages picked
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rlrag.config import RunConfig
from rlrag.generation.prompts import cut_warning

Record = Mapping[str, Any]
"""What the rules read of one step's metrics."""

_WATCHED = (
    "step",
    "ess",
    "policy_entropy",
    "zero_signal_share",
    "reward",
    "validation/em",
    "validation/f1",
    "validation/answer_words",
    "validation/changed_share",
    "constant_policy",
    "num_failed",
    "failures",
    "prompt_cut_share",
    "dropped_passage_share",
)


_WINDOW = 10
"""Steps that a mean is taken over; a shorter run raises no alarm that needs one."""
_MIN_ESS = 1.05
"""`collapse`: the mean effective sample size is at most this, with m > 1."""
_MIN_ENTROPY_SHARE = 0.05
"""`collapse`: the mean policy entropy is at most this share of the first."""
_MAX_ZERO_SIGNAL = 0.9
"""`zero_signal`: the mean share of questions with equal rewards is above this."""
_QUALITY_NOISE = 1.0
"""`reward_up_quality_down`: EM and F1 fell by more than this many standard errors."""
_MAX_LENGTH_RATIO = 2.0
"""`length_drift`: answers are more than this many times longer or shorter."""
_CONSTANT_VALIDATIONS = 2
"""`constant_policy`: so many validations in a row found it so."""


@dataclass(frozen=True)
class Alarm:
    """One warning: its name, the step that raised it, and a text for people."""

    name: str
    step: int
    text: str


@dataclass(slots=True)
class _Trend:
    """Least-squares line through points that come one at a time, by Welford's updates.

    `sum_xx`, `sum_xy` and `sum_yy` are sums of products of the distances from the means.
    """

    num: int = 0
    first_x: float = 0.0
    last_x: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    sum_xx: float = 0.0
    sum_xy: float = 0.0
    sum_yy: float = 0.0

    def add(self, x: float, y: float) -> None:
        if not self.num:
            self.first_x = x
        self.last_x = x
        self.num += 1
        from_x, from_y = x - self.mean_x, y - self.mean_y
        self.mean_x += from_x / self.num
        self.mean_y += from_y / self.num
        self.sum_xx += from_x * (x - self.mean_x)
        self.sum_xy += from_x * (y - self.mean_y)
        self.sum_yy += from_y * (y - self.mean_y)

    def slope(self) -> tuple[float, float]:
        """The slope and its standard error; fewer than 3 points have none."""
        if self.num < 3:
            return 0.0, math.inf
        slope = self.sum_xy / self.sum_xx
        residual = self.sum_yy - slope * self.sum_xy
        if residual < 0:  # by rounding
            residual = 0.0
        return slope, math.sqrt(residual / (self.num - 2) / self.sum_xx)


@dataclass(slots=True)
class _Seen:
    """What the rules need of the steps so far.

    `first` is the first value of every metric, `best` the first of the validations with the highest
    F1, and `trend` that of the reward since then. `num_constant` counts the last validations in a
    row that found a policy that does the same with nearly every question.
    """

    recent: deque[Record]
    last: Record = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    best: Record | None = None
    trend: _Trend = field(default_factory=_Trend)
    num_constant: int = 0

    def add(self, record: Record) -> None:
        self.last = record
        self.recent.append(record)
        for name, value in record.items():
            self.first.setdefault(name, value)
        if "validation/changed_share" in record:
            self.num_constant = self.num_constant + 1 if "constant_policy" in record else 0
        if "reward" in record:
            self.trend.add(record["step"], record["reward"])
        name = "validation/f1"
        if name in record and (self.best is None or record[name] > self.best[name]):
            self.best, self.trend = record, _Trend()

    def mean(self, name: str) -> float | None:
        """Mean of a metric over the last steps, None until there are enough of them."""
        values = [record[name] for record in self.recent if name in record]
        return fmean(values) if len(values) == self.recent.maxlen else None


class Alarms:
    """Watches one run; each alarm is raised at most once.

    Example:
        >>> alarms = Alarms(RunConfig())
        >>> for step in range(1, 11):
        ...     new = alarms.update({"step": step, "zero_signal_share": 1.0})
        >>> [(alarm.name, alarm.step) for alarm in new]
        [('zero_signal', 10)]
    """

    def __init__(self, config: RunConfig) -> None:
        num_samples = config.dro.num_samples
        num_questions = config.data.num_validation_questions
        self._rules: dict[str, Callable[[_Seen], str | None]] = {
            "collapse": lambda seen: _collapse(seen, num_samples),
            "zero_signal": _zero_signal,
            "reward_up_quality_down": lambda seen: _quality_down(seen, num_questions),
            "constant_policy": _constant_policy,
            "length_drift": _length_drift,
            "failures": _failures,
            "cut_prompts": lambda seen: cut_warning(seen.last),
        }
        self._seen = _Seen(deque(maxlen=_WINDOW))
        self._raised: list[Alarm] = []

    @property
    def raised(self) -> tuple[Alarm, ...]:
        """All alarms so far, in the order in which they were raised."""
        return tuple(self._raised)

    def update(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take the metrics of one step, in order; return the alarms that it raises.

        A metric that is missing or NaN raises nothing.
        """
        self._seen.add({name: metrics[name] for name in _WATCHED if name in metrics})
        known = {alarm.name for alarm in self._raised}
        new = [
            Alarm(name, int(metrics["step"]), text)
            for name, rule in self._rules.items()
            if name not in known and (text := rule(self._seen)) is not None
        ]
        self._raised += new
        return new

    def replay(self, records: Iterable[Mapping[str, Any]]) -> tuple[Alarm, ...]:
        """Take the records of earlier steps, as a resumed run does; return all alarms so far."""
        for record in records:
            self.update(record)
        return self.raised


def _collapse(seen: _Seen, num_samples: int) -> str | None:
    """Mean ESS at its lowest, or mean policy entropy far below its first value.

    One sample a question has ESS 1 by definition, and a policy that starts without entropy has none
    to lose: neither counts.
    """
    ess = seen.mean("ess")
    if num_samples > 1 and ess is not None and ess <= _MIN_ESS:
        return (
            f"the effective sample size was {ess:.2f} of {num_samples} over the last "
            f"{_WINDOW} steps: one selection has all the weight. Raise "
            "algorithm.reward_temperature or algorithm.num_samples, or look for a reward with "
            "extreme values"
        )
    first = seen.first.get("policy_entropy", 0.0)
    entropy = seen.mean("policy_entropy")
    if entropy is not None and first > 0 and entropy <= _MIN_ENTROPY_SHARE * first:
        return (
            f"the policy's entropy fell from {first:.3g} to {entropy:.3g} nats over the last "
            f"{_WINDOW} steps: it draws the same selection again and again. Lower "
            "training.learning_rate, set algorithm.entropy_weight, or raise "
            "algorithm.proposal_temperature"
        )
    return None


def _zero_signal(seen: _Seen) -> str | None:
    share = seen.mean("zero_signal_share")
    if share is None or share <= _MAX_ZERO_SIGNAL:
        return None
    return (
        f"{100 * share:.0f} % of the questions had equal rewards for all their selections over the "
        f"last {_WINDOW} steps: these teach the selector nothing. Use a finer reward such as "
        "answer_logp, more candidates, or algorithm.replacement False, which draws different "
        "selections"
    )


def _quality_down(seen: _Seen, num_questions: int) -> str | None:
    """Reward rising since the best validation while EM and F1 fell by more than their noise.

    The best validation is the first with the highest F1. The noise of a mean p over n questions is
    its largest possible standard error, sqrt(p (1 - p) / n), as every value lies between 0 and 1.
    The reward rises when the slope of its least-squares line is above its own standard error.
    """
    last, best = seen.last, seen.best
    if best is None or "validation/f1" not in last or num_questions < 1:
        return None
    for name in ("validation/em", "validation/f1"):
        mean = min(max(best[name], 0.0), 1.0)
        noise = _QUALITY_NOISE * math.sqrt(mean * (1 - mean) / num_questions)
        if not best[name] - last[name] > noise:
            return None
    slope, error = seen.trend.slope()
    if not slope > error:
        return None
    return (
        f"since step {best['step']:.0f} the reward rose by about "
        f"{slope * (seen.trend.last_x - seen.trend.first_x):.3g}, but validation EM fell from "
        f"{best['validation/em']:.3f} to {last['validation/em']:.3f} and F1 from "
        f"{best['validation/f1']:.3f} to {last['validation/f1']:.3f}: the run learns its training "
        "questions by heart, or the reward is not what is wanted. Train on more questions or for "
        "fewer passes, or change reward.functions"
    )


def _constant_policy(seen: _Seen) -> str | None:
    if seen.num_constant < _CONSTANT_VALIDATIONS:
        return None
    return (
        f"on the validation questions, {seen.last['constant_policy']}. A setting does the same: "
        "compare with retriever_reversed and retriever_first, and where these are as good, train "
        "in the other layout of generator.prompt.passage_order, or with more candidates"
    )


def _length_drift(seen: _Seen) -> str | None:
    """Answers against those of the first validation; nothing where those were empty."""
    name = "validation/answer_words"
    if name not in seen.last:
        return None
    first, now, ratio = seen.first[name], seen.last[name], _MAX_LENGTH_RATIO
    if not first > 0 or not (now > ratio * first or now * ratio < first):
        return None
    return (
        f"validation answers have {now:.1f} words on average and had {first:.1f} at first: the "
        "generator changed how it answers. Look at some answers; lower "
        "generator_training.learning_rate, or reward brevity beside the likelihood"
    )


def _failures(seen: _Seen) -> str | None:
    """At the first; the records of later steps name theirs."""
    last = seen.last
    if not last.get("num_failed"):
        return None
    named = last.get("failures") or ["named in the log of another worker"]
    return (
        f"{last['num_failed']:.0f} rewards could not be computed and do not count; the first: "
        f"{named[0]}"
    )
