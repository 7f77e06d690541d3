"""The state of a run in; a directory that is whole or absent out, and back.

A checkpoint is a directory `step-000120` with `state.json`, `policy.safetensors`,
`optimizer.safetensors` and, where a generator is trained, `generator.safetensors` and
`generator_optimizer.safetensors`. Of a run's workers rank 0 alone writes, so what a save finds
half-built is what an earlier process left when it was killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlrag.storage import (
    check_whole,
    contiguous,
    delete,
    delete_rubbish,
    find_whole,
    load_tensors,
    names_in,
    whole_directory,
)

_NAME = re.compile(r"step-(\d{6,})")


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
            CheckpointError: when a file is missing or altered.
        """
        directory = find_whole(self.path(step))
        check_whole(directory)
        files = {path.stem: load_tensors(path) for path in directory.glob("*.safetensors")}
        return files, json.loads((directory / "state.json").read_text())

    def keep(self, num_newest: int, best: int | None) -> None:
        """Delete all but the newest, the best and the first, which others are measured against."""
        for step in self.steps()[:-num_newest]:
            if step not in (best, 0):
                delete(self.path(step))
