"""Writes, verifies, loads and deletes the checkpoints of a training run.

A checkpoint is a directory `step-000120` with `state.json`, `policy.safetensors`,
`optimizer.safetensors` and, where a generator is trained, `generator.safetensors` and
`generator_optimizer.safetensors`. Of a run's workers rank 0 alone writes, so what a save finds
half-built is what an earlier process left when it was killed.

A run continues from a checkpoint together with the first one, which others are measured against,
and the one that it counts as the best so far. A damaged one is renamed `damaged-step-000120`, which
nothing reads or deletes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlrag.errors import CheckpointError
from rlrag.files.directories import (
    check_whole,
    contiguous,
    delete,
    find_whole,
    load_tensors,
    names_in,
    whole_directory,
)
from rlrag.files.text import delete_rubbish

WEIGHTS = {"retriever": "retriever", "selector": "policy", "generator": "generator"}
"""The file that holds the weights of each part, of which a bundle is made."""

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Newest:
    """The checkpoint that a run continues from; `damaged` says of each newer one what is wrong."""

    step: int
    files: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]
    damaged: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, named by the number of finished steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        found = map(_NAME.fullmatch, names_in(self.directory))
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.directory / f"step-{step:06d}"

    def save(
        self, step: int, files: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping[str, Any]
    ) -> None:
        """Write the checkpoint of `step`; an existing one of that step is replaced.

        Of all steps, what killed writers left half-built is deleted first.

        Args:
            step: Finished steps.
            files: Tensors by file name, without the suffix, and by their own name.
            state: What else the run continues from; JSON values.
        """
        delete_rubbish(self.directory, _NAME)
        with whole_directory(self.path(step)) as directory:
            for name, tensors in files.items():
                save_file(contiguous(tensors), directory / f"{name}.safetensors")
            (directory / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n")

    def load(self, step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """The files and the state of a checkpoint.

        Raises:
            CheckpointError: when a file is missing or altered, or its state is none.
        """
        directory = find_whole(self.path(step))
        check_whole(directory)
        files = {path.stem: load_tensors(path) for path in directory.glob("*.safetensors")}
        return files, _state(directory)

    def load_newest(self) -> Newest | None:
        """The newest checkpoint that can be continued from; None where there is none at all.

        Each newer one that is damaged, or whose best is, is set aside.

        Raises:
            CheckpointError: when there are checkpoints but the first one, which all others need, is
                not whole; nothing is set aside then.
        """
        steps = self.steps()
        if not steps:
            return None
        self._check_first()
        damaged: list[str] = []
        for step in reversed(steps):
            try:
                files, state = self.load(step)
                self._check_best(step, state)
            except CheckpointError as error:
                place = self.set_aside(step)
                damaged.append(f"checkpoint {step} was set aside as {place.name}: {error}")
            else:
                return Newest(step, files, state, tuple(damaged))
        raise CheckpointError(
            f"no checkpoint in {self.directory} is complete and undamaged; train again"
        )

    def newest_usable(self) -> int | None:
        """The step that `load_newest` would take; nothing is loaded or renamed."""
        try:
            self._check_first()
        except CheckpointError:
            return None
        for step in reversed(self.steps()):
            try:
                directory = find_whole(self.path(step))
                check_whole(directory)
                self._check_best(step, _state(directory))
            except CheckpointError:
                continue
            return step
        return None

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint so that nothing takes it for one; returns where it is."""
        place = free = self.directory / f"damaged-{self.path(step).name}"
        number = 1
        while free.exists():
            number += 1
            free = place.with_name(f"{place.name}-{number}")
        try:
            return find_whole(self.path(step)).rename(free)
        except OSError as error:
            raise CheckpointError(
                f"{self.path(step)} is damaged and cannot be renamed: {error.strerror or error}; "
                "move it away yourself"
            ) from error

    def _check_first(self) -> None:
        try:
            check_whole(find_whole(self.path(0)))
        except CheckpointError as error:
            raise CheckpointError(
                f"the first checkpoint in {self.directory} is damaged or incomplete ({error}), "
                "and a run cannot continue without it; restore it from a copy, or start again "
                "in another --run-dir"
            ) from error

    def _check_best(self, step: int, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose best one so far is damaged or gone."""
        best = state.get("best_step")
        if best in (None, step, 0):
            return
        try:
            check_whole(find_whole(self.path(best)))
        except CheckpointError as error:
            raise CheckpointError(
                f"its best checkpoint so far is damaged or incomplete: {error}"
            ) from error

    def keep(self, num_newest: int, best: int | None, every: int | None = None) -> None:
        """Delete all checkpoints but those that `kept_steps` names."""
        steps = self.steps()
        bests = {self.best_of(step) for step in steps[-num_newest:]} | {best}
        kept = kept_steps(steps, num_newest, bests, every)
        for step in steps:
            if step not in kept:
                delete(self.path(step))

    def best_of(self, step: int) -> int | None:
        """What a checkpoint counts as the best so far; None where it does not say."""
        try:
            best: int | None = _state(find_whole(self.path(step))).get("best_step")
        except CheckpointError:  # damaged: found out when it is to be continued from
            return None
        return best


def _state(directory: Path) -> dict[str, Any]:
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise TypeError(f"it contains a {type(state).__name__}")
        if not isinstance(state.get("best_step"), int | None):
            raise TypeError(f"its best_step is {state['best_step']!r}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not the state of a run ({error}); delete {directory} to continue from an "
            "older one"
        ) from error
    return state


def kept_steps(
    steps: Collection[int], num_newest: int, bests: Collection[int | None], every: int | None
) -> set[int]:
    """The steps whose checkpoints stay: the newest, the best, the first, and one every so many.

    Of each stretch of `every` steps that is the first one, as checkpoints need not fall on
    multiples.

    Example:
        >>> sorted(kept_steps([0, 3, 9, 12, 18, 21, 24], num_newest=1, bests=[9], every=10))
        [0, 9, 12, 21, 24]
    """
    ascending = sorted(steps)
    kept = set(ascending[-num_newest:]) | {0, *(best for best in bests if best is not None)}
    if every is not None:
        stretches: dict[int, int] = {}
        for step in ascending:
            stretches.setdefault(step // every, step)
        kept |= set(stretches.values())
    return kept & set(ascending)
