"""Trains other libraries on the same data, prompt and token budget, and compares the results.

Run `RLRAG_DATA_DIR=... python -m benchmarks.peers nq --runs nq-dro=DIR`. It prepares questions,
candidates and prompts once, trains each peer in an environment of its own, and measures what they
left in one way. Rows of rlrag come from finished runs. The same command goes on where it stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.peers.environments import interpreter
from benchmarks.peers.plan import Prepared, prepare
from benchmarks.peers.quality import Measurement, picked_passages, summary
from benchmarks.peers.running import Finished, Peer, finished_peer
from benchmarks.peers.table import Cost, Row, own_run, report
from rlrag.cli.cluster import cluster
from rlrag.cli.command_line import parse, pick_recipe, run_program
from rlrag.config import RunConfig
from rlrag.errors import ConfigError, RlragError
from rlrag.recipes import RECIPES
from rlrag.records import Passage

_HERE = Path(__file__).parent
RESULTS = _HERE.parent / "results"
PROGRAM = "python -m benchmarks.peers"

PeerName = Literal[
    "cross_encoder", "st_hard_negatives", "st_distillation", "maskable_ppo", "trl_grpo"
]
PEERS: dict[PeerName, Peer] = {
    "cross_encoder": Peer(_HERE / "sentence_transformers" / "cross_encoder.py", ranks=True),
    "st_hard_negatives": Peer(_HERE / "sentence_transformers" / "hard_negatives.py", ranks=True),
    "st_distillation": Peer(_HERE / "sentence_transformers" / "distillation.py", ranks=True),
    "maskable_ppo": Peer(_HERE / "maskable_ppo" / "train.py"),
    "trl_grpo": Peer(_HERE / "trl_grpo" / "train.py", continues=True),
}
"""By name, the quickest first."""


@dataclass(frozen=True)
class PeersArguments:
    """Flags of `benchmarks.peers`."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    folder: Path
    """Where plan, outputs and environments go."""
    output: Path
    """The table."""
    peers: tuple[PeerName, ...] = tuple(PEERS)
    """Those that are compared."""
    runs: tuple[str, ...] = ()
    """Finished runs of rlrag on the same evaluation questions, each as NAME=DIR."""
    token_budget: int = 150_000
    """Generator tokens, of prompts and answers, that each peer may spend."""
    minutes: float = 60.0
    """Longest time for one peer."""


def main(argv: Sequence[str]) -> None:
    """Prepare, run the peers that have not finished, measure all and write the table."""
    recipe, flags = pick_recipe(argv, RECIPES, PROGRAM)
    name = f"peers-{recipe.recipe}"
    default = PeersArguments(_smaller(recipe), Path("runs") / name, RESULTS / f"{name}.md")
    arguments = parse(PeersArguments, default, flags, f"{PROGRAM} {recipe.recipe}")
    open_python = partial(interpreter, folder=arguments.folder / "environments")
    peers = {each: PEERS[each] for each in arguments.peers}
    print(compare(arguments, peers, open_python, _command(argv)))


def compare(
    arguments: PeersArguments,
    peers: Mapping[str, Peer],
    open_python: Callable[[Path], Path],
    command: str,
) -> str:
    """Train and measure these peers; write the table, and return it.

    Args:
        arguments: What is compared, on what, where.
        peers: By name, in the order in which they run.
        open_python: From a `requirements.txt` to the interpreter of its environment.
        command: What the table says that it was made by.

    Raises:
        RunDirectoryError, ConfigError: as `compared_rows`.
    """
    rows, prepared = compared_rows(arguments, peers, open_python)
    text = report(rows, prepared, arguments.token_budget, command)
    arguments.output.write_text(text)
    return text


def compared_rows(
    arguments: PeersArguments, peers: Mapping[str, Peer], open_python: Callable[[Path], Path]
) -> tuple[list[Row], Prepared]:
    """Train and measure these peers; all rows of the table, and what they were measured on.

    Raises:
        RunDirectoryError: when the folder belongs to another comparison.
        ConfigError: when a run of rlrag cannot be compared.
    """
    config = arguments.config
    prepared = prepare(config, arguments.folder, arguments.token_budget)
    own = [own_run(*_named(run), prepared) for run in arguments.runs]
    finished: dict[str, Finished | str] = {}
    for name, peer in peers.items():
        _say(f"{name}: training")
        try:
            finished[name] = finished_peer(
                name, peer, prepared.folder, open_python, arguments.minutes * 60
            )
        except RlragError as error:
            _say(f"{name}: {error}")
            finished[name] = str(error)
    launcher = config.training.launcher
    with cluster(launcher), closing(Measurement(prepared, launcher)) as measurement:
        rows = measured_rows(measurement, prepared, peers, finished)
        rows += [Row(run.name, summary(run.values, measurement.baseline), run.cost) for run in own]
    return rows, prepared


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _smaller(recipe: RunConfig) -> RunConfig:
    """The recipe with as many questions as `nq-dro` and its parts, unless flags say else."""
    sizes = {"max_train_questions": 700, "num_validation_questions": 100}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=sizes)})


def _named(run: str) -> tuple[str, Path]:
    name, _, directory = run.partition("=")
    if not name or not directory:
        raise ConfigError(f"--runs {run!r} has no run name; write NAME=DIR")
    return name, Path(directory)


def _command(argv: Sequence[str]) -> str:
    """What was asked for, without the places of files, which are those of this machine."""
    words, kept = list(argv), []
    while words:
        word = words.pop(0)
        if word in ("--runs", "--folder", "--output", "--cache-dir"):
            while words and not words[0].startswith("--"):
                words.pop(0)
        else:
            kept.append(word)
    return f"{PROGRAM} {shlex.join(kept)}"


def measured_rows(
    measurement: Measurement,
    prepared: Prepared,
    peers: Mapping[str, Peer],
    finished: Mapping[str, Finished | str],
) -> list[Row]:
    """The retriever's order and each peer; a ranking also the other way round in the prompt."""
    first = measurement.retriever_order()
    rows = [
        Row("retriever_order", summary(measurement.baseline, None)),
        Row(f"retriever_order, {_other_way(prepared)}", measurement.quality(_reversed(first))),
    ]
    for name, found in finished.items():
        if isinstance(found, str):
            rows.append(Row(name, found))
            continue
        _say(f"{name}: measuring")
        try:
            rows += _peer_rows(name, peers[name].ranks, found, measurement, prepared)
        except RlragError as error:
            rows.append(Row(name, str(error)))
    return rows


def _peer_rows(
    name: str, ranks: bool, found: Finished, measurement: Measurement, prepared: Prepared
) -> list[Row]:
    result = found.result
    cost = Cost(result["generator_tokens"], result["training_examples"], found.seconds)
    if "generator" in result:
        quality = measurement.generator_quality(found.output / result["generator"])
        return [Row(name, quality, cost)]
    if "encoder" in result:
        selections = measurement.encoder_order(found.output / result["encoder"])
    else:
        selections = picked_passages(prepared, result["picks"])
    rows = [Row(name, measurement.quality(selections), cost)]
    if ranks:
        reversed_quality = measurement.quality(_reversed(selections))
        rows.append(Row(f"{name}, {_other_way(prepared)}", reversed_quality, cost))
    return rows


def _other_way(prepared: Prepared) -> str:
    """Where a ranking's best passage stands in a prompt once its order is reversed."""
    order = prepared.config.generator.prompt.passage_order
    return "best first" if order == "best_last" else "best last"


def _reversed(selections: Sequence[Sequence[Passage]]) -> list[list[Passage]]:
    return [list(selection)[::-1] for selection in selections]


if __name__ == "__main__":
    run_program(main)
