"""Weights pushed into a vLLM engine: its scores equal those of a model that holds the same ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_models import save_family, save_vllm_llama

from rlrag.config import GeneratorConfig, GeneratorTrainingConfig, PromptConfig
from rlrag.errors import GenerationError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.build import open_generator
from rlrag.generation.pool.client import PoolClient
from rlrag.generation.protocol import Sampling
from rlrag.generation.weights import GeneratorWeights, pack_weights
from rlrag.records import Prompt
from rlrag.training.learners.generator_model import TrainableGenerator

TOLERANCE = 1e-3
NUM_PUSHES = 8
SHORT = PromptConfig(max_prompt_tokens=200)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    import ray

    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8
    )
    yield
    ray.shutdown()


def prompts(number: int) -> list[Prompt]:
    """Prompts of 40 to 60 tokens whose first 36, more than a cache block, are the same."""
    random = torch.Generator().manual_seed(5)
    shared = torch.randint(10, 500, (36,), generator=random).tolist()
    return [
        Prompt(tuple(shared + torch.randint(10, 500, (4 + i,), generator=random).tolist()), "", 1)
        for i in range(number)
    ]


def changed(model: torch.nn.Module, version: int) -> GeneratorWeights:
    """Weights that differ from one version to the next by much more than rounding."""
    random = torch.Generator().manual_seed(version)
    return pack_weights(
        {
            name: p.detach() + 0.05 * torch.randn(p.shape, generator=random)
            for name, p in model.named_parameters()
        },
        version,
    )


def check_adapter_push(directory: Path, pool: PoolClient, version: int) -> None:
    """Push a trained adapter; the engine's scores are the learner's, and those of a merged set."""
    asked, answers = prompts(6), [(7, 8, 9)] * 3 + [(11,)] * 3
    config = GeneratorTrainingConfig(precision="float32", lora_rank=4)
    learner = TrainableGenerator(directory, config, "cpu", seed=0)
    random = torch.Generator().manual_seed(0)
    ids = [prompt.token_ids for prompt in asked]
    with torch.no_grad():
        untrained = learner.answer_logp(ids, answers).tolist()
        for parameter in learner.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        trained = learner.answer_logp(ids, answers).tolist()
    assert trained != pytest.approx(untrained, abs=0.1)
    weights = learner.published_weights(version, torch.float32)
    assert weights.is_adapter
    pool.load_weights(weights)
    scores = pool.score(asked, answers)
    assert {score.version for score in scores} == {version}
    assert [score.logp for score in scores] == pytest.approx(trained, abs=TOLERANCE)
    pool.load_weights(pack_weights(learner.merged_tensors(torch.float32), version + 1))
    again = pool.score(asked, answers)
    assert [score.logp for score in again] == [score.logp for score in scores]


@pytest.mark.parametrize("tied", [True, False])
def test_pushes_under_load_leave_no_wrong_version_and_the_learners_scores(tmp_path, tied):
    directory = save_vllm_llama(tmp_path / "model", tied)
    config = GeneratorConfig(
        model=str(directory),
        dtype="float32",
        num_actors=1,
        max_model_len=256,
        batch_size=8,
        prompt=SHORT,
    )
    opened, _ = open_generator(config, "ray", tmp_path / "cache")
    pool = opened.inner
    assert isinstance(pool, PoolClient)
    learner = TransformersGenerator(directory, "float32", "cpu")
    model = learner._model
    asked, answers = prompts(6), [(7, 8, 9)] * 3 + [(11,)] * 3
    busy, stop = Sampling(max_new_tokens=2, stop=()), threading.Event()

    def load() -> list[int]:
        seen = []
        while not stop.is_set():
            before = pool.version
            versions = {g.version for g in pool.generate(asked, busy)}
            assert len(versions) == 1
            assert before <= min(versions) <= pool.version
            seen += versions
        return seen

    try:
        start = changed(model, 0).tensors
        with ThreadPoolExecutor(2) as threads:
            loads = [threads.submit(load) for _ in range(2)]
            try:
                for version in range(1, NUM_PUSHES + 1):
                    weights = changed(model, version)
                    learner.load_weights(weights)
                    pool.load_weights(weights)
                    ours, theirs = pool.score(asked, answers), learner.score(asked, answers)
                    assert {s.version for s in ours} == {version}
                    assert [s.logp for s in ours] == pytest.approx(
                        [s.logp for s in theirs], abs=TOLERANCE
                    )
            finally:
                stop.set()
        assert len(set(loads[0].result()) | set(loads[1].result())) > 1
        before = pool.score(asked, answers)
        misshapen = {**start, "model.norm.weight": torch.ones(3)}
        with pytest.raises(GenerationError, match=r"'model\.norm\.weight' is \(3,\), not \(64,\)"):
            pool.load_weights(GeneratorWeights(99, "bad", misshapen))
        assert pool.score(asked, answers) == before
        check_adapter_push(directory, pool, NUM_PUSHES + 1)
    finally:
        opened.close()


def test_an_engine_that_two_processes_hold_takes_the_same_weights(tmp_path):
    directory = save_vllm_llama(tmp_path / "model", tied=True)
    config = GeneratorConfig(
        model=str(directory),
        dtype="float32",
        num_actors=1,
        tensor_parallel=2,
        max_model_len=256,
        prompt=SHORT,
        batch_size=8,
    )
    opened, _ = open_generator(config, "ray", tmp_path / "cache")
    try:
        check_adapter_push(directory, opened.inner, 1)
    finally:
        opened.close()


@pytest.mark.parametrize("family", ["gemma2", "qwen2_moe"])
def test_a_family_takes_weights_or_is_refused_before_the_engine_is_touched(tmp_path, family):
    """vLLM's Gemma 2 has no output layer of its own; its experts are packed once alone."""
    directory = save_family(tmp_path / "model", family)
    config = GeneratorConfig(
        model=str(directory),
        dtype="float32",
        num_actors=1,
        max_model_len=256,
        batch_size=8,
        prompt=SHORT,
    )
    opened, _ = open_generator(config, "ray", tmp_path / "cache")
    try:
        if family == "gemma2":
            check_adapter_push(directory, opened.inner, 1)
            return
        asked, answers = prompts(2), [(7, 8, 9)] * 2
        before = opened.inner.score(asked, answers)
        training = GeneratorTrainingConfig(precision="float32", lora_rank=4)
        learner = TrainableGenerator(directory, training, "cpu", seed=0)
        with torch.no_grad():
            expected = learner.answer_logp([p.token_ids for p in asked], answers).tolist()
        assert [score.logp for score in before] == pytest.approx(expected, abs=TOLERANCE)
        with pytest.raises(
            GenerationError,
            match=r"packs the weights of a mixture of experts .*backend transformers",
        ):
            opened.inner.load_weights(learner.published_weights(1, torch.float32))
        assert opened.inner.score(asked, answers) == before
    finally:
        opened.close()
