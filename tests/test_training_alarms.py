"""Alarms: each fires on a series made for it, once; none fires on a healthy run."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from rlrag.config import DataConfig, DROConfig, RunConfig, SFTConfig
from rlrag.runs.alarms import Alarm, Alarms

Records = list[dict[str, float]]


def config(num_samples: int = 8, num_validation_questions: int = 100) -> RunConfig:
    return RunConfig(
        data=DataConfig(num_validation_questions=num_validation_questions),
        algorithm=DROConfig(num_samples=num_samples),
    )


def healthy(num_steps: int = 100, seed: int = 0) -> Records:
    """A run that learns: rewards and quality rise, with noise; the policy keeps some entropy."""
    rng = random.Random(seed)
    records = []
    for step in range(num_steps + 1):
        record: dict[str, float] = {"step": step}
        if step % 10 == 0:
            quality = 0.2 + 0.1 * step / num_steps + rng.gauss(0, 0.01)
            record |= {"validation/em": quality, "validation/f1": quality + 0.05}
            record["validation/answer_words"] = 3 + rng.random()
        if step:
            record |= {
                "reward": -10 + 4 * step / num_steps + rng.gauss(0, 1),
                "ess": 4 + rng.random(),
                "policy_entropy": 1.6 - 1.2 * step / num_steps,
                "zero_signal_share": 0.5 * step / num_steps,
            }
        records.append(record)
    return records


def series(name: str, values: Iterable[float]) -> Records:
    return [{"step": step, name: value} for step, value in enumerate(values, start=1)]


def raised(records: Records, cfg: RunConfig | None = None) -> list[tuple[str, int]]:
    return [(alarm.name, alarm.step) for alarm in Alarms(cfg or config()).replay(records)]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_nothing(seed):
    assert raised(healthy(seed=seed)) == []


def test_a_weight_that_takes_everything_is_a_collapse_after_ten_steps():
    assert raised(series("ess", [1.05] * 12)) == [("collapse", 10)]
    assert raised(series("ess", [1.06] * 12)) == []
    assert raised(series("ess", [1.0] * 9)) == []
    # At step 14 one healthy step is still among the last ten: their mean is 1.3.
    assert raised(series("ess", [4.0] * 5 + [1.0] * 20)) == [("collapse", 15)]


def test_one_sample_has_an_effective_size_of_one_without_a_collapse():
    assert raised(series("ess", [1.0] * 30), config(num_samples=1)) == []
    sft = RunConfig(algorithm=SFTConfig())
    assert raised(series("ess", [1.0] * 30), sft) == []


def test_a_policy_without_choice_is_a_collapse_relative_to_its_first_entropy():
    assert raised(series("policy_entropy", [2.0] + [0.1] * 10)) == [("collapse", 11)]
    assert raised(series("policy_entropy", [2.0] + [0.11] * 30)) == []
    assert raised(series("policy_entropy", [0.0] * 30)) == []


def test_equal_rewards_over_ten_steps_are_no_signal():
    assert raised(series("zero_signal_share", [0.0] + [0.95] * 10)) == [("zero_signal", 11)]
    assert raised(series("zero_signal_share", [0.9] * 30)) == []
    # Nine steps at 1 and one at 0.05 have a mean of 0.905.
    assert raised(series("zero_signal_share", [0.05] + [1.0] * 9)) == [("zero_signal", 10)]


def validated(points: dict[int, tuple[float, float]], slope: float, num_steps: int = 40) -> Records:
    """Rewards on a line with a small wave; EM and F1 at the given steps."""
    records = []
    for step in range(num_steps + 1):
        record: dict[str, float] = {"step": step}
        if step in points:
            record["validation/em"], record["validation/f1"] = points[step]
        if step:
            record["reward"] = slope * step + 0.1 * (-1) ** step
        records.append(record)
    return records


def test_reward_up_while_quality_falls_by_more_than_its_noise():
    # 100 questions, EM 0.2: standard error sqrt(0.2 * 0.8 / 100) = 0.04; F1 0.5: 0.05.
    fallen = {0: (0.1, 0.2), 20: (0.2, 0.5), 40: (0.159, 0.449)}
    assert raised(validated(fallen, slope=0.1)) == [("reward_up_quality_down", 40)]
    within_noise = fallen | {40: (0.161, 0.4)}
    assert raised(validated(within_noise, slope=0.1)) == []
    only_em = fallen | {40: (0.1, 0.451)}
    assert raised(validated(only_em, slope=0.1)) == []


@pytest.mark.parametrize("slope", [-0.1, 0.0])
def test_quality_that_falls_with_the_reward_is_not_that_alarm(slope):
    fallen = {0: (0.1, 0.2), 20: (0.2, 0.5), 40: (0.1, 0.2)}
    assert raised(validated(fallen, slope)) == []


def test_the_reward_must_rise_after_the_best_validation():
    records = validated({0: (0.1, 0.2), 20: (0.2, 0.5), 40: (0.1, 0.2)}, slope=0.1)
    for record in records[21:]:
        record["reward"] = 2.0 - 0.01 * record["step"]
    assert raised(records) == []


def test_of_equal_validations_the_first_is_the_best():
    """The reward rose from 20 to 30, between two validations that are equally good."""
    records = validated({20: (0.2, 0.5), 30: (0.2, 0.5), 40: (0.1, 0.2)}, slope=0.1)
    for record in records[31:]:
        record["reward"] = 3.0 + 0.1 * (-1) ** record["step"]
    (alarm,) = Alarms(config()).replay(records)
    assert (alarm.name, alarm.step) == ("reward_up_quality_down", 40)
    assert alarm.text.startswith("since step 20 the reward rose")


@pytest.mark.parametrize(("middle", "expected"), [(-0.7, ["reward_up_quality_down"]), (-0.75, [])])
def test_a_reward_rises_when_its_slope_is_above_the_standard_error(middle, expected):
    """Rewards 0, d and 2 lie off their line of slope 1 by e, -2e and e with e = (1 - d) / 3.

    A line through three points leaves one degree of freedom: the error of its slope is
    sqrt(6 e^2 / 1) / sqrt(2), which is 0.98 for d = -0.7 and 1.01 for d = -0.75.
    """
    records: Records = [{"step": 0, "validation/em": 0.5, "validation/f1": 0.6}]
    records += series("reward", [0.0, middle, 2.0])
    records[-1] |= {"validation/em": 0.1, "validation/f1": 0.2}
    assert [name for name, _ in raised(records)] == expected


def test_a_run_that_is_best_untrained_is_compared_with_its_start():
    records = validated({0: (0.5, 0.6), 20: (0.3, 0.4)}, slope=0.1, num_steps=20)
    assert raised(records) == [("reward_up_quality_down", 20)]
    assert raised(records, config(num_validation_questions=0)) == []
    assert raised(records[:1] + records[19:]) == [], "two rewards are no trend"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([3.0, 6.1], [("length_drift", 2)]),
        ([3.0, 1.4], [("length_drift", 2)]),
        ([3.0, 6.0, 1.5, 3.0], []),
        ([0.0, 5.0], []),
    ],
)
def test_answers_that_double_or_halve_have_drifted(words, expected):
    assert raised(series("validation/answer_words", words)) == expected


@pytest.mark.parametrize(
    ("constant", "expected"),
    [
        ([False, True, True], [("constant_policy", 3)]),
        ([True, False, True], []),
        ([True, False, True, True, True], [("constant_policy", 4)]),
    ],
)
def test_a_policy_that_stays_the_same_for_all_questions_is_named(constant, expected):
    """Steps without a validation between them change nothing."""
    records = []
    for step, found in enumerate(constant, 1):
        validated = {"step": step, "validation/changed_share": 1.0}
        said = {"constant_policy": "the policy picks positions (2, 1)"} if found else {}
        records += [validated | said, {"step": step, "reward": 0.0}]
    assert raised(records) == expected


def test_an_alarm_is_raised_once_and_reads_as_a_sentence():
    alarms = Alarms(config())
    found = [alarms.update(record) for record in series("ess", [1.0] * 50)]
    assert sum(map(len, found)) == 1
    (alarm,) = found[9]
    assert alarm == Alarm("collapse", 10, alarm.text)
    assert alarm.text.startswith("the effective sample size was 1.00 of 8 over the last 10 steps")
    assert "Raise algorithm.reward_temperature" in alarm.text
    assert alarms.raised == (alarm,)


def test_several_alarms_of_one_run():
    records = [
        a | b
        for a, b in zip(
            series("zero_signal_share", [1.0] * 20), series("ess", [1.0] * 20), strict=True
        )
    ]
    assert raised(records) == [("collapse", 10), ("zero_signal", 10)]


@pytest.mark.parametrize("stopped_after", [0, 5, 10, 30, 41])
def test_a_resumed_run_raises_what_an_undisturbed_one_does(stopped_after):
    records = validated({0: (0.1, 0.2), 20: (0.2, 0.5), 40: (0.1, 0.2)}, slope=0.1)
    for record in records:
        record["zero_signal_share"] = 1.0
    whole = Alarms(config())
    online = [whole.update(record) for record in records]
    resumed = Alarms(config())
    before = resumed.replay(records[:stopped_after])
    after = [alarm for record in records[stopped_after:] for alarm in resumed.update(record)]
    assert [*before, *after] == [alarm for new in online for alarm in new]
    assert len(whole.raised) == 2


def test_missing_and_nan_metrics_and_other_values_raise_nothing():
    records: list = [{"step": step, "alarms": ["collapse"], "ess": math.nan} for step in range(30)]
    assert raised(records) == []
    assert raised([{"step": step} for step in range(30)]) == []
    gap = series("ess", [1.0] * 20)
    for record in gap[::5]:
        del record["ess"]
    assert raised(gap) == []


def test_rewards_that_failed_are_named_once():
    alarms = Alarms(config())
    assert alarms.update({"step": 1, "num_failed": 0.0}) == []
    failed = {"num_failed": 2.0, "failures": ["question 'q1': it died", "question 'q2': too long"]}
    assert alarms.update({"step": 2, **failed}) == [
        Alarm(
            "failures",
            2,
            "2 rewards could not be computed and do not count; the first: question 'q1': it died",
        )
    ]
    assert alarms.update({"step": 3, **failed}) == []
    (elsewhere,) = Alarms(config()).update({"step": 1, "num_failed": 1.0})
    assert "the log of another worker" in elsewhere.text


@pytest.mark.parametrize(
    ("tokens", "passages", "told"),
    [
        (0.0, 0.0, None),
        (0.01, 0.01, None),
        (0.25, 0.0, "no room for 25.0 % of their tokens"),
        (0.0, 0.5, "showed nothing of 50.0 % of the passages"),
    ],
)
def test_prompts_without_room_are_told_once(tokens: float, passages: float, told: str | None):
    alarms = Alarms(config())
    record = {"step": 1, "prompt_cut_share": tokens, "dropped_passage_share": passages}
    new = alarms.update(record)
    assert [alarm.name for alarm in new] == (["cut_prompts"] if told else [])
    if told:
        assert told in new[0].text
        assert "max_prompt_tokens" in new[0].text
    assert alarms.update(record | {"step": 2}) == []
