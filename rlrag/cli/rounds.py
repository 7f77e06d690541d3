"""Trains retriever, selector and generator in alternating rounds.

    round 1   retriever    on what the untrained generator makes of its passages
              the others   on what the tuned retriever finds
    round 2   retriever    from its tuned weights and a new index; selections that were rewarded in
                           round 1 label passages, the rest is judged by the tuned generator
              the others   from their tuned weights, on the new candidates
    ...

Each turn is an ordinary run in a directory of its own, `DIR/rounds/1-retriever` and so on, with its
own configuration, pools, checkpoints and bundle: these say which versions of the other parts it
learned from. A run that is stopped continues in the turn that it was in.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlrag.cli.opened_bundle import say
from rlrag.cli.single_run import evaluate_bundle, open_all, run_once
from rlrag.config import AlternatingConfig, RunConfig
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.runs.directory import RunDirectory

RETRIEVER, OTHERS = "retriever", "selection"
_ADDED = ("step", "epoch", "generator_tokens_total")
_OF_JUDGING = ("judge_s", "prompt_cut_share", "dropped_passage_share")


@dataclass(frozen=True)
class Trained:
    """What earlier turns left: the newest weights of each part and the log of rewards."""

    retriever: Path | None = None
    selector: Path | None = None
    generator: Path | None = None
    experience: Path | None = None


def run_rounds(config: RunConfig, run_dir: RunDirectory) -> None:
    """Take all turns, then bundle the last weights of every part and compare them."""
    open_all(config, bool(config.systems))
    rounds = num_rounds(config)
    trained, tokens, turns_left = Trained(), 0.0, 2 * rounds
    for number in range(1, rounds + 1):
        for turn in (RETRIEVER, OTHERS):
            directory = RunDirectory(run_dir.rounds / f"{number}-{turn}")
            turn_config = config_of_turn(config, turn, trained, tokens, turns_left)
            directory.claim(turn_config)
            if directory.bundle.is_dir():
                say(f"round {number}, {turn}: done before")
            else:
                say(f"round {number} of {rounds}, {turn}")
                run_once(turn_config, directory, evaluate=False, experience=trained.experience)
            trained = _after(turn, directory, trained)
            tokens += directory.read_metrics()[-1]["generator_tokens_total"]
            turns_left -= 1
        join_metrics(config, run_dir)
    _bundle_and_evaluate(config, run_dir, trained)


def num_rounds(config: RunConfig) -> int:
    """Rounds of a run whose algorithm is `alternating`."""
    assert isinstance(config.algorithm, AlternatingConfig)
    return config.algorithm.rounds


def config_of_turn(
    config: RunConfig, turn: str, trained: Trained, tokens: float = 0.0, turns_left: int = 1
) -> RunConfig:
    """The run of one turn, which starts from what earlier turns left.

    Args:
        config: The whole run.
        turn: Which parts learn.
        trained: What earlier turns left.
        tokens: What they asked of the generator.
        turns_left: This turn and those after it, which may spend equal shares of what earlier ones
            left of the run's budget; where nothing is left, a turn stops as soon as it can.
    """
    values = config.model_dump()
    values["recipe"] = f"{config.recipe}/{turn}"
    values["algorithm"] = values["algorithm"][turn]
    values["training"]["log_experience"] = turn == OTHERS
    if config.training.max_generator_tokens is not None:
        left = config.training.max_generator_tokens - int(tokens)
        values["training"]["max_generator_tokens"] = max(1, left // turns_left)
    values["evaluation"]["systems"] = ("retriever_order",)  # a turn is not compared by itself
    if trained.retriever is not None:
        values["retrieval"] = tuned_retrieval(config.retrieval, trained.retriever).model_dump()
    if trained.generator is not None:
        values["generator"]["model"] = str(trained.generator)
    if trained.selector is not None and turn == OTHERS:
        # What it became is where it goes on, and not the order that it imitated at first.
        values["selector"] |= {
            "weights": str(trained.selector),
            "imitation_steps": 0,
            "imitation_run": None,
        }
    return RunConfig.model_validate(values)


def _after(turn: str, directory: RunDirectory, trained: Trained) -> Trained:
    if turn == RETRIEVER:
        return replace(trained, retriever=directory.bundle / "retriever")
    generator = directory.bundle / "generator"
    return replace(
        trained,
        selector=directory.bundle / "selector.safetensors",
        generator=generator if generator.is_dir() else trained.generator,
        experience=directory.experience,
    )


def join_metrics(config: RunConfig, run_dir: RunDirectory) -> None:
    """The records of all turns so far as one run: steps, passes and generator tokens add up.

    A later turn's step 0 is left out, as it is the last step of the turn before; what it says of
    its judging, and the warnings that this raised, go to the next record.
    """
    records: list[dict[str, Any]] = []
    for number in range(1, num_rounds(config) + 1):
        for turn in (RETRIEVER, OTHERS):
            found = RunDirectory(run_dir.rounds / f"{number}-{turn}").read_metrics()
            before = dict.fromkeys(_ADDED, 0) | (records[-1] if records else {})
            if records and found:  # a turn to come has none
                first, *found = found
                if found:
                    _hand_on(first, found[0])
            for record in found:
                record |= {name: record[name] + before[name] for name in _ADDED}
                record |= {
                    "round": number,
                    "trains_retriever": float(turn == RETRIEVER),
                }
                records.append(record)
    run_dir.replace_metrics(records)


def _hand_on(first: dict[str, Any], record: dict[str, Any]) -> None:
    """Put what a turn's step 0 says of its judging into the record after it."""
    for name in _OF_JUDGING:
        if name in first:
            record.setdefault(name, first[name])
    if "failures" in first:
        record["failures"] = [*first["failures"], *record.get("failures", ())]
    if "alarms" in first:
        record["alarms"] = first["alarms"] | record.get("alarms", {})


def _bundle_and_evaluate(config: RunConfig, run_dir: RunDirectory, trained: Trained) -> None:
    from rlrag.bundle import save_bundle
    from rlrag.pipeline import open_evaluation_data, open_library, open_policy

    library = open_library(config)
    candidates, _ = open_evaluation_data(config, library)
    selector = config.selector.model_copy(update={"weights": str(trained.selector)})
    policy = open_policy(config.model_copy(update={"selector": selector}), candidates)
    last = run_dir.rounds / f"{num_rounds(config)}-{OTHERS}" / "bundle" / "bundle.json"
    facts = json.loads(last.read_text())
    save_bundle(
        run_dir.bundle,
        config,
        policy,
        candidates,
        facts["hashes"],
        run_dir.read_metrics()[-1]["step"],
        partial(shutil.copytree, trained.generator) if trained.generator else None,
        partial(shutil.copytree, trained.retriever) if trained.retriever else None,
    )
    if config.systems:
        evaluate_bundle(config, run_dir, library)
