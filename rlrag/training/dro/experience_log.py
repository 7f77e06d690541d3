"""Logs rewarded episodes, and estimates each passage's contribution to the rewards.

Rewards of selections cost generator tokens. Kept, they tell a retriever what they told the
selector: a passage whose presence raises the reward helps, and need not be judged again by itself.

Each worker appends to a file of its own, one line a question and step. Shape letters: B questions,
M samples, K selected, N candidates.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.algorithms.rag_labels import Label, has_bad_answer, marginal_contributions
from rlrag.errors import CheckpointError, DataError
from rlrag.files.text import write_whole
from rlrag.retrieval.candidates import CandidateTable
from rlrag.training.distributed.workers import Workers
from rlrag.training.dro.batch import RewardedBatch


class ExperienceLog:
    """The log of one worker."""

    def __init__(self, directory: Path, workers: Workers, candidates: CandidateTable) -> None:
        self._path = directory / f"worker-{workers.rank}.jsonl"
        self._workers = workers
        self._candidates = candidates

    def append(self, step: int, batch: RewardedBatch) -> None:
        """Add what a step collected.

        Raises:
            CheckpointError: when the disk is full.
        """
        lines = []
        for place, question in enumerate(batch.question_rows.tolist()):
            rewards = batch.rewards_BM[place]
            rows = self._candidates.rows_QN[question].tolist()
            lines.append(
                {
                    "step": step,
                    "question": self._candidates.questions[question].id,
                    "candidates": rows,
                    "selections": [
                        [action for action in actions if 0 <= action < len(rows)]
                        for actions in batch.actions_BMT[place].tolist()
                    ],
                    "rewards": [None if np.isnan(reward) else float(reward) for reward in rewards],
                    "policy_version": batch.policy_version,
                    "generator_version": batch.generator_version,
                }
            )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror or error}; free space, then run the "
                "same command again to continue from the last checkpoint"
            ) from error

    def truncate(self, num_steps: int) -> None:
        """Drop what was collected after so many steps; a resumed run collects it again.

        All workers call this, and see to the logs of those that are no more besides.
        """
        paths = sorted(self._path.parent.glob("worker-*.jsonl"))
        for path in paths[self._workers.rank :: self._workers.size]:
            kept = [line for line in _lines(path) if line["step"] < num_steps]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._workers.barrier()


def labels_from_experience(directory: Path, margin: float) -> dict[str, dict[int, Label]]:
    """Labels of the passages whose contribution to the reward is clear, by question id and row.

    The contribution of a passage is the mean reward of the selections with it less that of those
    without it (`marginal_contributions`), over the selections of one question that were rewarded by
    one version of the generator; versions are averaged. A contribution of at least `margin` makes a
    positive. One of at most 0 makes a negative where the passage had a bad answer of its own
    (`has_bad_answer`); otherwise the selections without it may merely have held a better one. All
    others stay open, to be judged.

    Raises:
        DataError: when a line of the log is not what `ExperienceLog` writes.
    """
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    bad: dict[str, set[int]] = defaultdict(set)
    for (question, _), records in _grouped(directory).items():
        rows = records[0]["candidates"]
        positions = _positions([s for record in records for s in record["selections"]], len(rows))
        rewards = np.array([r for record in records for r in record["rewards"]], dtype=np.float64)
        for row, value in zip(
            rows, marginal_contributions(positions, rewards, len(rows)), strict=True
        ):
            if not np.isnan(value):
                found[question][row].append(float(value))
        is_bad_N = has_bad_answer(positions, rewards, len(rows), margin)
        bad[question].update(np.array(rows)[is_bad_N].tolist())
    labels: dict[str, dict[int, Label]] = {}
    for question, contributions in found.items():
        means = {row: float(np.mean(values)) for row, values in contributions.items()}
        positive: dict[int, Label] = {row: 1 for row, mean in means.items() if mean >= margin}
        negative: dict[int, Label] = {
            row: 0 for row, mean in means.items() if mean <= 0 and row in bad[question]
        }
        labels[question] = {**negative, **positive}
    return labels


def _positions(selections: Sequence[Sequence[int]], num_candidates: int) -> np.ndarray:
    """Selections as an array, `num_candidates` beyond the end of one that stopped early."""
    shape = (len(selections), max(map(len, selections)))
    positions_MK = np.full(shape, num_candidates, dtype=np.int64)
    for place, selection in enumerate(selections):
        positions_MK[place, : len(selection)] = selection
    return positions_MK


def _grouped(directory: Path) -> Mapping[tuple[str, str], list[dict[str, Any]]]:
    """Records by question, and by what decides its rewards and positions."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(directory.glob("worker-*.jsonl")):
        for line in _lines(path):
            key = json.dumps([line["generator_version"], line["candidates"]])
            groups[line["question"], key].append(line)
    return groups


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open() as stream:
        for number, text in enumerate(stream, 1):
            if not text.endswith("\n"):  # a writer was killed in the middle of it
                return
            try:
                yield json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}); delete the line"
                ) from error
