"""What a run trains: one update of everything, its checkpoint, and its published weights."""

from __future__ import annotations

from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from loop_runs import changed, co_training
from stand_ins import NUM_CANDIDATES, CutPrompts, WordPrompts, make_table
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.config import RunConfig
from rlrag.errors import CheckpointError, ConfigError
from rlrag.generation.weights import pack_weights
from rlrag.pipeline import TrainingData
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker, Workers
from rlrag.training.dro.batch import RewardedBatch, importance_weights
from rlrag.training.learners.generator_model import LORA_ALPHA
from rlrag.training.parts import TrainedParts, open_whole_generator
from rlrag.training.schedule import BatchSchedule

NUM_QUESTIONS, NUM_SAMPLES, NUM_SELECTED = 4, 3, 2
CLOCKS = {"generator/tokens_per_s"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def config(small_config, model_dir) -> RunConfig:
    config = co_training(small_config, model_dir, {"num_samples": NUM_SAMPLES}, batch_size=4)
    return changed(config, environment={"num_selected": NUM_SELECTED})


def open_parts(
    config: RunConfig, workers: Workers | None = None, prompts: WordPrompts | None = None
) -> TrainedParts:
    data = TrainingData(make_table(12), None, {})
    schedule = BatchSchedule(config.training, config.dro, 12, config.seed)
    prompts = prompts or WordPrompts()
    return TrainedParts(config, data, prompts, schedule, workers or SingleWorker())


def batch(step: int, places: slice = slice(None)) -> RewardedBatch:
    """Samples of four questions with random rewards; a share of them for one of two workers."""
    rng = np.random.default_rng(step)
    rows = rng.permutation(12)[:NUM_QUESTIONS]
    shape = (NUM_QUESTIONS, NUM_SAMPLES)
    orders = rng.permuted(np.tile(np.arange(NUM_CANDIDATES), (*shape, 1)), axis=2)
    rewards_BM = -5 * rng.random(shape)[places]
    behaviour_BM = np.full(shape, -np.log(20.0), dtype=np.float32)[places]
    return episodes.experience(
        make_table(12),
        rows[places],
        orders[places, :, :NUM_SELECTED],
        rewards_BM,
        behaviour_BM,
        version=step,
    )


def update(parts: TrainedParts, config: RunConfig, step: int, places: slice = slice(None)):
    experience = batch(step, places)
    return parts.update(experience, importance_weights(experience, config.dro), step)


def copied(parts: TrainedParts) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{name}": tensor.clone()
        for file, tensors in parts.tensors().items()
        for name, tensor in tensors.items()
    }


def test_an_update_moves_both_parts_and_describes_both(config):
    parts = open_parts(config)
    before = copied(parts)
    metrics = update(parts, config, 0)
    after = copied(parts)
    for file in ("policy", "generator"):
        names = [name for name in before if name.startswith(f"{file}/")]
        assert any(not torch.equal(before[name], after[name]) for name in names), file
    assert {"loss", "grad_norm", "kl_to_initial"} <= metrics.keys()
    assert metrics["generator/num_sequences"] == NUM_QUESTIONS * NUM_SAMPLES
    assert metrics["generator/loss"] > 0
    initial = parts.initial.state_dict()
    assert all(torch.equal(before[f"policy/{name}"], t) for name, t in initial.items())


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_two_workers_give_what_one_gives(config, limit):
    config = changed(
        config,
        algorithm={"entropy_weight": 0.01, "kl_weight": 0.01},
        generator_training={"sequences_per_question": limit, "micro_batch_tokens": 256},
    )
    alone = open_parts(config)
    expected = [update(alone, config, step) for step in range(3)]
    group = [open_parts(config, worker) for worker in make_group(2)]

    def work(rank: int) -> list[dict[str, float]]:
        return [update(group[rank], config, step, slice(rank, None, 2)) for step in range(3)]

    found = run_together([lambda: work(0), lambda: work(1)])
    for one, first, second in zip(expected, *found, strict=True):
        for key in one.keys() - CLOCKS - {"generator/grad_variance"}:
            assert first[key] == second[key]
            assert first[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key
    for name, tensor in copied(alone).items():
        assert torch.equal(copied(group[0])[name], copied(group[1])[name]), name
        assert torch.allclose(tensor, copied(group[0])[name], rtol=1e-3, atol=1e-5), name


def test_a_number_of_sequences_bounds_what_the_generator_reads(config):
    config = changed(config, generator_training={"sequences_per_question": 1})
    metrics = update(open_parts(config), config, 0)
    assert metrics["generator/num_sequences"] == NUM_QUESTIONS


def test_the_generators_adapter_is_drawn_from_the_runs_seed(config):
    one, same, other = (
        open_parts(config.model_copy(update={"seed": seed})).tensors()["generator"]
        for seed in (4, 4, 5)
    )
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_fine_tuning_leaves_out_of_prompts_is_that_of_all_workers(config):
    """One of two workers cuts as much of its prompts as it shows, the other shows them whole."""
    config = changed(config, algorithm={"name": "sft"})
    group = [
        open_parts(config, worker, prompts)
        for worker, prompts in zip(make_group(2), (CutPrompts(), WordPrompts()), strict=True)
    ]

    def work(rank: int) -> dict[str, float]:
        experience = batch(0, slice(rank, None, 2))
        even_BM = torch.full((2, NUM_SAMPLES), 1 / NUM_SAMPLES, dtype=torch.float64)
        return group[rank].update(experience, even_BM, 0)

    first, second = run_together([lambda: work(0), lambda: work(1)])
    assert first["prompt_cut_share"] == second["prompt_cut_share"]
    assert 0.25 < first["prompt_cut_share"] < 0.4  # a half of one worker's, none of the other's
    assert first["num_failed"] == second["num_failed"] == 0


def test_targets_for_all_golden_answers_need_their_likelihoods(config):
    """The batch comes from an environment that told none."""
    every = changed(config, reward={"golden_answers": "all"})
    with pytest.raises(ConfigError, match="has no golden_logps in its info"):
        update(open_parts(every), every, 0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_restored_run_goes_on_bit_by_bit(config, method):
    config = changed(config, generator_training={"method": method})
    parts = open_parts(config)
    for step in range(2):
        update(parts, config, step)
    kept = {
        file: {name: tensor.clone() for name, tensor in tensors.items()}
        for file, tensors in parts.tensors().items()
    }
    assert sorted(kept) == ["generator", "generator_optimizer", "optimizer", "policy"]
    restored = open_parts(config)
    update(restored, config, 7)  # what it did before counts for nothing
    restored.load(kept)
    for step in range(2, 4):
        expected, found = update(parts, config, step), update(restored, config, step)
        assert {k: expected[k] for k in expected.keys() - CLOCKS} == {
            k: found[k] for k in found.keys() - CLOCKS
        }
    for name, tensor in copied(parts).items():
        assert torch.equal(tensor, copied(restored)[name]), name


def test_parts_of_another_shape_are_refused(config):
    files = open_parts(config).tensors()
    stopping = open_parts(changed(config, selector={"may_stop": True}))
    with pytest.raises(CheckpointError, match=r"the policy of the checkpoint does not fit"):
        stopping.load(files)
    with pytest.raises(CheckpointError, match=r"the first policy does not fit"):
        stopping.load_initial(files)
    deeper = open_parts(changed(config, generator_training={"lora_rank": 3}))
    with pytest.raises(CheckpointError, match=r"generator tensors do not fit"):
        deeper.load(files)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_published_weights_are_numbered_and_in_the_format_of_the_engines(config, dtype):
    config = changed(config, generator={"dtype": dtype}, generator_training={"method": "full"})
    parts = open_parts(config)
    untrained = parts.generator_weights(3)
    assert untrained.version == 3
    assert {tensor.dtype for tensor in untrained.tensors.values()} == {getattr(torch, dtype)}
    assert untrained.digest == parts.generator_weights(4).digest
    update(parts, config, 0)
    trained = parts.generator_weights(4)
    assert trained.digest != untrained.digest
    merged = parts.generator.merged_tensors(getattr(torch, dtype))
    assert trained.digest == pack_weights(merged, 0).digest


def test_a_published_adapter_is_numbered_and_the_same_for_engines_of_every_format(config):
    first, second = (
        open_parts(changed(config, generator={"dtype": dtype})).generator_weights(version)
        for version, dtype in ((3, "float32"), (4, "bfloat16"))
    )
    assert (first.version, second.version) == (3, 4)
    assert first.digest == second.digest
    assert first.adapter_scale == LORA_ALPHA / 2
    parts = open_parts(config)
    update(parts, config, 0)
    assert parts.generator_weights(5).digest != first.digest


def test_a_whole_generator_takes_over_a_checkpoint(config):
    parts = open_parts(config)
    update(parts, config, 0)
    whole = open_whole_generator(changed(config, generator_training={"sharding": "fsdp2"}))
    whole.load_trainable(parts.tensors()["generator"])
    found = whole.published_weights(0, torch.float32)
    assert found.digest == parts.generator_weights(0).digest


@pytest.mark.parametrize(
    ("trained", "files"),
    [
        ("selector", ["optimizer", "policy"]),
        ("generator", ["generator", "generator_optimizer", "policy"]),
    ],
)
def test_a_part_that_is_not_trained_has_no_learner(config, trained, files):
    config = changed(config, algorithm={"parts": [trained]})
    parts = open_parts(config)
    metrics = update(parts, config, 0)
    assert sorted(parts.tensors()) == files
    assert (parts.generator_weights(1) is None) == (trained == "selector")
    assert ("loss" in metrics) == (trained == "selector")
    assert ("generator/loss" in metrics) == (trained == "generator")
    untrained = open_parts(config).policy.state_dict()
    moved = [
        name for name, t in parts.policy.state_dict().items() if not torch.equal(t, untrained[name])
    ]
    assert bool(moved) == (trained == "selector")


def test_a_language_model_starts_from_the_retrievers_order(config, model_dir):
    """The policy that KL is measured against starts there too."""
    config = changed(
        config,
        selector={
            "kind": "listwise_lm",
            "model": str(model_dir),
            "max_tokens": 8,
            "adapter_rank": None,
            "imitation_steps": 4,
        },
        algorithm={"parts": ["selector"]},
    )
    parts = open_parts(config)
    rows = make_table(12).batch(range(12))
    retriever = np.tile(np.arange(NUM_SELECTED), (12, 1, 1))

    def logp(policy) -> float:
        with torch.no_grad():
            return episodes.log_prob(policy, rows, retriever).mean().item()

    before = logp(parts.policy)
    parts.warm_start()
    assert logp(parts.policy) > before
    assert logp(parts.initial) == logp(parts.policy)


def test_what_is_imitated_depends_on_the_seed_and_on_how_sure_the_prior_is(config, model_dir):
    """The model starts alike; the questions of a step and the targets are drawn."""
    imitating = changed(
        config,
        selector={
            "kind": "listwise_lm",
            "model": str(model_dir),
            "max_tokens": 8,
            "adapter_rank": None,
            "imitation_steps": 1,
        },
        algorithm={"parts": ["selector"]},
    )
    one, same, seeded, sure = (
        imitating,
        imitating,
        imitating.model_copy(update={"seed": 1}),
        changed(imitating, selector={"prior_scale": 200.0}),
    )
    found = []
    for each in (one, same, seeded, sure):
        parts = open_parts(each)
        parts.warm_start()
        found.append(torch.cat([p.detach().flatten() for p in parts.policy.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_without_imitation_nothing_is_warmed(config):
    parts = open_parts(config)
    before = copied(parts)
    parts.warm_start()
    assert all(torch.equal(before[name], tensor) for name, tensor in copied(parts).items())


@pytest.mark.parametrize(("max_tokens", "is_told"), [(8, True), (64, False)])
def test_what_a_policy_does_not_read_of_passages_is_said(
    config, tmp_path, caplog, max_tokens, is_told
):
    encoder = save_tiny_encoder(tmp_path / "encoder")
    selector = {"kind": "bi_encoder", "model": str(encoder), "max_tokens": max_tokens}
    open_parts(changed(config, selector=selector))
    assert ("the selector reads 8 tokens of a passage" in caplog.text) == is_told
    assert ("raise selector.max_tokens" in caplog.text) == is_told
