"""Natural Questions: gain of training over the retriever's order, across seeds and retrievers.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.nq`. It runs `jobs.train nq` once a seed (a
finished run in the folder is taken as it is, a stopped one continues), answers the same questions
in the order of each kind of retriever, untrained, and writes means and spreads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import finished_run

RESULTS_FILE = Path(__file__).parents[1] / "results" / "nq.md"
TARGET_GAIN = 0.10
_KINDS = ("bm25", "dense", "hybrid")


def untrained_orders(run_dir: Path) -> dict[str, dict[str, Any]]:
    """`retriever_order` of each kind of retriever under the configuration of a run."""
    from rlrag.bundle import load_bundle
    from rlrag.cli.cluster import cluster
    from rlrag.config import EvaluationConfig, RunConfig
    from rlrag.evaluation.systems import evaluate
    from rlrag.generation.build import open_generator
    from rlrag.pipeline import open_evaluation_data, open_library, open_reward
    from rlrag.runs.reporting import library_chatter_in

    policy = load_bundle(run_dir / "bundle").policy  # the systems asked for never use it
    kept = RunConfig.from_json((run_dir / "config.json").read_text())
    found = {}
    with library_chatter_in(run_dir / "logs" / "retrievers.log"), cluster("ray"):
        generator, prompts = open_generator(kept.generator, "ray", kept.cache_path)
        try:
            for kind in _KINDS:
                config = kept.model_copy(
                    update={
                        "retrieval": kept.retrieval.model_copy(update={"kind": kind}),
                        "evaluation": EvaluationConfig(systems=("retriever_order",)),
                    }
                )
                candidates, _ = open_evaluation_data(config, open_library(config))
                table = evaluate(
                    config, policy, candidates, open_reward(config, generator, prompts)
                )
                found[kind] = table.to_json()["systems"]["retriever_order"]
        finally:
            generator.close()
    return found


def report(
    evaluations: dict[int, dict[str, Any]],
    orders: dict[str, dict[str, Any]],
    minutes: dict[int, float | None],
) -> str:
    """The results as Markdown."""
    first = next(iter(evaluations.values()))
    lines = [
        "# Natural Questions: trained selection against the retriever's order",
        "",
        f"`python -m benchmarks.quality.nq`; {first['num_questions']} questions, two of five "
        "candidates in "
        "the prompt, SmolLM2-135M-Instruct as the frozen generator.",
        "",
        "| system | EM | F1 | recall@2 |",
        "|---|---|---|---|",
    ]
    lines += [_row(f"retriever_order, {kind}", [order]) for kind, order in orders.items()]
    for name in first["systems"]:
        if name != "retriever_order":
            lines.append(_row(name, [e["systems"][name] for e in evaluations.values()]))
    trained = [e["systems"]["trained"]["em"] for e in evaluations.values()]
    best_kind, best = max(orders.items(), key=lambda item: item[1]["em"])
    gain = statistics.mean(trained) / best["em"] - 1
    lines += [
        "",
        f"Rows of seeds {', '.join(map(str, evaluations))} give mean ± standard deviation. "
        f"The best retriever order is {best_kind}'s with EM {best['em']:.3f}; trained selection is "
        f"**{gain:+.0%}** above it (target: at least {TARGET_GAIN:+.0%}).",
        "",
        "| seed | trained EM | trained minus | 95 % | p | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for seed, evaluation in evaluations.items():
        baseline = evaluation["baselines"][0]["system"]  # the strongest on validation questions
        pair = evaluation["paired"][f"trained_vs_{baseline}"]
        low, high = pair["ci95"]
        took = minutes[seed]
        lines.append(
            f"| {seed} | {evaluation['systems']['trained']['em']:.3f} | {baseline} | "
            f"{pair['em_diff']:+.3f} "
            f"({low:+.3f} to {high:+.3f}) | {pair['p_value']:.2g} | "
            f"{'-' if took is None else f'{took:.0f}'} |"
        )
    return "\n".join(lines) + "\n"


def _row(name: str, systems: Sequence[dict[str, Any]]) -> str:
    cells = [_mean([system[metric] for system in systems]) for metric in ("em", "f1", "recall@2")]
    return f"| {name} | {' | '.join(cells)} |"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.3f}"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{mean} ± {spread:.3f}" if spread else mean


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    arguments = parser.parse_args()
    evaluations, minutes = {}, {}
    for seed in arguments.seeds:
        evaluations[seed], minutes[seed] = finished_run(
            "nq", arguments.folder / f"nq-{seed}", seed, arguments.cache_dir
        )
    orders = untrained_orders(arguments.folder / f"nq-{arguments.seeds[0]}")
    text = report(evaluations, orders, minutes)
    RESULTS_FILE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
