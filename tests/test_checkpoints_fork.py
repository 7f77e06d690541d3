"""A new run starts from the weights of another one's checkpoint, and from nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_runs import StopAfter, changed, co_training, start, steps_of

from rlrag.cli.train import TrainArguments
from rlrag.cli.train import config_of as resolve
from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.recipes import RECIPES
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.runs.forking import check_start, starting_weights


def forked(config: RunConfig, checkpoint: Path, **sections) -> RunConfig:
    training = {"start_from": str(checkpoint)} | sections.pop("training", {})
    return changed(config, training=training, **sections)


@pytest.fixture
def source(small_config, training_data, tmp_path) -> Path:
    """A checkpoint of a run that was stopped."""
    with pytest.raises(StopAfter):
        start(small_config, training_data, tmp_path / "source", stop_at=5).run()
    return tmp_path / "source" / "checkpoints" / "step-000004"


def test_a_fork_has_the_weights_and_begins_anew(small_config, training_data, tmp_path, source):
    files, _ = CheckpointStore(source.parent).load(4)
    config = forked(small_config, source, training={"learning_rate": 0.01})
    check_start(config, RunDirectory(tmp_path / "fork"))
    loop = start(config, training_data, tmp_path / "fork", stop_at=3)
    with pytest.raises(StopAfter):
        loop.run()
    store = CheckpointStore(tmp_path / "fork" / "checkpoints")
    first, state = store.load(0)
    assert first["policy"].keys() == files["policy"].keys()
    assert all(torch.equal(first["policy"][name], t) for name, t in files["policy"].items())
    assert first["optimizer"] == {}
    assert (state["step"], state["best_step"]) == (0, 0)
    initial = loop.trainer.parts.initial.state_dict()
    assert all(torch.equal(initial[name], t) for name, t in files["policy"].items())
    records, before = steps_of(tmp_path / "fork"), steps_of(tmp_path / "source")
    assert records[1]["epoch"] == before[1]["epoch"]
    assert records[1]["learning_rate"] == pytest.approx(before[1]["learning_rate"] / 2)
    assert records[1]["kl_to_initial"] == pytest.approx(0, abs=1e-6)
    for path in source.iterdir():  # a run that has begun needs it no more
        path.unlink()
    check_start(config, RunDirectory(tmp_path / "fork"))
    start(config, training_data, tmp_path / "fork").run()


def test_a_trained_generator_is_forked_too_and_the_engine_answers_with_it(
    small_config, few_data, model_dir, tmp_path
):
    plan = {"batch_size": 4, "num_epochs": 1, "validate_every": 9, "checkpoint_every": 2}
    config = co_training(small_config, model_dir, **plan)
    engine = TransformersGenerator(model_dir, "float32", "cpu")
    start(config, few_data, tmp_path / "source", generator=engine).run()
    source = tmp_path / "source" / "checkpoints" / "step-000003"
    files = starting_weights(forked(config, source))
    assert set(files) == {"policy", "generator"}
    engine = TransformersGenerator(model_dir, "float32", "cpu")
    fork = start(forked(config, source), few_data, tmp_path / "fork", 0, engine)
    with pytest.raises(StopAfter):
        fork.run()
    found = fork.trainer.parts.tensors()["generator"]
    assert found.keys() == files["generator"].keys()
    assert all(torch.equal(found[name], t) for name, t in files["generator"].items())
    last, first = steps_of(tmp_path / "source")[-1], steps_of(tmp_path / "fork")[0]
    names = [name for name in last if name.startswith("validation/")]
    assert names
    assert [first[name] for name in names] == [last[name] for name in names]


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"selector": {"adapter_rank": 4}}, r"selector\.adapter_rank: 16 there, 4 here"),
        ({"environment": {"num_selected": 2}}, r"environment\.num_selected: 1 there, 2 here"),
        (
            {"algorithm": {"parts": ["generator"]}},
            "trained selector, and this run trains generator",
        ),
    ],
)
def test_a_checkpoint_of_other_parts_is_refused_before_anything_is_opened(
    small_config, tmp_path, source, sections, complaint
):
    with pytest.raises(ConfigError, match=complaint):
        check_start(forked(small_config, source, **sections), RunDirectory(tmp_path / "fork"))


OF_PART = {
    "selector": {"parts": ["selector"]},
    "generator": {"parts": ["generator"]},
    "retriever": {"name": "openrag"},
}


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("selector", "selector.adapter_rank", 8),
        ("generator", "generator.model", "another"),
        ("generator", "generator_training.lora_rank", 3),
        ("retriever", "retrieval.encoder", "another"),
        ("retriever", "algorithm.tied", False),
    ],
)
def test_what_gives_the_weights_their_meaning_must_be_the_same(
    small_config, tmp_path, part, name, value
):
    config = changed(small_config, retrieval={"kind": "dense"}, algorithm=OF_PART[part])
    source = RunDirectory(tmp_path / "source")
    source.claim(config)
    store = CheckpointStore(source.checkpoints)
    store.save(4, {}, {})
    fork, (section, field) = forked(config, store.path(4)), name.split(".")
    check_start(fork, RunDirectory(tmp_path / "fork"))
    other = getattr(fork, section).model_copy(update={field: value})
    with pytest.raises(ConfigError, match=rf"{name}: .* there, {value!r} here"):
        check_start(fork.model_copy(update={section: other}), RunDirectory(tmp_path / "fork"))


def test_a_checkpoint_without_the_weights_of_a_part_is_named(small_config, tmp_path, source):
    store = CheckpointStore(source.parent)
    files, state = store.load(4)
    store.save(4, {"optimizer": files["optimizer"]}, state)
    with pytest.raises(ConfigError, match=rf"{source} has no weights for the selector; give a"):
        starting_weights(forked(small_config, source))


def test_what_only_the_weights_tell_is_refused_as_well(
    small_config, training_data, tmp_path, source
):
    """A table with other features makes another selector of the same configuration."""
    store = CheckpointStore(source.parent)
    files, state = store.load(4)
    narrow = {name: tensor[..., :1] for name, tensor in files["policy"].items()}
    store.save(4, {**files, "policy": narrow}, state)
    with pytest.raises(ConfigError, match=r"start_from .* does not fit: the policy"):
        start(forked(small_config, source), training_data, tmp_path / "fork").run()


def test_what_is_no_checkpoint_is_named(small_config, training_data, tmp_path, source):
    run_dir = RunDirectory(tmp_path / "fork")
    for place in (source.parent, source.with_name("step-000099"), tmp_path / "none"):
        with pytest.raises(ConfigError, match=f"{place} is not a checkpoint; give"):
            check_start(forked(small_config, place), run_dir)
    (source / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"policy\.safetensors is missing, truncated"):
        starting_weights(forked(small_config, source))
    (source.parent.parent / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        check_start(forked(small_config, source), run_dir)


def test_two_places_to_start_from_are_one_too_many(small_config):
    with pytest.raises(ConfigError, match=r"selector\.weights 'w' names weights to start from too"):
        forked(small_config, Path("c"), selector={"weights": "w"})
    with pytest.raises(ConfigError, match=r"'feedback' starts from selector\.weights"):
        forked(small_config, Path("c"), algorithm={"name": "feedback", "log": "log.sqlite"})


def test_the_short_flag_is_the_field_with_a_path_that_holds_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES["factbook"]()
    arguments = TrainArguments(recipe, Path("run"), start_from="runs/a/checkpoints/step-000004")
    config = resolve(arguments)
    place = str(tmp_path / "runs" / "a" / "checkpoints" / "step-000004")
    assert config.training.start_from == place
    assert resolve(TrainArguments(config, Path("run"))) == config
    other = TrainArguments(config, Path("run"), start_from="b")
    with pytest.raises(ConfigError, match=r"--from is .*--training\.start-from"):
        resolve(other)
