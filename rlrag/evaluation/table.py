"""Each system's per-question metrics in, the comparison out: JSON values and a table to read."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.box import ASCII, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlrag.errors import DataError
from rlrag.evaluation.baselines import TRAINED, Baseline, baselines_to_json
from rlrag.evaluation.choices import Choices
from rlrag.evaluation.significance import (
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)

_RETRIEVERS = ("tuned_retriever", "original_retriever")

Interval = tuple[float, float]


@dataclass(frozen=True)
class SystemMetrics:
    """One system's metrics, a value for each question in the same order for all systems (Q).

    `recall` and `ndcg` are measured at the table's K, with NaN for a question that names no gold
    passages; None for a system that ranks nothing.
    """

    em: np.ndarray
    f1: np.ndarray
    accuracy: np.ndarray
    recall: np.ndarray | None = None
    ndcg: np.ndarray | None = None

    def of(self, kept_Q: np.ndarray) -> SystemMetrics:
        """The same metrics of some questions alone, by a mask."""
        return SystemMetrics(
            self.em[kept_Q],
            self.f1[kept_Q],
            self.accuracy[kept_Q],
            None if self.recall is None else self.recall[kept_Q],
            None if self.ndcg is None else self.ndcg[kept_Q],
        )


@dataclass(frozen=True)
class SystemSummary:
    """Means with 95 % intervals; `recall` and `ndcg` over the questions that have them."""

    em: float
    f1: float
    accuracy: float
    recall: float | None
    ndcg: float | None
    em_ci95: Interval
    f1_ci95: Interval


@dataclass(frozen=True)
class PairedComparison:
    """Mean differences on the same questions, their 95 % intervals and two-sided p-values.

    `ci95` and `p_value` belong to exact match; the others name their metric.
    """

    em_diff: float
    f1_diff: float
    accuracy_diff: float
    ci95: Interval
    f1_ci95: Interval
    accuracy_ci95: Interval
    p_value: float
    f1_p_value: float
    accuracy_p_value: float


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
        names, as in `recall@5`, and are None where unknown.
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
                    "em_ci95": list(summary.em_ci95),
                    "f1_ci95": list(summary.f1_ci95),
                }
                for name, summary in self.systems.items()
            },
            "paired": {
                name: {
                    "em_diff": comparison.em_diff,
                    "f1_diff": comparison.f1_diff,
                    "accuracy_diff": comparison.accuracy_diff,
                    "ci95": list(comparison.ci95),
                    "f1_ci95": list(comparison.f1_ci95),
                    "accuracy_ci95": list(comparison.accuracy_ci95),
                    "p_value": comparison.p_value,
                    "f1_p_value": comparison.f1_p_value,
                    "accuracy_p_value": comparison.accuracy_p_value,
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
    num_resamples: int = 10_000,
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
    lengths = {name: len(metrics.em) for name, metrics in systems.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(
            f"systems have questions in the numbers {lengths}; give the same questions to all"
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


def render(table: EvaluationTable, box: Box = SIMPLE_HEAD) -> Table:
    """The comparison as a rich table that fits 80 columns.

    `acc.` is the contained-answer accuracy; 95 % intervals stand in brackets.
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
        box=box,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    drawn.add_column("system", no_wrap=True)
    for heading in ("EM (95 %)", "F1 (95 %)"):
        drawn.add_column(heading, justify="right")
    for metric in ("acc.", f"recall@{table.num_selected}", f"nDCG@{table.num_selected}"):
        drawn.add_column(metric, justify="right", no_wrap=True)
    for name, summary in table.systems.items():
        drawn.add_row(
            Text(name, style="bold" if name in (TRAINED, _RETRIEVERS[0]) else ""),
            f"{_share(summary.em)} ({_share(summary.em_ci95[0])}-{_share(summary.em_ci95[1])})",
            f"{_share(summary.f1)} ({_share(summary.f1_ci95[0])}-{_share(summary.f1_ci95[1])})",
            *map(_share, (summary.accuracy, summary.recall, summary.ndcg)),
        )
    return drawn


def plain_text(table: EvaluationTable, width: int = 100) -> str:
    """The same table for a log: ASCII, no colour, at most `width` wide, a newline at the end."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(render(table, box=ASCII))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _summarize(name: str, metrics: SystemMetrics, num_resamples: int, seed: int) -> SystemSummary:
    for metric, values in vars(metrics).items():
        if values is not None and np.shape(values) != np.shape(metrics.em):
            raise DataError(
                f"system {name!r}: {metric} has shape {np.shape(values)}, em "
                f"{np.shape(metrics.em)}; give one value for each question"
            )
    accuracy = np.asarray(metrics.accuracy, dtype=np.float64)
    if not np.isfinite(accuracy).all():
        raise DataError(f"system {name!r}: accuracy holds a value that is not finite")
    return SystemSummary(
        em_ci95=bootstrap_ci(metrics.em, num_resamples, seed),
        f1_ci95=bootstrap_ci(metrics.f1, num_resamples, seed),
        em=float(np.mean(metrics.em)),
        f1=float(np.mean(metrics.f1)),
        accuracy=float(accuracy.mean()),
        recall=_known_mean(metrics.recall),
        ndcg=_known_mean(metrics.ndcg),
    )


def _known_mean(values_Q: np.ndarray | None) -> float | None:
    if values_Q is None:
        return None
    known = np.asarray(values_Q, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else None


def compare(
    ours: SystemMetrics, theirs: SystemMetrics, num_resamples: int = 10_000, seed: int = 0
) -> PairedComparison:
    """Two systems on the same questions, ours minus theirs.

    Raises:
        DataError: unequal numbers of questions, none, or a value that is not finite.
    """
    return PairedComparison(
        em_diff=float(np.mean(ours.em) - np.mean(theirs.em)),
        f1_diff=float(np.mean(ours.f1) - np.mean(theirs.f1)),
        accuracy_diff=float(np.mean(ours.accuracy) - np.mean(theirs.accuracy)),
        ci95=paired_randomization_ci(ours.em, theirs.em, num_resamples, seed),
        f1_ci95=paired_randomization_ci(ours.f1, theirs.f1, num_resamples, seed),
        accuracy_ci95=paired_randomization_ci(ours.accuracy, theirs.accuracy, num_resamples, seed),
        p_value=paired_randomization_test(ours.em, theirs.em, num_resamples, seed),
        f1_p_value=paired_randomization_test(ours.f1, theirs.f1, num_resamples, seed),
        accuracy_p_value=paired_randomization_test(
            ours.accuracy, theirs.accuracy, num_resamples, seed
        ),
    )


def _describe(name: str, pair: PairedComparison) -> Text:
    lines = [
        f"{metric} {diff:+.3f}, 95 % {low:+.3f} to {high:+.3f}, p = {p_value:.2g}"
        for metric, diff, (low, high), p_value in (
            ("EM", pair.em_diff, pair.ci95, pair.p_value),
            ("F1", pair.f1_diff, pair.f1_ci95, pair.f1_p_value),
            ("accuracy", pair.accuracy_diff, pair.accuracy_ci95, pair.accuracy_p_value),
        )
    ]
    return Text("\n".join([name, *lines]))


def _told(choices: Choices | None) -> list[str]:
    """What the trained policy picked, a line each; nothing where none was trained."""
    if choices is None:
        return []
    return [*choices.describe(), *([choices.constant] if choices.constant else [])]


def _share(value: float | None) -> str:
    """A share between 0 and 1 in four characters: `.158`, `1.00`."""
    if value is None:
        return "-"
    digits = f"{value:.3f}"
    return digits[1:] if digits.startswith("0") else digits[:4]
