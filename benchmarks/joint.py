"""Retriever, selector and generator in turns against fewer parts, for the same generator tokens.

Run `RLRAG_DATA_DIR=... python -m benchmarks.joint nq`. The recipe `full` goes first; what it asks
of the generator is the budget of the others, which end there or when they have nothing left to
ask. Every system answers the test questions from as many passages. Training and validation
questions are the same. A finished run in the folder is taken as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.runs import evaluation_with, finished_run

RESULTS = Path(__file__).parent / "results"
_SHARES = (0.25, 0.5, 0.75, 1.0)
_NUM_SELECTED = {"nq": 2, "hotpotqa": 3}
_DRO_EPOCHS = "4"


def tokens_of(run_dir: Path) -> float:
    """What a run asked of the generator in all."""
    return _records(run_dir)[-1]["generator_tokens_total"]


def curve(run_dir: Path, budget: float) -> list[str]:
    """The best F1 on the validation questions within each share of the budget."""
    cells = []
    for share in _SHARES:
        within = [
            record["validation/f1"]
            for record in _records(run_dir)
            if "validation/f1" in record and record["generator_tokens_total"] <= share * budget
        ]
        cells.append(f"{max(within):.3f}" if within else "-")
    return cells


def _records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=tuple(_NUM_SELECTED))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    arguments, flags = parser.parse_known_args()
    name, num_passages = arguments.name, _NUM_SELECTED[arguments.name]

    def run(recipe: str, *own: str) -> tuple[Path, dict[str, Any]]:
        run_dir = arguments.folder / f"{name}-joint-{recipe}"
        found, _ = finished_run(f"{name}-{recipe}", run_dir, 0, arguments.cache_dir, [*own, *flags])
        return run_dir, found

    full_dir, full = run("full")
    budget = tokens_of(full_dir)
    bound = ("--training.max-generator-tokens", str(int(budget)))
    dro_dir, dro = run("dro", "--training.num-epochs", _DRO_EPOCHS, *bound)
    openrag_dir, _ = run("openrag", *bound)
    openrag = evaluation_with(openrag_dir, num_passages)
    rows = [
        ("nothing (dense order)", None, dro["systems"]["retriever_order"]),
        ("nothing (semi-parametric order)", None, openrag["systems"]["original_retriever"]),
        ("retriever: openrag", openrag_dir, openrag["systems"]["tuned_retriever"]),
        ("selector, generator: dro", dro_dir, dro["systems"]["trained"]),
        ("all three: full", full_dir, full["systems"]["trained"]),
    ]
    lines = [
        f"# {name}: which parts to train with the same generator tokens",
        "",
        f"`python -m benchmarks.joint {name}{' '.join(['', *flags])}`; seed 0, "
        f"{full['num_questions']} test questions, {num_passages} passages in context, budget "
        f"{budget / 1e6:.2f} M tokens. F1 on the validation questions is the best within a share "
        "of the budget; a retriever alone is validated with one passage.",
        "",
        "| trained | tokens, M | EM (95 %) | F1 (95 %) | contained | "
        + " | ".join(f"validation F1, {share:.0%}" for share in _SHARES)
        + " |",
        "|---" * (5 + len(_SHARES)) + "|",
    ]
    for row, run_dir, system in rows:
        cells = ["-" if run_dir is None else f"{tokens_of(run_dir) / 1e6:.2f}"]
        for metric in ("em", "f1"):
            low, high = system[f"{metric}_ci95"]
            cells.append(f"{system[metric]:.3f} ({low:.3f}-{high:.3f})")
        cells.append(f"{system['accuracy']:.3f}")
        cells += ["-"] * len(_SHARES) if run_dir is None else curve(run_dir, budget)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"joint-{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
