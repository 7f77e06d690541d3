"""The metrics of each step in; warnings that a run goes wrong out, each once a run.

An alarm never changes a run. It names what was seen and what to try. Alarms depend on the metrics
alone, so that feeding the records of a stopped run again raises the same ones.

    collapse                 one selection has all the weight, or the policy no choice left
    zero_signal              nearly all questions have equal rewards: nothing to learn from
    reward_up_quality_down   the reward goes on rising while validation EM and F1 have fallen
    length_drift             validation answers are far longer or shorter than at the start
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlrag.config import RunConfig

Record = Mapping[str, float]
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
)


@dataclass(frozen=True)
class AlarmLimits:
    """Where each alarm starts."""

    window: int = 10
    """Steps that a mean is taken over; a shorter run raises no alarm that needs one."""
    min_ess: float = 1.05
    """`collapse`: the mean effective sample size is at most this, with m > 1."""
    min_entropy_share: float = 0.05
    """`collapse`: the mean policy entropy is at most this share of the first."""
    max_zero_signal: float = 0.9
    """`zero_signal`: the mean share of questions with equal rewards is above this."""
    quality_noise: float = 1.0
    """`reward_up_quality_down`: EM and F1 fell by more than this many standard errors."""
    max_length_ratio: float = 2.0
    """`length_drift`: answers are more than this many times longer or shorter."""


DEFAULT_LIMITS = AlarmLimits()


@dataclass(frozen=True)
class Alarm:
    """One warning: its name, the step that raised it, and a text for people."""

    name: str
    step: int
    text: str


class Alarms:
    """Watches one run; each alarm is raised at most once.

    Example:
        >>> alarms = Alarms(RunConfig())
        >>> for step in range(1, 11):
        ...     new = alarms.update({"step": step, "zero_signal_share": 1.0})
        >>> [(alarm.name, alarm.step) for alarm in new]
        [('zero_signal', 10)]
    """

    def __init__(self, config: RunConfig, limits: AlarmLimits = DEFAULT_LIMITS) -> None:
        num_samples = 1 if config.training.objective == "sft" else config.dro.num_samples
        num_questions = config.data.num_validation_questions
        self._rules: dict[str, Callable[[Sequence[Record]], str | None]] = {
            "collapse": lambda records: _collapse(records, num_samples, limits),
            "zero_signal": lambda records: _zero_signal(records, limits),
            "reward_up_quality_down": lambda records: _quality_down(records, num_questions, limits),
            "length_drift": lambda records: _length_drift(records, limits),
        }
        self._records: list[Record] = []
        self._raised: list[Alarm] = []

    @property
    def raised(self) -> tuple[Alarm, ...]:
        """All alarms so far, in the order in which they were raised."""
        return tuple(self._raised)

    def update(self, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take the metrics of one step, in order; return the alarms that it raises.

        A metric that is missing or NaN raises nothing.
        """
        self._records.append({name: metrics[name] for name in _WATCHED if name in metrics})
        known = {alarm.name for alarm in self._raised}
        new = [
            Alarm(name, int(metrics["step"]), text)
            for name, rule in self._rules.items()
            if name not in known and (text := rule(self._records)) is not None
        ]
        self._raised += new
        return new

    def replay(self, records: Iterable[Mapping[str, Any]]) -> tuple[Alarm, ...]:
        """Take the records of earlier steps, as a resumed run does; return all alarms so far."""
        for record in records:
            self.update(record)
        return self.raised


def _collapse(records: Sequence[Record], num_samples: int, limits: AlarmLimits) -> str | None:
    """Mean ESS at its lowest, or mean policy entropy far below its first value.

    One sample a question has ESS 1 by definition, and a policy that starts without entropy has none
    to lose: neither counts.
    """
    ess = _recent(records, "ess", limits.window)
    if num_samples > 1 and ess is not None and ess <= limits.min_ess:
        return (
            f"the effective sample size was {ess:.2f} of {num_samples} over the last "
            f"{limits.window} steps: one selection has all the weight. Raise "
            "dro.reward_temperature or dro.num_samples, or look for a reward with extreme values"
        )
    first = next((r["policy_entropy"] for r in records if "policy_entropy" in r), 0.0)
    entropy = _recent(records, "policy_entropy", limits.window)
    if entropy is not None and first > 0 and entropy <= limits.min_entropy_share * first:
        return (
            f"the policy's entropy fell from {first:.3g} to {entropy:.3g} nats over the last "
            f"{limits.window} steps: it draws the same selection again and again. Lower "
            "training.learning_rate, set dro.entropy_weight, or raise dro.proposal_temperature"
        )
    return None


def _zero_signal(records: Sequence[Record], limits: AlarmLimits) -> str | None:
    share = _recent(records, "zero_signal_share", limits.window)
    if share is None or share <= limits.max_zero_signal:
        return None
    return (
        f"{100 * share:.0f} % of the questions had equal rewards for all their selections over the "
        f"last {limits.window} steps: these teach the selector nothing. Use a finer reward such as "
        "answer_logp, more candidates, or dro.replacement False, which draws different selections"
    )


def _quality_down(records: Sequence[Record], num_questions: int, limits: AlarmLimits) -> str | None:
    """Reward rising since the best validation while EM and F1 fell by more than their noise.

    The best validation is the first with the highest F1. The noise of a mean p over n questions is
    its largest possible standard error, sqrt(p (1 - p) / n), as every value lies between 0 and 1.
    The reward rises when the slope of its least-squares line is above its own standard error.
    """
    places = [i for i, record in enumerate(records) if "validation/f1" in record]
    if not places or places[-1] != len(records) - 1 or num_questions < 1:
        return None
    last = records[-1]
    start = max(places, key=lambda place: records[place]["validation/f1"])
    best = records[start]
    for name in ("validation/em", "validation/f1"):
        mean = min(max(best[name], 0.0), 1.0)
        noise = limits.quality_noise * math.sqrt(mean * (1 - mean) / num_questions)
        if not best[name] - last[name] > noise:
            return None
    rewards = [(r["step"], r["reward"]) for r in records[start + 1 :] if "reward" in r]
    slope, error = _trend(rewards)
    if not slope > error:
        return None
    return (
        f"since step {best['step']:.0f} the reward rose by about "
        f"{slope * (rewards[-1][0] - rewards[0][0]):.3g}, but validation EM fell from "
        f"{best['validation/em']:.3f} to {last['validation/em']:.3f} and F1 from "
        f"{best['validation/f1']:.3f} to {last['validation/f1']:.3f}: the run learns its training "
        "questions by heart, or the reward is not what is wanted. Train on more questions or for "
        "fewer passes, or change reward.functions"
    )


def _length_drift(records: Sequence[Record], limits: AlarmLimits) -> str | None:
    """Answers against those of the first validation; nothing where those were empty."""
    name = "validation/answer_words"
    if name not in records[-1]:
        return None
    first = next(record[name] for record in records if name in record)
    now, ratio = records[-1][name], limits.max_length_ratio
    if not first > 0 or not (now > ratio * first or now * ratio < first):
        return None
    return (
        f"validation answers have {now:.1f} words on average and had {first:.1f} at first: the "
        "generator changed how it answers. Look at some answers; lower "
        "generator_training.learning_rate, or reward brevity beside the likelihood"
    )


def _recent(records: Sequence[Record], name: str, window: int) -> float | None:
    """Mean of a metric over the last steps, None until there are enough of them."""
    values = [record[name] for record in records[-window:] if name in record]
    return fmean(values) if len(values) == window else None


def _trend(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error; fewer than 3 points have none."""
    num = len(points)
    if num < 3:
        return 0.0, math.inf
    mean_x = sum(x for x, _ in points) / num
    mean_y = sum(y for _, y in points) / num
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, math.sqrt(residual / (num - 2) / spread)
