"""The table of a probe's measures: means with intervals, as text and JSON.

A mean is over the questions that a measure says something of. Where there are two systems, their
difference is over the questions of which it says something in both. Its p-values are not corrected
for how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rlrag.evaluation.probe.measures import Measured
from rlrag.evaluation.significance import (
    NUM_RESAMPLES,
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)

Results = Mapping[str, Measured]
"""What each measure found of one system, by name."""


@dataclass(frozen=True)
class ProbeTable:
    """The measures of each system on the same questions, ours first."""

    systems: Mapping[str, Results]
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Values that `json.dumps` takes: `systems.NAME.MEASURE.VALUE` and `paired.A_vs_B`.

        A value is its mean with `ci95` and `num_questions`, and None where no question has it; what
        has no interval stands beside as a number, or as a list of rows.
        """
        return {
            "systems": {
                name: {measure: self._summarize(found) for measure, found in results.items()}
                for name, results in self.systems.items()
            },
            "paired": self._paired(),
        }

    def _summarize(self, found: Measured) -> dict[str, Any]:
        summaries = {name: self._mean(values) for name, values in found.values.items()}
        return summaries | dict(found.numbers) | {k: list(rows) for k, rows in found.tables.items()}

    def _mean(self, values: np.ndarray) -> dict[str, Any] | None:
        known = values[~np.isnan(values)]
        if not len(known):
            return None
        interval = bootstrap_ci(known, self.num_resamples, self.seed)
        return {"mean": float(known.mean()), "ci95": list(interval), "num_questions": len(known)}

    def _paired(self) -> dict[str, Any]:
        if len(self.systems) < 2:
            return {}
        (ours, our_results), (theirs, their_results) = self.systems.items()
        found: dict[str, dict[str, Any]] = {}
        for measure in our_results.keys() & their_results.keys():
            pairs = their_results[measure].values
            for name, values in our_results[measure].values.items():
                both = ~np.isnan(values) & ~np.isnan(pairs[name])
                if both.any():
                    found.setdefault(measure, {})[name] = self._difference(
                        values[both], pairs[name][both]
                    )
        ordered = {measure: found[measure] for measure in our_results if measure in found}
        return {f"{ours}_vs_{theirs}": ordered}

    def _difference(self, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
        return {
            "diff": float(ours.mean() - theirs.mean()),
            "ci95": list(paired_randomization_ci(ours, theirs, self.num_resamples, self.seed)),
            "p_value": paired_randomization_test(ours, theirs, self.num_resamples, self.seed),
            "num_questions": len(ours),
        }


def render(record: Mapping[str, Any], title: str) -> Table:
    """`ProbeTable.to_json` as a rich table that fits 80 columns.

    95 % intervals stand in brackets, the number of questions under n; with two systems p belongs to
    their difference. F1 by setting and tables within measures are left to the JSON.
    """
    systems, paired = record["systems"], next(iter(record["paired"].values()), None)
    drawn = Table(
        title=title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    drawn.add_column("measure", no_wrap=True)
    for name in systems:
        drawn.add_column(f"{name} (95 %)", justify="right")
    drawn.add_column("n", justify="right")
    if paired is not None:
        drawn.add_column("p", justify="right")
    ours = next(iter(systems.values()))
    for measure, found in ours.items():
        drawn.add_row(measure, style="bold")
        for name, value in found.items():
            if isinstance(value, list) or name.startswith("f1@"):
                continue
            cells = [_cell(results.get(measure, {}).get(name)) for results in systems.values()]
            count = str(value["num_questions"]) if isinstance(value, dict) else ""
            row = [f"  {name}", *cells, count]
            if paired is not None:
                pair = paired.get(measure, {}).get(name)
                row.append("" if pair is None else f"{pair['p_value']:.2g}")
            drawn.add_row(*row)
    return drawn


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return _number(value)
    low, high = value["ci95"]
    return f"{_number(value['mean'])} ({_number(low)}, {_number(high)})"


def _number(value: float) -> str:
    """Shares, seconds or counts of tokens in four characters: `.158`, `1.00`, `1022`; a sign more.

    Example:
        >>> [_number(value) for value in (0.1584, 1, -0.5, 12, 1022.3)]
        ['.158', '1.00', '-.500', '12.0', '1022']
    """
    size = abs(value)
    digits = f"{size:.3f}"
    if digits.startswith("0"):
        digits = digits[1:]
    elif size < 999.5:
        digits = digits[:4].rstrip(".")
    else:
        digits = f"{size:.0f}"
    return f"-{digits}" if value < 0 else digits
