"""Number of samples per question: weights during training, and the quality reached.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.samples nq`. Runs of one recipe that differ in
m and in the baseline alone train the selector on the same questions; rewards of the same selection
are shared through the cache. A finished run in the folder is taken as it is. `python -m
jobs.report` with the same run directories draws the curves.

Of the columns, those of weights are means over the steps of the first and the last third of
training: the variance of log w, and the effective sample size as a part of m. F1 is that on the
held-back questions at each validation, then on the test questions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.runs import finished_run

RESULTS = Path(__file__).parents[1] / "results"
_FLAGS = (
    *("--data.max-train-questions", "300", "--data.num-validation-questions", "60"),
    *("--training.validate-every", "2", "--training.checkpoint-every", "10"),
)
_SAMPLES = (1, 2, 4, 8)
_BASELINES = ("none", "mean")


def row(name: str, records: list[dict[str, Any]], evaluation: dict[str, Any], m: int) -> str:
    """One run as a line of the table."""
    steps = [record for record in records if "log_weight_variance" in record]
    third = max(1, len(steps) // 3)
    cells = []
    for part in (steps[:third], steps[-third:]):
        cells.append(f"{mean(step['log_weight_variance'] for step in part):.1f}")
        cells.append(f"{mean(step['ess'] for step in part) / m:.2f}")
    curve = [record["validation/f1"] for record in records if "validation/f1" in record]
    cells.append(" ".join(f"{f1:.2f}" for f1 in curve))
    trained = evaluation["systems"]["trained"]
    low, high = trained["f1_ci95"]
    cells += [f"{trained['em']:.3f}", f"{trained['f1']:.3f} ({low:.3f}-{high:.3f})"]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("nq", "hotpotqa"))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    arguments, flags = parser.parse_known_args()
    lines = []
    num_questions = 0
    for m in _SAMPLES:
        for baseline in _BASELINES:
            if m == 1 and baseline == "mean":
                continue  # the only weight minus itself: there is no gradient
            run_dir = arguments.folder / f"{arguments.name}-samples-{m}-{baseline}"
            evaluation, _ = finished_run(
                f"{arguments.name}-dro-selector",
                run_dir,
                0,
                arguments.cache_dir,
                (
                    *_FLAGS,
                    "--algorithm.num-samples",
                    str(m),
                    "--algorithm.baseline",
                    baseline,
                    *flags,
                ),
            )
            text = (run_dir / "metrics.jsonl").read_text()
            records = [json.loads(line) for line in text.splitlines()]
            lines.append(row(f"{m}, {baseline}", records, evaluation, m))
            num_questions = evaluation["num_questions"]
            base = evaluation["systems"]["retriever_order"]
    table = "\n".join(
        [
            f"# {arguments.name}: samples a question and baseline",
            "",
            f"`python -m benchmarks.quality.samples {arguments.name}`; seed 0, 240 training "
            "questions, 10 "
            f"steps, frozen generator, {num_questions} test questions, on which the retriever's "
            f"order has EM {base['em']:.3f} and F1 {base['f1']:.3f}. What the columns are is in "
            "the module.",
            "",
            "| m, baseline | var log w, first third | ESS / m | var log w, last third | ESS / m "
            "| F1 by validation | EM | F1 (95 %) |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    (RESULTS / f"samples-{arguments.name}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
