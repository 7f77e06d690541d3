"""A checkpoint restores weights, optimiser and state bit by bit, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlrag.errors import CheckpointError
from rlrag.training.checkpoints import CheckpointStore

STATE = {"step": 3, "best_step": 2, "best_f1": 0.1 + 0.2, "generator_tokens": 2**40}


class Trained:
    """A small network that takes AdamW steps on a fixed task."""

    def __init__(self, seed: int = 0, hidden: int = 4) -> None:
        torch.manual_seed(seed)
        self.policy = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Linear(hidden, 1))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1, weight_decay=0.01)

    def steps(self, first: int, last: int) -> Trained:
        for step in range(first, last):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.policy(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean().backward()
            self.optimizer.step()
        return self


def moments(trained: Trained) -> list[torch.Tensor]:
    slots = trained.optimizer.state_dict()["state"]
    return [slots[index][name] for index in sorted(slots) for name in sorted(slots[index])]


def same(left: Trained, right: Trained) -> bool:
    pairs = [
        *zip(left.policy.state_dict().values(), right.policy.state_dict().values(), strict=True),
        *zip(moments(left), moments(right), strict=True),
    ]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def save(directory: Path, *steps: int) -> CheckpointStore:
    store, trained = CheckpointStore(directory), Trained().steps(0, 1)
    for step in steps:
        store.save(step, trained.policy, trained.optimizer, {"step": step})
    return store


def test_weights_moments_and_state_come_back_bit_by_bit(tmp_path):
    store, trained = CheckpointStore(tmp_path), Trained().steps(0, 3)
    store.save(3, trained.policy, trained.optimizer, STATE)
    restored = Trained(seed=1)
    assert store.load(3, restored.policy, restored.optimizer) == STATE
    assert len(moments(restored)) == 4 * 3  # two layers' weight and bias: two moments and a count
    assert same(trained, restored)


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    store, stopped = CheckpointStore(tmp_path), Trained().steps(0, 3)
    store.save(3, stopped.policy, stopped.optimizer, STATE)
    restored = Trained(seed=1)
    store.load(3, restored.policy, restored.optimizer)
    assert same(restored.steps(3, 9), Trained().steps(0, 9))


def test_an_optimiser_that_has_not_stepped_is_a_checkpoint_too(tmp_path):
    store, fresh, restored = CheckpointStore(tmp_path), Trained(), Trained(seed=1).steps(0, 2)
    store.save(0, fresh.policy, fresh.optimizer, {"step": 0})
    store.load(0, restored.policy, restored.optimizer)
    assert moments(restored) == []
    assert same(restored.steps(0, 2), Trained().steps(0, 2))


def test_nothing_is_pickled(tmp_path):
    files = {path.name for path in save(tmp_path, 1).path(1).iterdir()}
    assert files == {
        "policy.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(tmp_path, name, harm):
    store = save(tmp_path, 5)
    path = store.path(5) / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-4] if harm == "truncated" else whole[:-4] + b"abcd")
    fresh, untouched = Trained(seed=1), Trained(seed=1)
    with pytest.raises(CheckpointError, match=rf"{name} is missing, truncated.*delete .*000005"):
        store.load(5, fresh.policy, fresh.optimizer)
    with pytest.raises(CheckpointError, match=name):
        store.load_policy(5, fresh.policy)
    with pytest.raises(CheckpointError, match=name):
        store.read_state(5)
    assert same(fresh, untouched)


def test_a_checkpoint_of_another_selector_is_refused(tmp_path):
    store, other = save(tmp_path, 1), Trained(hidden=5)
    with pytest.raises(CheckpointError, match="does not fit the configured selector"):
        store.load(1, other.policy, other.optimizer)


def test_a_missing_checkpoint_is_named(tmp_path):
    fresh = Trained()
    with pytest.raises(CheckpointError, match=r"step-000007/manifest\.json is missing"):
        CheckpointStore(tmp_path).load_policy(7, fresh.policy)


def test_steps_are_listed_in_order_without_unfinished_ones(tmp_path):
    store = save(tmp_path / "checkpoints", 20, 3, 1_000_000)
    (tmp_path / "checkpoints" / ".step-000021-0a1b").mkdir()
    assert store.steps() == [3, 20, 1_000_000]
    assert CheckpointStore(tmp_path / "none").steps() == []


@pytest.mark.parametrize(
    ("num_newest", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (2, 5, [4, 5]), (9, 1, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(tmp_path, num_newest, best, left):
    store = save(tmp_path, 1, 2, 3, 4, 5)
    store.keep(num_newest, best)
    assert store.steps() == left


def test_saving_a_step_again_replaces_it(tmp_path):
    store, later = save(tmp_path, 1), Trained().steps(0, 2)
    store.save(1, later.policy, later.optimizer, {"step": 1, "again": True})
    restored = Trained(seed=1)
    assert store.load(1, restored.policy, restored.optimizer) == {"step": 1, "again": True}
    assert same(restored, later)
    assert store.steps() == [1]
