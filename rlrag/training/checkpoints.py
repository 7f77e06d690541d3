"""The state of a run in; a directory that is whole or absent out, and back.

A checkpoint is a directory `step-000120` with `policy.safetensors`, `optimizer.safetensors` and
`state.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlrag.storage import check_whole, contiguous, load_weights, save_weights, whole_directory


class CheckpointStore:
    """The checkpoints of one run, named by the number of finished steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(int(path.name[5:]) for path in self.directory.glob("step-*"))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.directory / f"step-{step:06d}"

    def save(
        self,
        step: int,
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
    ) -> None:
        """Write the checkpoint of `step`; an existing one of that step is replaced."""
        with whole_directory(self.path(step)) as directory:
            save_weights(policy, directory / "policy.safetensors")
            save_file(_optimizer_tensors(optimizer), directory / "optimizer.safetensors")
            (directory / "state.json").write_text(json.dumps(dict(state), indent=2) + "\n")

    def load(
        self, step: int, policy: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Restore weights and optimiser in place and return the state.

        Raises:
            CheckpointError: when a file is missing or altered, or the tensors do not fit.
        """
        state = self.read_state(step)
        load_weights(policy, self.path(step) / "policy.safetensors")
        _restore_optimizer(optimizer, load_file(self.path(step) / "optimizer.safetensors"))
        return state

    def read_state(self, step: int) -> dict[str, Any]:
        """Check a checkpoint's files and return its state."""
        check_whole(self.path(step))
        return json.loads((self.path(step) / "state.json").read_text())

    def load_policy(self, step: int, policy: torch.nn.Module) -> None:
        """Restore the weights alone.

        Raises:
            CheckpointError: when a file is missing or altered, or the tensors do not fit.
        """
        check_whole(self.path(step))
        load_weights(policy, self.path(step) / "policy.safetensors")

    def keep(self, num_newest: int, best: int | None) -> None:
        """Delete all but the newest and the best."""
        for step in self.steps()[:-num_newest]:
            if step != best:
                shutil.rmtree(self.path(step))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return contiguous(
        {
            f"{index}.{name}": torch.as_tensor(value)
            for index, slots in optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
    )


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    state = optimizer.state_dict()
    state["state"] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state["state"].setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(state)
