"""Selector, generator, both, or fine-tuning: the ablation of the DRO paper on one data set.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.ablation nq`. The recipes share questions,
steps and everything else but what they train; see `rlrag.recipes`. A finished run in the folder is
taken as it is. Write the page about the runs with `python -m jobs.report`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.runs import finished_run

RESULTS = Path(__file__).parents[1] / "results"
_RECIPES = ("sft", "dro-selector", "dro-generator", "dro")


def report(
    name: str,
    evaluations: dict[str, dict[str, Any]],
    minutes: dict[str, float | None],
    tokens: dict[str, float],
) -> str:
    """The results as Markdown."""
    first = next(iter(evaluations.values()))
    metrics = ("em", "f1", "accuracy")
    lines = [
        f"# {name}: what to train",
        "",
        f"`python -m benchmarks.quality.ablation {name}`; seed 0, {first['num_questions']} "
        "questions. Each "
        "row is answered by what its recipe trained; frozen is the retriever's order with the "
        "untrained generator.",
        "",
        "| trained | EM (95 %) | F1 (95 %) | contained | generator tokens, M | minutes |",
        "|---|---|---|---|---|---|",
    ]
    rows = {"frozen": first["systems"]["retriever_order"]}
    rows |= {recipe: e["systems"]["trained"] for recipe, e in evaluations.items()}
    for row, system in rows.items():
        cells = [f"{system[metric]:.3f}" for metric in metrics]
        for place, metric in enumerate(metrics[:2]):
            low, high = system[f"{metric}_ci95"]
            cells[place] += f" ({low:.3f}-{high:.3f})"
        took = minutes.get(row)
        cells.append(f"{tokens[row] / 1e6:.2f}" if row in tokens else "-")
        cells.append("-" if took is None else f"{took:.0f}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if {"dro", "sft"} <= set(evaluations):
        lines.append("")
        for metric in metrics[:2]:
            ours, theirs = rows["dro"][metric], rows["sft"][metric]
            lines.append(
                f"- {metric.upper()}: dro over sft {ours / theirs - 1:+.1%} relative (target +5 %)."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("nq", "hotpotqa"))
    parser.add_argument("--recipes", nargs="+", choices=_RECIPES, default=list(_RECIPES))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    arguments, flags = parser.parse_known_args()
    evaluations, minutes, tokens = {}, {}, {}
    for recipe in arguments.recipes:
        run_dir = arguments.folder / f"{arguments.name}-{recipe}"
        evaluations[recipe], minutes[recipe] = finished_run(
            f"{arguments.name}-{recipe}", run_dir, 0, arguments.cache_dir, flags
        )
        records = (run_dir / "metrics.jsonl").read_text().splitlines()
        tokens[recipe] = json.loads(records[-1]).get("generator_tokens_total", 0.0)
    text = report(arguments.name, evaluations, minutes, tokens)
    (RESULTS / f"ablation-{arguments.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
