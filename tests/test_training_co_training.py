"""Selector and generator in one run: who answers with which weights, and who is never asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loop_runs import changed, co_training, policy_weights, start, steps_of, weights
from stand_ins import CutPrompts, ReadingGenerator

from rlrag.config import RunConfig
from rlrag.errors import GenerationError, PromptTooLongError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.weights import GeneratorWeights
from rlrag.runs.checkpoints import CheckpointStore
from rlrag.runs.directory import RunDirectory
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.parts import open_whole_generator

SIX_STEPS = {"batch_size": 4, "num_epochs": 2, "validate_every": 2, "checkpoint_every": 2}


class Recording(ReadingGenerator):
    """Notes the sets that it was given and the version behind each call."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, str]] = []
        self.asked: list[tuple[str, int]] = []

    def load_weights(self, weights: GeneratorWeights) -> None:
        super().load_weights(weights)
        self.given.append((weights.version, weights.digest))

    def generate(self, prompts, sampling):
        self.asked.append(("validate", self.version))
        return super().generate(prompts, sampling)

    def score(self, prompts, answers):
        self.asked.append(("reward", self.version))
        return super().score(prompts, answers)


def published(config: RunConfig, directory: Path, step: int) -> str:
    """Digest of the generator of a checkpoint as engines get it."""
    trained = open_whole_generator(config)
    trained.load_trainable(CheckpointStore(directory / "checkpoints").load(step)[0]["generator"])
    return trained.published_weights(0, torch.float32).digest


def test_every_step_is_rewarded_and_validated_by_the_weights_before_it(
    small_config, few_data, model_dir, tmp_path
):
    config = co_training(small_config, model_dir, **SIX_STEPS | {"keep_checkpoints": 9})
    generator = Recording()
    start(config, few_data, tmp_path / "run", generator=generator).run()
    assert [version for version, _ in generator.given] == [1, 2, 3, 4, 5, 6]
    assert generator.asked == [
        ("validate", 0),
        *(("reward", 0), ("reward", 1), ("validate", 2)),
        *(("reward", 2), ("reward", 3), ("validate", 4)),
        *(("reward", 4), ("reward", 5), ("validate", 6)),
    ]
    digests = dict(generator.given)
    for step in (2, 4, 6):
        assert digests[step] == published(config, tmp_path / "run", step), step


def test_weights_go_out_once_an_estep(small_config, few_data, model_dir, tmp_path):
    """E-steps of two batches and two passes: six batches make three of them."""
    dro = {"refresh_every": 2, "passes": 2, "baseline": "none"}
    config = co_training(small_config, model_dir, dro, **SIX_STEPS)
    generator = Recording()
    start(config, few_data, tmp_path / "run", generator=generator).run()
    assert [version for version, _ in generator.given] == [1, 2, 3]
    assert generator.asked == [
        ("validate", 0),
        *[("reward", 0)] * 4,
        ("validate", 1),
        *[("reward", 1)] * 4,
        ("validate", 2),
        *[("reward", 2)] * 4,
        ("validate", 3),
    ]


def test_a_generator_that_is_not_trained_gets_no_weights(small_config, few_data, tmp_path):
    generator = Recording()
    start(small_config, few_data, tmp_path / "run", generator=generator).run()
    assert generator.given == []
    assert {version for _, version in generator.asked} == {0}


class Unrewarding(Recording):
    """Answers, but scores nothing."""

    def score(self, prompts, answers):
        raise GenerationError("nobody may ask for a reward; this run has none")


def test_sft_trains_the_generator_on_the_retrievers_order_without_rewards(
    small_config, few_data, model_dir, tmp_path
):
    config = co_training(small_config, model_dir, **SIX_STEPS)
    config = changed(config, algorithm={"name": "sft"})
    generator = Unrewarding()
    loop = start(config, few_data, tmp_path / "run", generator=generator)
    untrained = policy_weights(loop)
    loop.run()
    records = steps_of(tmp_path / "run")
    assert [version for version, _ in generator.given] == [2, 4, 6]  # for validations alone
    assert [line["generator/num_sequences"] for line in records[1:]] == [4.0] * 6
    assert records[-1]["generator/mean_answer_logp"] > records[1]["generator/mean_answer_logp"]
    assert records[-1]["generator_tokens_total"] == 0.0
    assert not {"reward", "ess", "loss", "staleness"} & set().union(*records)
    assert all(
        torch.equal(untrained[name], tensor) for name, tensor in policy_weights(loop).items()
    )
    assert all(line["validation/changed_share"] == 0.0 for line in records[::2])


class Narrow(CutPrompts):
    """Has no room for one question, and for none of the last passage of the others."""

    def build(self, question, passages):
        if question.id == "q1":
            raise PromptTooLongError("question 'q1' is too long; raise max_prompt_tokens")
        return super().build(question, passages[:-1])


def test_sft_counts_what_prompts_leave_out(small_config, few_data, model_dir, tmp_path):
    """No reward is computed that would count it."""
    config = co_training(small_config, model_dir, **SIX_STEPS)
    config = changed(
        config,
        training={"max_failed_share": 0.5},
        algorithm={"name": "sft"},
    )
    start(config, few_data, tmp_path / "run", prompts=Narrow()).run()
    records = steps_of(tmp_path / "run")[1:]
    assert {record["prompt_cut_share"] for record in records} == {0.5}
    share = 1 / config.environment.num_selected
    assert [r["dropped_passage_share"] for r in records] == pytest.approx([share] * len(records))
    failed = [record["num_failed"] for record in records]
    assert sum(failed) == 2  # two passes over the questions
    named = [record.get("failures") for record in records]
    assert named == [
        ["question 'q1' is too long; raise max_prompt_tokens"] * int(n) or None for n in failed
    ]
    raised = {name for record in records for name in record.get("alarms", {})}
    assert raised == {"failures", "cut_prompts"}
    strict = changed(config, training={"max_failed_share": 0.1})
    with pytest.raises(GenerationError, match=r"1 of 4 prompts .*max_failed_share 0\.1 .*'q1'"):
        start(strict, few_data, tmp_path / "strict", prompts=Narrow()).run()


def test_the_generator_alone_leaves_the_selector_as_it_was(
    small_config, few_data, model_dir, tmp_path
):
    config = co_training(small_config, model_dir, **SIX_STEPS)
    config = changed(config, algorithm={"parts": ["generator"]})
    loop = start(config, few_data, tmp_path / "run")
    untrained = policy_weights(loop)
    loop.run()
    assert all(
        torch.equal(untrained[name], tensor) for name, tensor in policy_weights(loop).items()
    )
    last = steps_of(tmp_path / "run")[-1]
    assert {"reward", "ess", "generator/loss"} <= last.keys()
    assert "loss" not in last
    files = CheckpointStore(tmp_path / "run" / "checkpoints").load(6)[0]
    assert sorted(files) == ["generator", "generator_optimizer", "policy"]


def test_training_raises_the_likelihood_of_the_answers_that_are_asked_for(
    small_config, few_data, model_dir, tmp_path
):
    """The reward is the likelihood, by engines that hold what was trained."""
    config = co_training(small_config, model_dir, **SIX_STEPS)
    start(
        config, few_data, tmp_path / "run", generator=TransformersGenerator(model_dir, "float32")
    ).run()
    rewards = [line["reward"] for line in steps_of(tmp_path / "run")[1:]]
    assert rewards[-1] > rewards[0] + 1.0


@pytest.mark.parametrize("overlap", [False, True])
def test_two_workers_do_what_one_does(small_config, few_data, model_dir, tmp_path, overlap):
    """Workers are threads; the engine belongs to both, and one of them gives it its weights."""
    config = co_training(
        small_config, model_dir, {"baseline": "none", "overlap": overlap}, **SIX_STEPS
    )
    config = changed(config, generator_training={"sequences_per_question": 2})
    alone = start(config, few_data, tmp_path / "alone")
    alone.run()
    shared = Recording()
    RunDirectory(tmp_path / "two").claim(config)
    loops = [start(config, few_data, tmp_path / "two", None, shared, w) for w in make_group(2)]
    run_together([loop.run for loop in loops])
    assert [version for version, _ in shared.given] == [1, 2, 3, 4, 5, 6]
    expected, first, second = weights(alone), weights(loops[0]), weights(loops[1])
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(tensor, first[name], rtol=1e-3, atol=1e-4), name
    one, two = steps_of(tmp_path / "alone"), steps_of(tmp_path / "two")
    differing = {"generator/grad_variance", "generator_tokens_spent", "generator_tokens_total"}
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - differing:
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-4), key
