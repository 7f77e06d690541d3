"""Before the first step: engines that would not answer as the trained generator are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loop_runs import changed, co_training
from tiny_models import save_family

from rlrag.errors import ConfigError, GenerationError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.training.distributed.engines import check_engines
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.parts import open_trainable_generator


class Stale(TransformersGenerator):
    """Takes weights without a word and answers with those before."""

    def load_weights(self, weights) -> None:
        tensors = {name: p.clone() for name, p in self._model.named_parameters()}
        super().load_weights(weights)
        with torch.no_grad():
            for name, p in self._model.named_parameters():
                p.copy_(tensors[name])


class Half(TransformersGenerator):
    """Merges an adapter at half its scale."""

    def load_weights(self, weights) -> None:
        super().load_weights(
            type(weights)(
                weights.version,
                weights.digest,
                {name: t / 2 if "lora_B" in name else t for name, t in weights.tensors.items()},
                weights.adapter_scale,
            )
        )


@pytest.fixture
def case(small_config, few_data, tmp_path):
    """What checks a family's engines of a class, with the learner and the engines."""

    def check(
        family: str,
        method: str,
        engine=TransformersGenerator,
        cache: Path | None = None,
        table=few_data.train,
    ):
        directory = tmp_path / family
        if not directory.exists():
            save_family(directory, family)
        config = changed(
            co_training(small_config, directory),
            generator={"dtype": "float32", "device": "cpu"},
            generator_training={"method": method, "precision": "float32"},
        )
        engines = engine(directory, "float32", "cpu")
        asked = engines if cache is None else CachedGenerator(engines, cache)
        model = open_trainable_generator(config)
        first = model.trainable_tensors()
        prompts = PromptBuilder(config.generator.prompt, load_tokenizer(directory))
        state = torch.get_rng_state()
        try:
            check_engines(config, model, asked, table, prompts, SingleWorker())
        finally:
            assert torch.equal(torch.get_rng_state(), state)
            left = model.trainable_tensors()
            assert all(torch.equal(left[name], first[name]) for name in first)
        return engines

    return check


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "lora"), ("llama", "full"), ("gemma2", "lora")]
)
def test_right_engines_pass_and_stand_where_they_stood(case, family, method, tmp_path):
    checked = case(family, method)
    fresh = TransformersGenerator(tmp_path / family, "float32", "cpu")
    assert (checked.identity, checked.version) == (fresh.identity, 0)
    ours, theirs = checked._model.state_dict(), fresh._model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("method", "engine"), [("lora", Stale), ("full", Stale), ("lora", Half)])
def test_engines_that_answer_with_other_weights_are_refused(case, method, engine):
    with pytest.raises(ConfigError, match=r"check before training.* the engines give .*learner"):
        case("llama", method, engine)


def test_an_answer_longer_than_the_model_reads_is_no_hindrance(case, few_data):
    questions = tuple(
        replace(question, golden_answers=("a word " * 10_000,))
        for question in few_data.train.questions
    )
    case("llama", "lora", table=replace(few_data.train, questions=questions))


def test_what_an_earlier_run_kept_does_not_hide_an_engine(case, tmp_path):
    case("llama", "lora", cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match="check before training"):
        case("llama", "lora", Stale, tmp_path / "cache")


def test_names_that_do_not_fit_are_refused_before_the_first_step(case):
    with pytest.raises(GenerationError, match=r"check before training: .*renames .*method full"):
        case("gpt_neox", "lora")
