"""Selector and generator as adapters around one model, against two models with these adapters."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from loop_runs import changed, co_training, start, steps_of, weights
from stand_ins import NUM_CANDIDATES, WordPrompts, make_table
from tiny_models import save_tiny_llama, save_tiny_masked_lm

from rlrag.config import RunConfig
from rlrag.errors import ConfigError, GenerationError
from rlrag.files.directories import load_weights, save_weights
from rlrag.models.adapters import copy_around_frozen
from rlrag.pipeline import TrainingData, open_policy
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker, Workers
from rlrag.training.dro.batch import RewardedBatch, importance_weights
from rlrag.training.learners.generator_model import load_base
from rlrag.training.parts import TrainedParts, open_whole_generator
from rlrag.training.schedule import BatchSchedule

NUM_QUESTIONS = 6
TABLE = make_table(NUM_QUESTIONS)
ROWS = np.arange(4)
POSITIONS = np.array([[[0, 1], [3, 2]], [[4, 0], [1, 0]], [[2, 3], [2, 4]], [[1, 4], [0, 2]]])
PROMPTS = [tuple(range(10 + i, 13 + 3 * i)) for i in range(4)]
ANSWERS = [tuple(range(50 + 7 * i, 51 + 8 * i)) for i in range(4)]
CLOCKS = {"generator/tokens_per_s"}


@pytest.fixture
def config(small_config, model_dir) -> RunConfig:
    """Both parts by adapters of different rank on one tiny model, held twice."""
    config = co_training(small_config, model_dir, {"num_samples": 2}, batch_size=4)
    return changed(
        config,
        environment={"num_selected": 2},
        selector={
            "kind": "listwise_lm",
            "precision": "float32",
            "model": str(model_dir),
            "max_tokens": 12,
            "adapter_rank": 4,
        },
    )


def shared(config: RunConfig) -> RunConfig:
    return changed(config, generator_training={"share_base": True})


def open_parts(config: RunConfig, workers: Workers | None = None) -> TrainedParts:
    schedule = BatchSchedule(config.training, config.dro, NUM_QUESTIONS, config.seed)
    data = TrainingData(TABLE, None, {})
    return TrainedParts(config, data, WordPrompts(), schedule, workers or SingleWorker())


def selector_parameters(parts: TrainedParts) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in parts.policy.named_parameters() if p.requires_grad}


def trained(parts: TrainedParts) -> dict[str, torch.nn.Parameter]:
    """All that either part trains, by part and name."""
    assert parts.generator is not None
    return {
        **{f"selector/{n}": p for n, p in selector_parameters(parts).items()},
        **{f"generator/{n}": p for n, p in parts.generator.trainable_parameters().items()},
    }


def disturb(parts: TrainedParts) -> TrainedParts:
    """Move every trained weight, as training would; an untrained adapter changes nothing."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(parts).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return parts


def selector_logp(parts: TrainedParts) -> torch.Tensor:
    return episodes.log_prob(parts.policy, TABLE.batch(ROWS), POSITIONS)


def answer_logp(parts: TrainedParts) -> torch.Tensor:
    assert parts.generator is not None
    return parts.generator.answer_logp(PROMPTS, ANSWERS)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def num_held(*models: torch.nn.Module) -> int:
    """Numbers in the frozen tensors of these models, each tensor counted once."""
    sizes = {
        p.data_ptr(): p.numel()
        for model in models
        for p in model.parameters()
        if not p.requires_grad
    }
    return sum(sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_two_models(config, checkpointing):
    """Both graphs are built before either is walked, as no run does: they do not meet."""
    config = changed(config, generator_training={"gradient_checkpointing": checkpointing})
    apart, together = (disturb(open_parts(c)) for c in (config, shared(config)))
    found = []
    for parts in (apart, together):
        selections, answers = selector_logp(parts), answer_logp(parts)
        answers.sum().backward()
        selections.sum().backward()
        found.append((selections, answers))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    gradients = [{n: p.grad for n, p in trained(parts).items()} for parts in (apart, together)]
    assert_equal(*gradients)
    assert all(gradient.any() for gradient in gradients[1].values())


def test_gradients_reach_only_their_own_adapter(config):
    parts = disturb(open_parts(shared(config)))
    for part, logp in (("selector", selector_logp), ("generator", answer_logp)):
        logp(parts).sum().backward()
        reached = {name.split("/")[0] for name, p in trained(parts).items() if p.grad is not None}
        assert reached == {part}
        for parameter in trained(parts).values():
            parameter.grad = None


@pytest.mark.parametrize("part", ["selector", "generator"])
def test_a_step_of_one_leaves_the_other_as_it_was(config, part):
    parts = disturb(open_parts(shared(config)))
    logps = {"selector": selector_logp, "generator": answer_logp}
    before = {name: p.detach().clone() for name, p in trained(parts).items()}
    outputs = {name: logp(parts).detach() for name, logp in logps.items()}
    own = [p for name, p in trained(parts).items() if name.startswith(part)]
    logps[part](parts).sum().backward()
    torch.optim.SGD(own, lr=0.1).step()
    for name, parameter in trained(parts).items():
        assert torch.equal(parameter, before[name]) != name.startswith(part), name
    for name, logp in logps.items():
        assert torch.equal(logp(parts), outputs[name]) == (name != part), name


@pytest.mark.parametrize("tied", [False, True])
def test_one_copy_of_the_base_is_held(config, model_dir, tmp_path, tied):
    """By both parts, by the policy that KL is measured against, and by one that draws ahead."""
    from transformers import AutoConfig, LlamaForCausalLM

    if tied:
        model_dir = shutil.copytree(model_dir, tmp_path / "tied")
        settings = AutoConfig.from_pretrained(model_dir, tie_word_embeddings=True)
        LlamaForCausalLM(settings).save_pretrained(model_dir)
        names = {"model": str(model_dir)}
        config = changed(config, selector=names, generator=names)
    base = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(model_dir).parameters())
    for share, num_copies in ((True, 1), (False, 2)):
        parts = open_parts(shared(config) if share else config)
        assert parts.generator is not None
        drawing = copy.deepcopy(parts.policy)
        models = (parts.policy, parts.initial, drawing, parts.generator._model)
        assert num_held(*models) == num_copies * base
        adapters = [p for model in models for p in model.parameters() if p.requires_grad]
        assert len({p.data_ptr() for p in adapters}) == len(adapters)


def test_a_copy_is_trained_apart(config):
    policy = open_parts(shared(config)).policy
    other = copy.deepcopy(policy)
    before = episodes.log_prob(policy, TABLE.batch(ROWS), POSITIONS)
    assert torch.equal(episodes.log_prob(other, TABLE.batch(ROWS), POSITIONS), before)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(episodes.log_prob(policy, TABLE.batch(ROWS), POSITIONS), before)
    assert not torch.equal(episodes.log_prob(other, TABLE.batch(ROWS), POSITIONS), before)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(episodes.log_prob(other, TABLE.batch(ROWS), POSITIONS), before)


def test_what_is_not_frozen_is_copied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].weight = model[0].weight
    other = copy_around_frozen(model)
    assert other[0].weight is other[1].weight is model[0].weight
    assert other[0].bias is not model[0].bias
    other.append(torch.nn.ReLU())
    assert len(model) == 2


def experience(step: int, places: slice = slice(None)) -> RewardedBatch:
    """Two selections of each of four questions with random rewards, or a worker's share of them."""
    rng = np.random.default_rng(step)
    orders = rng.permuted(np.tile(np.arange(NUM_CANDIDATES), (4, 2, 1)), axis=2)
    rewards_BM = -5 * rng.random((4, 2))[places]
    return episodes.experience(
        make_table(NUM_QUESTIONS),
        rng.permutation(NUM_QUESTIONS)[:4][places],
        orders[places, :, :2],
        rewards_BM,
        np.full((4, 2), -np.log(20.0))[places],
        version=step,
    )


def update(parts: TrainedParts, config: RunConfig, places: slice = slice(None)) -> dict[str, float]:
    metrics = {}
    for step in range(2):
        drawn = experience(step, places)
        metrics = parts.update(drawn, importance_weights(drawn, config.dro), step)
    return {name: value for name, value in metrics.items() if name not in CLOCKS}


def test_updates_by_two_workers_are_those_of_two_models(config):
    """Each worker has a base of its own; gradients are summed part by part."""
    config = changed(config, algorithm={"kl_weight": 0.01})
    apart = open_parts(config)
    expected = update(apart, config)
    group = [open_parts(shared(config), worker) for worker in make_group(2)]
    first, second = run_together(
        [
            lambda: update(group[0], config, slice(0, None, 2)),
            lambda: update(group[1], config, slice(1, None, 2)),
        ]
    )
    assert first == second
    assert {name: first[name] for name in ("loss", "grad_norm", "generator/loss")} == pytest.approx(
        {name: expected[name] for name in ("loss", "grad_norm", "generator/loss")}, rel=1e-4
    )
    for name, parameter in trained(apart).items():
        assert torch.equal(trained(group[0])[name], trained(group[1])[name]), name
        assert torch.allclose(trained(group[0])[name], parameter, atol=1e-4), name


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_is_that_of_two_models(config, few_data, tmp_path, overlap):
    """With overlap one thread draws with a copy of the policy while the other trains both parts."""
    config = changed(
        config,
        algorithm={"baseline": "none", "overlap": overlap},
        training={"num_epochs": 1, "validate_every": 9, "checkpoint_every": 9},
    )
    found = []
    for name, c in (("apart", config), ("together", shared(config))):
        loop = start(c, few_data, tmp_path / name)
        loop.run()
        found.append((weights(loop), steps_of(tmp_path / name)))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_what_is_written_with_one_base_loads_with_two_and_back(config, tmp_path):
    updated = open_parts(shared(config))
    update(updated, config)
    files = updated.tensors()
    for other_config in (config, shared(config)):
        other = open_parts(other_config)
        assert {f: set(ts) for f, ts in other.tensors().items() if "optim" not in f} == {
            f: set(ts) for f, ts in files.items() if "optim" not in f
        }
        other.load(files)
        assert torch.equal(selector_logp(other), selector_logp(updated))
        assert torch.equal(answer_logp(other), answer_logp(updated))
        assert_equal(other.tensors()["optimizer"], files["optimizer"])
        assert_equal(other.tensors()["generator_optimizer"], files["generator_optimizer"])
    save_weights(updated.policy, tmp_path / "selector.safetensors")
    policy = open_policy(config, TABLE)
    load_weights(policy, tmp_path / "selector.safetensors")
    assert torch.equal(
        episodes.log_prob(policy, TABLE.batch(ROWS), POSITIONS), selector_logp(updated)
    )


def test_published_and_bundled_weights_hold_the_generators_adapter_alone(config):
    together = disturb(open_parts(shared(config)))
    whole = open_whole_generator(config)
    assert together.generator is not None
    whole.load_trainable(together.generator.trainable_tensors())
    assert_equal(
        together.generator.merged_tensors(torch.float32), whole.merged_tensors(torch.float32)
    )


def test_an_encoder_is_no_base(config, tmp_path):
    names = {"model": str(save_tiny_masked_lm(tmp_path / "bert"))}
    with pytest.raises(ConfigError, match=r"not a causal language model; name another generator"):
        open_parts(shared(changed(config, selector=names, generator=names)))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"algorithm": {"parts": ["generator"]}}, "trains ['generator']"),
        ({"algorithm": {"parts": ["selector"]}}, "trains ['selector']"),
        (
            {
                "retrieval": {"kind": "dense"},
                "algorithm": {
                    "name": "alternating",
                    "selection": {"parts": ["selector", "generator"]},
                },
            },
            "'alternating' trains ['retriever', 'selector', 'generator']",
        ),
        ({"selector": {"kind": "features"}}, "selector.kind is 'features'"),
        ({"selector": {"adapter_rank": None}}, "selector.adapter_rank None; use listwise_lm"),
        ({"generator_training": {"method": "full"}}, "generator_training.method is 'full'"),
        ({"generator_training": {"sharding": "fsdp2"}}, "sharding 'fsdp2'; use lora and"),
        ({"selector": {"model": "other"}}, "needs one model, but selector.model is 'other' and"),
    ],
)
def test_contradictions_are_refused(config, sections, words):
    changed(config, **sections)  # fits as long as nothing is shared
    with pytest.raises(ConfigError) as caught:
        changed(shared(config), **sections)
    assert "generator_training.share_base needs" in str(caught.value)
    assert words in str(caught.value)


def test_the_policy_alone_takes_a_base_too(model_dir: Path):
    """The adapter that a seed draws does not depend on who loaded the model."""
    found = []
    for base in (None, load_base(model_dir)):
        torch.manual_seed(3)
        found.append(ListwiseLMPolicy(model_dir, 2, 12, 4, base=base).state_dict())
    assert_equal(*found)


def test_a_model_that_cannot_be_loaded_is_refused(config, tmp_path):
    directory = save_tiny_llama(tmp_path / "broken")
    (directory / "model.safetensors").unlink()
    names = {"model": str(directory)}
    with pytest.raises(GenerationError, match="transformers cannot load the model in"):
        open_parts(shared(changed(config, selector=names, generator=names)))
