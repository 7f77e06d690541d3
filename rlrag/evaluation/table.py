"""The comparison of systems: JSON values and a table to read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rlrag.errors import DataError
from rlrag.evaluation.baselines import TRAINED, Baseline, baselines_to_json
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.significance import (
    NUM_RESAMPLES,
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)

_RETRIEVERS = ("tuned_retriever", "original_retriever")
PATH_MEASURES = ("all_gold", "picks", "searches", "tokens")
"""Measures that runs have whose episodes look further."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class SystemMetrics:
    """One system's metrics, a value for each question in the same order for all systems (Q).

    `em`, `f1` and `accuracy` are None where no question has golden answers, `reward` where it is
    not asked for. `recall` and `ndcg` are measured at the table's K, with NaN for a question that
    names no gold passages; None for a system that ranks nothing. Of runs that look further
    `all_gold` says whether all gold passages were shown, and `picks`, `searches` and `tokens` count
    passages shown, searches beside the question's own, and tokens of prompt and answer.
    """

    em: np.ndarray | None
    f1: np.ndarray | None
    accuracy: np.ndarray | None
    recall: np.ndarray | None = None
    ndcg: np.ndarray | None = None
    reward: np.ndarray | None = None
    all_gold: np.ndarray | None = None
    picks: np.ndarray | None = None
    searches: np.ndarray | None = None
    tokens: np.ndarray | None = None

    @property
    def num_questions(self) -> int:
        """Q."""
        known = (values for values in vars(self).values() if values is not None)
        return max(map(len, known), default=0)

    def of(self, kept_Q: np.ndarray) -> SystemMetrics:
        """The same metrics of some questions alone, by a mask."""
        return SystemMetrics(
            **{
                name: None if values is None else values[kept_Q]
                for name, values in vars(self).items()
            }
        )


@dataclass(frozen=True)
class SystemSummary:
    """Means with 95 % intervals; `recall` and `ndcg` over the questions that have them.

    None where nothing is known.
    """

    em: float | None
    f1: float | None
    accuracy: float | None
    recall: float | None
    ndcg: float | None
    reward: float | None
    em_ci95: Interval | None
    f1_ci95: Interval | None
    reward_ci95: Interval | None
    all_gold: float | None = None
    picks: float | None = None
    searches: float | None = None
    tokens: float | None = None


@dataclass(frozen=True)
class PairedComparison:
    """Mean differences on the same questions, their 95 % intervals and two-sided p-values.

    `ci95` and `p_value` belong to exact match; the others name their metric. All of a metric are
    None where one of the systems lacks it.
    """

    em_diff: float | None = None
    f1_diff: float | None = None
    accuracy_diff: float | None = None
    reward_diff: float | None = None
    ci95: Interval | None = None
    f1_ci95: Interval | None = None
    accuracy_ci95: Interval | None = None
    reward_ci95: Interval | None = None
    p_value: float | None = None
    f1_p_value: float | None = None
    accuracy_p_value: float | None = None
    reward_p_value: float | None = None


@dataclass(frozen=True)
class EvaluationTable:
    """The comparison of systems on one question set, with K passages shown to the generator.

    `left_out` has the ids of questions that count for no system, and why. `baselines` are what
    `trained` is compared with, and `choices` what the trained policy picked, where one was trained.
    """

    num_questions: int
    num_selected: int
    systems: Mapping[str, SystemSummary]
    paired: Mapping[str, PairedComparison]
    left_out: Mapping[str, str] = field(default_factory=dict)
    baselines: Sequence[Baseline] = ()
    choices: Choices | None = None

    def to_json(self) -> dict[str, Any]:
        """Values that `json.dumps` takes: `num_questions`, `systems.NAME`, `paired.A_vs_B`.

        `baselines` says which systems `trained` is compared with and how these were chosen, and
        `choices`, where a selector was trained, which positions it picked. Where questions had to
        be left out, `left_out.ID` says why. Recall and nDCG carry K in their
        names, as in `recall@5`, and are None where unknown, like the measures of answers where no
        question has golden answers. `reward` is there where it is what the run is judged by.
        """
        return {
            "num_questions": self.num_questions,
            "systems": {
                name: {
                    "em": summary.em,
                    "f1": summary.f1,
                    "accuracy": summary.accuracy,
                    f"recall@{self.num_selected}": summary.recall,
                    f"ndcg@{self.num_selected}": summary.ndcg,
                    "em_ci95": _listed(summary.em_ci95),
                    "f1_ci95": _listed(summary.f1_ci95),
                    **(
                        {"reward": summary.reward, "reward_ci95": _listed(summary.reward_ci95)}
                        if summary.reward is not None
                        else {}
                    ),
                    **{
                        measure: value
                        for measure in PATH_MEASURES
                        if (value := getattr(summary, measure)) is not None
                    },
                }
                for name, summary in self.systems.items()
            },
            "paired": {
                name: {
                    key: _listed(value) if isinstance(value, tuple) else value
                    for key, value in vars(comparison).items()
                    if value is not None
                }
                for name, comparison in self.paired.items()
            },
            "baselines": baselines_to_json(self.baselines),
            **({"choices": self.choices.to_json()} if self.choices else {}),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
        }


def build_table(
    systems: Mapping[str, SystemMetrics],
    num_selected: int,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    left_out: Mapping[str, str] = MappingProxyType({}),
    baselines: Sequence[Baseline] = (),
    choices: Choices | None = None,
) -> EvaluationTable:
    """Summarise the systems in the given order, and compare the pairs of `paired_systems`.

    `left_out` says why which questions are not among the metrics, `choices` what was picked.

    Raises:
        DataError: no systems, no questions, unequal numbers of questions, or a value that is not
            finite where one is needed.
    """
    lengths = {name: metrics.num_questions for name, metrics in systems.items()}
    if not lengths:
        raise DataError("no systems were evaluated; give at least one")
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"systems were evaluated on different numbers of questions, {lengths}; evaluate all on "
            "the same ones"
        )
    summaries = {
        name: _summarize(name, metrics, num_resamples, seed) for name, metrics in systems.items()
    }
    paired = {}
    for pair in paired_systems(systems, baselines):
        ours, theirs = (systems[name] for name in pair)
        paired["_vs_".join(pair)] = compare(ours, theirs, num_resamples, seed)
    return EvaluationTable(
        next(iter(lengths.values())),
        num_selected,
        summaries,
        paired,
        left_out,
        baselines,
        choices,
    )


def paired_systems(
    systems: Collection[str], baselines: Sequence[Baseline]
) -> list[tuple[str, str]]:
    """Of these systems those that a paired test compares, ours first."""
    pairs = [(TRAINED, baseline.system) for baseline in baselines] + [_RETRIEVERS]
    return [pair for pair in pairs if all(name in systems for name in pair)]


def name_pair(name: str, baselines: Sequence[Baseline] = ()) -> str:
    """A comparison such as `trained_vs_retriever_order` in words, with why it is made."""
    ours, _, theirs = name.partition("_vs_")
    why = next((f", {b}" for b in baselines if ours == TRAINED and b.system == theirs), "")
    return f"{ours} minus {theirs}{why}"


def render(table: EvaluationTable) -> Table:
    """The comparison as a rich table that fits 80 columns.

    `acc.` is the contained-answer accuracy, `rec.` recall; 95 % intervals stand in brackets. Runs
    that look further have in their place `all gold`, the share of questions with all gold passages,
    and the mean `picks` and `searches`.
    """
    drawn = Table(
        title=f"{table.num_questions} questions, at most {table.num_selected} passages each",
        caption=Text("\n").join(
            [
                *(
                    _describe(name_pair(name, table.baselines), pair)
                    for name, pair in table.paired.items()
                ),
                *map(Text, _told(table.choices)),
                *(Text(f"left out {why}") for why in table.left_out.values()),
            ]
        ),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    drawn.add_column("system", no_wrap=True)
    for heading in ("EM (95 %)", "F1 (95 %)"):
        drawn.add_column(heading, justify="right", overflow="fold")
    has_paths = any(summary.picks is not None for summary in table.systems.values())
    measures = ("acc.", f"rec.@{table.num_selected}", f"nDCG@{table.num_selected}")
    for metric in ("all gold", "picks", "searches") if has_paths else measures:
        drawn.add_column(metric, justify="right", no_wrap=True)
    has_reward = any(summary.reward is not None for summary in table.systems.values())
    if has_reward:
        drawn.add_column("reward", justify="right", no_wrap=True)
    for name, summary in table.systems.items():
        drawn.add_row(
            Text(name, style="bold" if name in (TRAINED, _RETRIEVERS[0]) else ""),
            _with_interval(summary.em, summary.em_ci95),
            _with_interval(summary.f1, summary.f1_ci95),
            *(
                (in_short(summary.all_gold), *map(_any_scale, (summary.picks, summary.searches)))
                if has_paths
                else map(in_short, (summary.accuracy, summary.recall, summary.ndcg))
            ),
            *([_any_scale(summary.reward)] if has_reward else []),
        )
    return drawn


def _summarize(name: str, metrics: SystemMetrics, num_resamples: int, seed: int) -> SystemSummary:
    shape = (metrics.num_questions,)
    for metric, values in vars(metrics).items():
        if values is not None and np.shape(values) != shape:
            raise DataError(
                f"system {name!r}: {metric} has shape {np.shape(values)}, but there are "
                f"{shape[0]} questions; give one value for each question"
            )
    if shape == (0,):
        raise DataError(f"system {name!r}: its metrics have shape (0,); give at least one question")
    if metrics.accuracy is not None and not np.isfinite(metrics.accuracy).all():
        raise DataError(f"system {name!r}: accuracy contains a value that is not finite")

    def interval(values_Q: np.ndarray | None) -> Interval | None:
        return None if values_Q is None else bootstrap_ci(values_Q, num_resamples, seed)

    return SystemSummary(
        em_ci95=interval(metrics.em),
        f1_ci95=interval(metrics.f1),
        reward_ci95=interval(metrics.reward),
        em=_known_mean(metrics.em),
        f1=_known_mean(metrics.f1),
        accuracy=_known_mean(metrics.accuracy),
        recall=_known_mean(metrics.recall),
        ndcg=_known_mean(metrics.ndcg),
        reward=_known_mean(metrics.reward),
        **{measure: _known_mean(getattr(metrics, measure)) for measure in PATH_MEASURES},
    )


def _known_mean(values_Q: np.ndarray | None) -> float | None:
    if values_Q is None:
        return None
    known = np.asarray(values_Q, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else None


def compare(
    ours: SystemMetrics, theirs: SystemMetrics, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> PairedComparison:
    """Two systems on the same questions, ours minus theirs.

    Raises:
        DataError: unequal numbers of questions, none, or a value that is not finite.
    """
    found: dict[str, Any] = {}
    for metric, prefix in (
        ("em", ""),
        ("f1", "f1_"),
        ("accuracy", "accuracy_"),
        ("reward", "reward_"),
    ):
        pair = (getattr(ours, metric), getattr(theirs, metric))
        if pair[0] is None or pair[1] is None:
            continue
        found[f"{metric}_diff"] = float(np.mean(pair[0]) - np.mean(pair[1]))
        found[f"{prefix}ci95"] = paired_randomization_ci(*pair, num_resamples, seed)
        found[f"{prefix}p_value"] = paired_randomization_test(*pair, num_resamples, seed)
    return PairedComparison(**found)


def _describe(name: str, pair: PairedComparison) -> Text:
    lines = [
        f"{metric} {diff:+.3f}, 95 % {interval[0]:+.3f} to {interval[1]:+.3f}, p = {p_value:.2g}"
        for metric, diff, interval, p_value in (
            ("EM", pair.em_diff, pair.ci95, pair.p_value),
            ("F1", pair.f1_diff, pair.f1_ci95, pair.f1_p_value),
            ("accuracy", pair.accuracy_diff, pair.accuracy_ci95, pair.accuracy_p_value),
            ("reward", pair.reward_diff, pair.reward_ci95, pair.reward_p_value),
        )
        if diff is not None and interval is not None and p_value is not None
    ]
    return Text("\n".join([name, *lines]))


def _told(choices: Choices | None) -> list[str]:
    """What the trained policy picked, a line each; nothing where none was trained."""
    if choices is None:
        return []
    return [*choices.describe(), *([choices.constant] if choices.constant else [])]


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _with_interval(mean: float | None, interval: Interval | None) -> str:
    return in_short(mean) + (f" ({'-'.join(map(in_short, interval))})" if interval else "")


def _any_scale(value: float | None) -> str:
    """A reward, which may have any size and sign, in three digits."""
    return "-" if value is None else f"{value:.3g}"


def in_short(value: float | None) -> str:
    """A share between 0 and 1 in four characters: `.158`, `1.00`."""
    if value is None:
        return "-"
    digits = f"{value:.3f}"
    return digits[1:] if digits.startswith("0") else digits[:4]
