"""Quality and cost of selectors: a network on features, a language model.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.selector_kinds nq`. Both train on the same
questions with the same generator, frozen, and the same rewards. The feature network ranks by
Plackett-Luce from frozen embeddings and retriever scores; the language model reads the passages and
writes `[2] > [1]`, as in the DRO paper, and imitates the retriever's order before the first reward.
A finished run in the folder is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.runs import finished_run
from rlrag.bundle import load_bundle
from rlrag.config import BUILTIN_GENERATOR
from rlrag.environment.rollout import play_greedy
from rlrag.pipeline import open_evaluation_data, open_library
from rlrag.retrieval.candidates import CandidateTable

RESULTS = Path(__file__).parents[1] / "results"
_COMMON = (
    *("--data.max-train-questions", "280", "--data.num-validation-questions", "40"),
    *("--training.validate-every", "5", "--training.checkpoint-every", "5"),
)
KINDS: dict[str, tuple[str, ...]] = {
    "features": ("--selector.kind", "features"),
    "listwise_lm": (
        *("--selector.kind", "listwise_lm", "--selector.model", BUILTIN_GENERATOR),
        *("--selector.max-tokens", "64", "--selector.imitation-steps", "12"),
        *("--training.learning-rate", "1e-3"),
    ),
}
"""Flags by kind of selector."""
_TIMED_QUESTIONS = 48


def cost(run_dir: Path, table: CandidateTable, threads: int) -> dict[str, float]:
    """What a trained selector costs, in seconds a question where nothing else is said.

    Returns:
        `trained`: parameters that were trained. `pick`: choosing the best selection. `learn`: the
        update, the mean over the run's steps.
    """
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "learn_s" in record]
    batch_size = json.loads((run_dir / "config.json").read_text())["training"]["batch_size"]
    bundle = load_bundle(run_dir / "bundle")
    policy, environment = bundle.policy, bundle.config.environment
    torch.set_num_threads(threads)
    batches = [range(n, n + 8) for n in range(0, _TIMED_QUESTIONS, 8)]
    play_greedy(environment, policy, table, batches[0])
    started = time.perf_counter()
    for rows in batches:
        play_greedy(environment, policy, table, rows)
    pick_s = time.perf_counter() - started
    return {
        "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        "pick": pick_s / _TIMED_QUESTIONS,
        "learn": sum(step["learn_s"] for step in steps) / len(steps) / batch_size,
    }


def report(
    name: str,
    evaluations: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, float]],
    minutes: dict[str, float | None],
) -> str:
    """The results as Markdown."""
    first = next(iter(evaluations.values()))
    lines = [
        f"# {name}: a feature network or a language model as the selector",
        "",
        f"`python -m benchmarks.quality.selector_kinds {name}`; seed 0, 240 training questions, "
        "10 steps, "
        f"frozen generator, {first['num_questions']} test questions; two threads. The first row "
        "is the retriever's order.",
        "",
        "| selector | EM (95 %) | F1 (95 %) | trained parameters, M | pick, ms a question "
        "| update, ms a question | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {"-": first["systems"]["retriever_order"]}
    rows |= {kind: e["systems"]["trained"] for kind, e in evaluations.items()}
    for row, system in rows.items():
        cells = []
        for metric in ("em", "f1"):
            low, high = system[f"{metric}_ci95"]
            cells.append(f"{system[metric]:.3f} ({low:.3f}-{high:.3f})")
        if row in costs:
            spent = costs[row]
            took = minutes[row]
            cells.append(f"{spent['trained'] / 1e6:.2f}")
            cells += [f"{spent['pick'] * 1e3:.1f}", f"{spent['learn'] * 1e3:.1f}"]
            cells.append("-" if took is None else f"{took:.0f}")
        else:
            cells += ["-"] * 4
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, time the selectors side by side, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("nq", "hotpotqa"))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument("--threads", type=int, default=2)
    arguments, flags = parser.parse_known_args()
    evaluations, minutes, costs = {}, {}, {}
    for kind in arguments.kinds:
        run_dir = arguments.folder / f"{arguments.name}-selector-{kind}"
        evaluations[kind], minutes[kind] = finished_run(
            f"{arguments.name}-dro-selector",
            run_dir,
            0,
            arguments.cache_dir,
            (*_COMMON, *KINDS[kind], *flags),
        )
        config = load_bundle(run_dir / "bundle").config
        table = open_evaluation_data(config, open_library(config))[0]
        costs[kind] = cost(run_dir, table, arguments.threads)
    text = report(arguments.name, evaluations, costs, minutes)
    (RESULTS / f"selectors-{arguments.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
