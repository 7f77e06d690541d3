"""Compares training signals for the retriever: none, relevance labels, the generator's answers.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.openrag nq`. All runs share questions, prompt
and the cache of judgements, so that only the first pays for the offline stage. Each bundle is
evaluated with one passage in context, and those of `DEEP` with ten, unless `--depths` says
otherwise. A finished run in the folder is taken as it is.

`--reader RUN` has the trained generator of another finished run answer, frozen too, in place of the
untrained one: what a retriever learns depends on how well its passages are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.runs import evaluation_with, finished_run

RESULTS = Path(__file__).parents[1] / "results"
_OFFLINE = ("--algorithm.online-epochs", "0")
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relevance": ("openrag", ("--algorithm.labels", "gold", *_OFFLINE)),
    "offline": ("openrag-offline", ()),
    "online": ("openrag-online", ()),
    "both": ("openrag", ()),
    "kl": ("openrag", ("--algorithm.loss", "kl")),
    "both, else gold": ("openrag", ("--algorithm.labels", "generator_else_gold")),
    "dense relevance": ("openrag-dense", ("--algorithm.labels", "gold", *_OFFLINE)),
    "dense both": ("openrag-dense", ()),
    "dense both, else gold": ("openrag-dense", ("--algorithm.labels", "generator_else_gold")),
}
"""Recipe and flags by the name of a row."""
DEEP = (
    *("relevance", "both", "both, else gold"),
    *("dense relevance", "dense both", "dense both, else gold"),
)
"""Those that are evaluated at all depths, the others at the first: what is compared with others."""


def reader_facts(run_dir: Path) -> str:
    """How the generator of a finished run was trained, for the table."""
    from rlrag.runs.directory import RunDirectory

    config = RunDirectory(run_dir).read_config()
    return (
        f"The generator that answers, frozen, was trained by {config.algorithm.name} on "
        f"`{Path(config.data.train_questions).name}` with {config.environment.num_selected} of "
        f"{config.retrieval.num_candidates} candidates in the prompt."
    )


def report(
    name: str,
    chosen: str,
    reader: str,
    found: dict[str, dict[int, dict[str, Any]]],
    pools: dict[str, dict[str, Any]],
) -> str:
    """The results as Markdown.

    Args:
        name: Of the data set.
        chosen: The flags that named some of the variants and a reader, empty without.
        reader: What the table says of the generator, empty for the untrained one.
        found: Comparisons by variant and number of passages.
        pools: Summaries of the pools by variant, without those labelled by relevance.
    """
    depths = sorted({depth for tables in found.values() for depth in tables})
    first = next(iter(found.values()))[depths[0]]
    heading = " | ".join(f"contained@{d} | EM@{d} | recall@{d}" for d in depths)
    lines = [
        f"# {name}: what the retriever is trained on",
        "",
        f"`python -m benchmarks.quality.openrag {name}{chosen}`; seed 0, "
        f"{first['num_questions']} questions; the number behind @ is that of the passages in "
        "context. Rows of trained retrievers bear the names of `VARIANTS` in the module."
        + (f" {reader}" if reader else ""),
        "",
        f"| retriever | {heading} |",
        "|---" * (1 + 3 * len(depths)) + "|",
    ]
    baselines = ("bm25", "dense", "hybrid", "original_retriever", "oracle")
    whole = max(found.values(), key=len)
    rows = {system: {d: whole[d]["systems"][system] for d in whole} for system in baselines}
    rows |= {
        variant: {d: table["systems"]["tuned_retriever"] for d, table in tables.items()}
        for variant, tables in found.items()
    }
    for row, systems in rows.items():
        cells: list[str] = []
        for depth in depths:
            if depth not in systems:
                cells += ["-"] * 3
                continue
            system, recall = systems[depth], systems[depth][f"recall@{depth}"]
            cells += [f"{system['accuracy']:.3f}", f"{system['em']:.3f}"]
            cells.append("-" if recall is None else f"{recall:.3f}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "Contained answers, trained minus original retriever (95 %):", ""]
    lines += ["| retriever | passages | difference | p |", "|---|---|---|---|"]
    for variant, tables in found.items():
        for depth, table in tables.items():
            paired = table["paired"]["tuned_retriever_vs_original_retriever"]
            low, high = paired["accuracy_ci95"]
            change = f"{paired['accuracy_diff']:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(f"| {variant} | {depth} | {change} | {paired['accuracy_p_value']:.2g} |")
    lines += ["", "Score against label in the offline pools, by type of question:", ""]
    lines += ["| run | type | questions | of use | positive passages | AUC |", "|---" * 6 + "|"]
    for variant, kinds in pools.items():
        for kind, facts in kinds.items():
            auc = "-" if facts["auc"] is None else f"{facts['auc']:.3f}"
            lines.append(
                f"| {variant} | {kind} | {facts['num_questions']} | {facts['num_usable']} | "
                f"{facts['positive_share']:.1%} | {auc} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=("nq",))
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--cache-dir", default=None)
    parser.add_argument(
        "--reader", type=Path, help="finished run whose generator answers the questions"
    )
    parser.add_argument(
        "--depths", nargs="+", type=int, default=[1, 10], help="numbers of passages in the prompt"
    )
    arguments, flags = parser.parse_known_args()
    prefix, reader = arguments.name, ""
    if arguments.reader is not None:
        if not (arguments.reader / "bundle" / "generator").is_dir():
            parser.error(
                f"{arguments.reader} has no trained generator; give a finished run that trained "
                "one, such as one of nq-sft"
            )
        reader = reader_facts(arguments.reader)
        prefix += "-reader"
        flags += ["--generator.model", str((arguments.reader / "bundle" / "generator").absolute())]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    pools: dict[str, dict[str, Any]] = {}
    for variant in arguments.variants:
        recipe, own_flags = VARIANTS[variant]
        run_dir = arguments.folder / f"{prefix}-{variant.replace(',', '').replace(' ', '-')}"
        finished_run(
            f"{arguments.name}-{recipe}", run_dir, 0, arguments.cache_dir, [*own_flags, *flags]
        )
        depths = arguments.depths if variant in DEEP else arguments.depths[:1]
        found[variant] = {depth: evaluation_with(run_dir, depth) for depth in depths}
        if variant in ("both", "dense both"):
            pools[variant] = json.loads((run_dir / "pools" / "summary.json").read_text())
    given = [f'"{variant}"' if " " in variant else variant for variant in arguments.variants]
    chosen = "" if len(given) == len(VARIANTS) else f" --variants {' '.join(given)}"
    if arguments.depths != parser.get_default("depths"):
        chosen += f" --depths {' '.join(map(str, arguments.depths))}"
    chosen += " --reader RUN" if reader else ""
    text = report(arguments.name, chosen, reader, found, pools)
    (RESULTS / f"openrag-{prefix}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
