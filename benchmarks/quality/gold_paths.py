"""What a path finds that one list does not: gold passages, learned from gold recall less a cost.

Run `RLRAG_DATA_DIR=... python -m benchmarks.quality.gold_paths`. No language model is in the loop.
Two policies of the same kind are trained by DRO with the same questions, samples, steps and reward,
which is half the recall of the gold passages, half whether all were picked, less a cost a pick: one
hops along the passage graph, the other, flat, picks among the first 20 of BM25. Each is then played
greedily on questions that it was not trained on. The flat one gets as many picks a question as the
other one took on average, rounded up. Questions are the unit of tests and intervals; what several
seeds got from a question is averaged first. MuSiQue has no dev file here: 100 of its training
questions are held back.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlrag.config import RunConfig
    from rlrag.pipeline import Library
    from rlrag.records import Passage, Question, RewardResult, Trajectories
    from rlrag.retrieval.candidates import CandidateTable
    from rlrag.selection.build import TrainablePolicy

RESULTS = Path(__file__).parents[1] / "results" / "gold_paths.md"
COSTS = {"2wiki": 0.1, "hotpotqa": 0.1, "musique": 0.03}
_EPOCHS = {"2wiki": 5, "hotpotqa": 5, "musique": 8}
_NUM_HELD_BACK = 100
_NUM_PICKS = 6


@dataclass(frozen=True)
class Found:
    """What one policy found, question by question: gold recall, all of it or not, and picks."""

    recall_Q: np.ndarray
    all_Q: np.ndarray
    picks_Q: np.ndarray


class GoldReward:
    """Half the recall of the gold passages and half whether all of them were picked."""

    def __call__(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[RewardResult]:
        """See `rlrag.rewards.protocol.SelectionReward`."""
        from rlrag.records import RewardResult

        found = [_recall(q, passages) for q, passages in zip(questions, selections, strict=True)]
        return [RewardResult((share + (share == 1)) / 2, {"recall": share}) for share in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, play, print the table and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=tuple(COSTS), default=tuple(COSTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    lines, notes = [], []
    for name in options.sets:
        by_policy: dict[str, list[Found]] = {"hops": [], "flat": []}
        for seed in range(options.seeds):
            for kind, found in _seed(name, seed).items():
                by_policy[kind].append(found)
        for kind, runs in by_policy.items():
            lines += [_line(name, kind, str(seed), run) for seed, run in enumerate(runs)]
        notes.append(_compared(name, by_policy["hops"], by_policy["flat"]))
        print(notes[-1], flush=True)
    report = _report(lines, notes)
    print(report)
    options.output.write_text(report)
    return 0


def _seed(name: str, seed: int) -> dict[str, Found]:
    """One training of each policy, and what they find on questions held back."""
    hops = _config(name, seed, with_hops=True)
    flat = _config(name, seed, with_hops=False)
    along, held_back = _train(hops)
    played = _found(hops, along, held_back)
    num_picks = math.ceil(played.picks_Q.mean())
    only_list, held_back = _train(flat)
    only_list.may_stop = False  # as many picks for every question
    environment = flat.environment.model_copy(update={"num_selected": num_picks})
    flat = flat.model_copy(update={"environment": environment})
    return {"hops": played, "flat": _found(flat, only_list, held_back)}


def _config(name: str, seed: int, with_hops: bool) -> RunConfig:
    from rlrag.recipes.hops import title_hops

    recipe = title_hops(name, _NUM_PICKS, COSTS[name])
    hops = recipe.environment.hops
    if not with_hops:
        hops = hops.model_copy(update={"edges": (), "num_first": None})
    return recipe.model_copy(
        update={
            "seed": seed,
            "data": recipe.data.model_copy(
                update={"num_validation_questions": _NUM_HELD_BACK if name == "musique" else 0}
            ),
            "retrieval": recipe.retrieval.model_copy(update={"encoder": None}),
            "environment": recipe.environment.model_copy(update={"hops": hops}),
            "algorithm": recipe.dro.model_copy(update={"reward_temperature": 0.2}),
            "training": recipe.training.model_copy(update={"num_epochs": _EPOCHS[name]}),
        }
    )


def _train(config: RunConfig) -> tuple[TrainablePolicy, CandidateTable]:
    """The trained policy, and the questions that it is to be judged by."""
    from rlrag.pipeline import open_evaluation_data, open_library, open_policy, open_training_data
    from rlrag.training.distributed.workers import SingleWorker
    from rlrag.training.dro.batch import importance_weights
    from rlrag.training.dro.e_step import BatchCollector
    from rlrag.training.learners.selector import SelectorLearner
    from rlrag.training.schedule import BatchSchedule

    started = time.monotonic()
    library: Library = open_library(config)
    data = open_training_data(config, library)
    held_back = data.validation or open_evaluation_data(config, library)[0]
    policy, workers = open_policy(config, data.train), SingleWorker()
    schedule = BatchSchedule(config.training, config.dro, len(data.train), config.seed)
    learner = SelectorLearner(
        policy,
        copy.deepcopy(policy),
        config.dro,
        config.training,
        schedule.num_steps,
        workers,
    )
    collector = BatchCollector(
        config.environment, config.dro, data.train, GoldReward(), config.training.batch_size
    )
    for step in range(schedule.num_steps):
        batch = collector.collect(policy, *schedule.share(step, workers), step, 0)
        learner.update(batch, importance_weights(batch, config.dro), step)
    collector.close()
    print(
        f"{config.recipe} seed {config.seed}, {schedule.num_steps} steps: "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    return policy, held_back


def _found(config: RunConfig, policy: TrainablePolicy, table: CandidateTable) -> Found:
    from rlrag.environment.rollout import play_greedy

    played: Trajectories = play_greedy(config.environment, policy, table)
    recall_Q = np.array(
        [_recall(q, found) for q, found in zip(table.questions, played.evidence, strict=True)]
    )
    picks_Q = np.array([len(found) for found in played.evidence], dtype=np.float64)
    return Found(recall_Q, (recall_Q == 1).astype(np.float64), picks_Q)


def _recall(question: Question, passages: Sequence[Passage]) -> float:
    gold = set(question.gold_ids)
    return len(gold & {passage.id for passage in passages}) / max(len(gold), 1)


def _line(name: str, kind: str, seed: str, found: Found) -> tuple[str, ...]:
    return (
        name,
        kind,
        seed,
        f"{found.all_Q.mean():.3f}",
        f"{found.recall_Q.mean():.3f}",
        f"{found.picks_Q.mean():.2f}",
    )


def _compared(name: str, hops: Sequence[Found], flat: Sequence[Found]) -> str:
    from rlrag.evaluation.significance import paired_randomization_ci, paired_randomization_test

    ours, theirs = (np.mean([run.all_Q for run in runs], axis=0) for runs in (hops, flat))
    low, high = paired_randomization_ci(ours, theirs)
    p_value = paired_randomization_test(ours, theirs)
    return (
        f"{name} ({len(ours)} questions, cost {COSTS[name]} a pick): all gold passages "
        f"{ours.mean():.3f} with hops, {theirs.mean():.3f} flat; difference "
        f"{ours.mean() - theirs.mean():+.3f} (95 % {low:+.3f} to {high:+.3f}, p {p_value:.4f})."
    )


def _report(lines: Sequence[tuple[str, ...]], notes: Sequence[str]) -> str:
    rows = [("data", "policy", "seed", "all gold", "recall", "picks"), ("---",) * 6, *lines]
    return "\n".join(
        (
            "# Gold passages along a path and in one list",
            "",
            "Made by `python -m benchmarks.quality.gold_paths`, whose module says what is done.",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *(f"- {note}" for note in notes),
            "",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
