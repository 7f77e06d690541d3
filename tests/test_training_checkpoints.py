"""A checkpoint restores weights, optimiser and state bit by bit, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlrag.errors import CheckpointError
from rlrag.files.directories import restore_weights
from rlrag.runs.checkpoints import CheckpointStore, kept_steps
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.learners.optimiser import Optimiser

STATE = {"step": 3, "best_step": 2, "best_f1": 0.1 + 0.2, "generator_tokens": 2**40}


class Trained:
    """A small network that takes AdamW steps on a fixed task."""

    def __init__(self, seed: int = 0, hidden: int = 4) -> None:
        torch.manual_seed(seed)
        self.policy = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Linear(hidden, 1))
        self.optimiser = Optimiser(
            dict(self.policy.named_parameters()),
            learning_rate=0.1,
            warmup_steps=0,
            num_steps=10**6,
            workers=SingleWorker(),
            advice="lower it",
        )

    def steps(self, first: int, last: int) -> Trained:
        for step in range(first, last):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            self.optimiser.zero_grad()
            (self.policy(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean().backward()
            self.optimiser.step(step)
        return self

    def files(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimiser.tensors(),
        }

    def restore(self, store: CheckpointStore, step: int) -> dict[str, Any]:
        files, state = store.load(step)
        restore_weights(self.policy, files["policy"], "the policy of the checkpoint")
        self.optimiser.load(files["optimizer"])
        return state


def moments(trained: Trained) -> list[torch.Tensor]:
    tensors = trained.optimiser.tensors()
    return [tensors[name] for name in sorted(tensors)]


def same(left: Trained, right: Trained) -> bool:
    pairs = [
        *zip(left.policy.state_dict().values(), right.policy.state_dict().values(), strict=True),
        *zip(moments(left), moments(right), strict=True),
    ]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def save(directory: Path, *steps: int) -> CheckpointStore:
    store, trained = CheckpointStore(directory), Trained().steps(0, 1)
    for step in steps:
        store.save(step, trained.files(), {"step": step})
    return store


def test_weights_moments_and_state_come_back_bit_by_bit(tmp_path):
    store, trained = CheckpointStore(tmp_path), Trained().steps(0, 3)
    store.save(3, trained.files(), STATE)
    restored = Trained(seed=1)
    assert restored.restore(store, 3) == STATE
    assert len(moments(restored)) == 4 * 3  # two layers' weight and bias: two moments and a count
    assert same(trained, restored)


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    store, stopped = CheckpointStore(tmp_path), Trained().steps(0, 3)
    store.save(3, stopped.files(), STATE)
    restored = Trained(seed=1)
    restored.restore(store, 3)
    assert same(restored.steps(3, 9), Trained().steps(0, 9))


def test_an_optimiser_that_has_not_stepped_is_a_checkpoint_too(tmp_path):
    store, fresh, restored = CheckpointStore(tmp_path), Trained(), Trained(seed=1).steps(0, 2)
    store.save(0, fresh.files(), {"step": 0})
    restored.restore(store, 0)
    assert moments(restored) == []
    assert same(restored.steps(0, 2), Trained().steps(0, 2))


def test_every_file_comes_back_under_its_name(tmp_path):
    """What a run keeps depends on what it trains; nothing of it depends on its memory layout."""
    square = torch.arange(6.0).reshape(2, 3)
    files = {
        "policy": {"a.weight": square, "a.bias": square[:, 1]},
        "generator": {"layer.lora_A.default.weight": square.T.to(torch.bfloat16)},
        "generator_optimizer": {},
    }
    store = CheckpointStore(tmp_path)
    store.save(4, files, {"step": 4})
    found, state = store.load(4)
    assert state == {"step": 4}
    assert found.keys() == files.keys()
    for file, tensors in files.items():
        assert found[file].keys() == tensors.keys()
        assert all(torch.equal(found[file][name], tensor) for name, tensor in tensors.items())


def test_an_optimisers_tensors_are_copies(tmp_path):
    trained = Trained().steps(0, 2)
    kept = trained.files()["optimizer"]
    before = {name: tensor.clone() for name, tensor in kept.items()}
    trained.steps(2, 4)
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    assert {name.split(":")[1] for name in kept} == {"exp_avg", "exp_avg_sq", "step"}


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
def test_a_damaged_file_is_named(tmp_path, name, harm):
    store = save(tmp_path, 5)
    path = store.path(5) / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-4] if harm == "truncated" else whole[:-4] + b"abcd")
    with pytest.raises(CheckpointError, match=rf"{name} is missing, truncated.*delete .*000005"):
        store.load(5)


def test_a_checkpoint_of_another_selector_is_refused(tmp_path):
    store, other = save(tmp_path, 1), Trained(hidden=5)
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        other.restore(store, 1)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-000007/manifest\.json is missing"):
        CheckpointStore(tmp_path).load(7)


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


def test_the_first_is_kept_as_others_are_measured_against_it(tmp_path):
    store = save(tmp_path, 0, 1, 2, 3)
    store.keep(1, best=2)
    assert store.steps() == [0, 2, 3]


def test_saving_a_step_again_replaces_it(tmp_path):
    store, later = save(tmp_path, 1), Trained().steps(0, 2)
    store.save(1, later.files(), {"step": 1, "again": True})
    restored = Trained(seed=1)
    assert restored.restore(store, 1) == {"step": 1, "again": True}
    assert same(restored, later)
    assert store.steps() == [1]


def test_the_next_save_deletes_what_killed_saves_of_any_step_left(tmp_path):
    store = save(tmp_path, 1)
    half = [f".step-000002-{'0a' * 16}", f".step-1000000-{'1b' * 16}"]
    others = [f".bundle-{'0a' * 16}", ".step-000004.replaced"]
    for name in [*half, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.safetensors").write_bytes(b"half")
    trained = Trained()
    store.save(3, trained.files(), {"step": 3})
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000003", *others}


def test_a_checkpoint_that_was_being_replaced_when_its_writer_was_killed_is_read(tmp_path):
    store = save(tmp_path, 1, 2)
    store.path(2).rename(tmp_path / ".step-000002.replaced")
    assert store.steps() == [1, 2]
    restored = Trained(seed=1)
    assert restored.restore(store, 2) == {"step": 2}
    assert same(restored, Trained().steps(0, 1))
    store.keep(1, best=1)
    assert store.steps() == [1, 2]
    store.keep(1, best=None)
    assert store.steps() == [2]
    save(tmp_path, 3).keep(1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


@pytest.mark.parametrize(
    ("num_newest", "bests", "every", "left"),
    [
        (1, [None], None, {0, 40}),
        (2, [10], None, {0, 10, 35, 40}),
        (1, [None], 20, {0, 20, 40}),
        (1, [None], 15, {0, 20, 35, 40}),  # the first of 0 to 14, 15 to 29 and 30 to 44
        (1, [None], 1, {0, 5, 10, 20, 35, 40}),
        (1, [7], None, {0, 40}),  # there is none of step 7
    ],
)
def test_what_is_kept_is_the_first_the_last_the_best_and_one_of_each_stretch(
    num_newest, bests, every, left
):
    steps = [0, 5, 10, 20, 35, 40]
    assert kept_steps(steps, num_newest, bests, every) == left


@pytest.mark.parametrize("every", [1, 7, 10, 100])
def test_deleting_after_each_save_keeps_the_same_of_each_stretch_as_once_at_the_end(every):
    steps, left = list(range(0, 100, 3)), set()
    for step in steps:
        left = kept_steps(left | {step}, 2, [None], every)
    assert left == kept_steps(steps, 2, [None], every)


def test_what_a_kept_one_counts_as_its_best_stays_with_it(tmp_path):
    """Otherwise a run could not fall back to the one before the newest, if that is a new best."""
    store, trained = CheckpointStore(tmp_path), Trained()
    for step, best in ((0, 0), (2, 2), (4, 2), (6, 6)):
        store.save(step, trained.files(), {"step": step, "best_step": best})
        store.keep(2, best)
    assert store.steps() == [0, 2, 4, 6]
    store.save(8, trained.files(), {"step": 8, "best_step": 6})
    store.keep(2, 6)
    assert store.steps() == [0, 6, 8]
