"""The vLLM back end: its guards without an engine, and its agreement with transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from rlrag.config import BUILTIN_CORPUS, FewShotExample, GeneratorConfig, PromptConfig, RunConfig
from rlrag.errors import GenerationError, SetupError
from rlrag.generation.backends.vllm import (
    answer_logp,
    check_compiler,
    parts_within,
    vllm_environment,
)
from rlrag.generation.build import open_generator, resolve_config
from rlrag.generation.protocol import Sampling
from rlrag.records import Prompt

TOLERANCE_PER_TOKEN = 1e-2
BLOCK = 32


@dataclass
class Entry:
    logprob: float


def test_a_logp_sums_the_entries_of_the_answer():
    entries = [None, {4: Entry(-1.0)}, {5: Entry(-0.5)}, {6: Entry(-0.25), 1: Entry(-9.0)}]
    assert answer_logp(entries, num_cached=0, start=2, answer=(5, 6)) == -0.75
    assert answer_logp(entries, num_cached=1, start=2, answer=(5, 6)) == -0.75


@pytest.mark.parametrize("num_cached", [2, 3])
def test_entries_that_the_prefix_cache_left_unwritten_are_not_trusted(num_cached):
    entries = [None, {4: Entry(-1.0)}, {5: Entry(-0.5)}, {6: Entry(-0.25)}]
    assert answer_logp(entries, num_cached=num_cached, start=2, answer=(5, 6)) is None


@pytest.mark.parametrize("entry", [None, {}, {9: Entry(-1.0)}, {5: Entry(float("nan"))}])
def test_entries_that_make_no_sense_are_not_trusted(entry):
    assert answer_logp([None, {4: Entry(-1.0)}, entry], 0, 2, (5,)) is None
    assert answer_logp([None, None, {5: Entry(3.0)}], 0, 2, (5,)) is None


def test_a_missing_compiler_is_found_before_an_engine_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SetupError, match=r"install g\+\+"):
        check_compiler()
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    check_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match="no-such-compiler"):
        check_compiler()


def test_the_environment_comes_from_the_config():
    environment = vllm_environment(GeneratorConfig(kv_cache_gib=3))
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_auto_is_decided_by_the_launcher():
    ray_config = resolve_config(GeneratorConfig(), "ray")
    assert (ray_config.backend, ray_config.device) == ("vllm", "cpu")
    assert ray_config.dtype in ("float32", "bfloat16")
    assert (
        resolve_config(GeneratorConfig(gpus_per_actor=1, dtype="float32"), "ray").device == "cuda"
    )
    assert resolve_config(GeneratorConfig(), "local").backend == "transformers"
    with pytest.raises(ValueError, match="gpus_per_actor"):
        resolve_config(GeneratorConfig(device="cuda"), "ray")
    with pytest.raises(ValueError, match="tensor_parallel 2 needs"):
        resolve_config(GeneratorConfig(tensor_parallel=2), "local")
    with pytest.raises(ValueError, match="gpus_per_actor to 2"):
        resolve_config(GeneratorConfig(tensor_parallel=2, gpus_per_actor=1), "ray")
    with pytest.raises(ValueError, match="'slurm' is unknown"):
        resolve_config(GeneratorConfig(), "slurm")


@dataclass
class BothBackends:
    vllm: object
    transformers: object
    prompts: list[Prompt]
    answers: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def both() -> BothBackends:
    """One vLLM actor and transformers in this process, and 100 real questions with passages."""
    import ray

    from rlrag.data.load import load_corpus, load_questions

    run = RunConfig()
    corpus = load_corpus(BUILTIN_CORPUS, run.cache_path, 60)
    questions = load_questions(f"{BUILTIN_CORPUS}:test", run.cache_path, corpus).questions[:100]
    example = FewShotExample(title="Sky", text="It is blue.", question="colour?", answer="blue")
    config = GeneratorConfig(
        dtype="float32", num_actors=1, prompt=PromptConfig(few_shot=(example,))
    )
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8
    )
    opened, builder = open_generator(config, "ray", run.cache_path)
    local, _ = open_generator(config, "local", run.cache_path)
    prompts, answers = [], []
    for number, question in enumerate(questions):
        row = corpus.row_of(question.gold_ids[0])
        shown = [corpus[row], corpus[number]][: 1 + number % 2]
        prompts.append(builder.build(question, shown))
        answers.append(builder.encode_answer(question.golden_answers[0]))
    yield BothBackends(opened.inner, local.inner, prompts, answers)
    opened.close()
    ray.shutdown()


def assert_agree(both: BothBackends, prompts, answers) -> None:
    ours = both.vllm.score(prompts, answers)
    theirs = both.transformers.score(prompts, answers)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.num_tokens == other.num_tokens
        assert mine.mean_logp == pytest.approx(other.mean_logp, abs=TOLERANCE_PER_TOKEN)


@pytest.mark.vllm
@pytest.mark.slow
def test_scores_agree_with_transformers_on_100_prompts(both):
    assert len(both.prompts) == 100
    assert_agree(both, both.prompts, both.answers)
    # Once more, with every prompt in the prefix cache.
    assert_agree(both, both.prompts[:20], both.answers[:20])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_scores_agree_where_the_prompt_ends_at_a_block_of_the_prefix_cache(both, over):
    sources = [p for p in both.prompts if len(p.token_ids) > 4 * BLOCK][:3]
    prompts = [Prompt(p.token_ids[: 4 * BLOCK + over], p.text, 1) for p in sources]
    both.vllm.generate(prompts, Sampling())
    for _ in range(2):
        assert_agree(both, prompts, both.answers[:3])
        assert_agree(both, prompts[:1] * 3, both.answers[3:6])


def test_what_is_scored_at_once_fits_into_the_cache():
    places, lengths = [1, 2, 4, 5, 6], [100, 5, 5, 100, 1, 12, 9]
    assert parts_within(places, lengths, capacity=11) == [[1, 2, 4], [5], [6]]
    assert parts_within(places, lengths, capacity=10) == [[1, 2], [4], [5], [6]]
    assert parts_within([], lengths, capacity=10) == []


@pytest.mark.vllm
@pytest.mark.slow
def test_greedy_answers_agree_with_transformers_and_repeat(both):
    prompts = both.prompts[:16]
    ours, again = (both.vllm.generate(prompts, Sampling()) for _ in range(2))
    theirs = both.transformers.generate(prompts, Sampling())
    assert [g.text for g in ours] == [g.text for g in again]
    same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.text == b.text]
    assert len(same) >= 15  # rounding may decide a near tie otherwise
    for mine, other in same:
        assert mine.num_tokens == other.num_tokens
        assert mine.logp == pytest.approx(other.logp, abs=TOLERANCE_PER_TOKEN * other.num_tokens)


@pytest.mark.vllm
@pytest.mark.slow
def test_seeded_sampling_repeats_whatever_is_in_the_batch(both):
    hot = Sampling(temperature=1.0, seed=3)
    together = both.vllm.generate(both.prompts[:6], hot)
    alone = both.vllm.generate(both.prompts[2:3], hot)
    other = both.vllm.generate(both.prompts[:6], Sampling(temperature=1.0, seed=4))
    assert alone[0].text == together[2].text
    assert [g.text for g in together] != [g.text for g in other]


@pytest.mark.vllm
@pytest.mark.slow
def test_a_prompt_beyond_the_model_is_refused_with_both_numbers(both):
    long = Prompt(token_ids=(5,) * 2048, text="long", num_passages=0)
    (refused,) = both.vllm.generate([long], Sampling())
    assert isinstance(refused, GenerationError)
    assert re.search(r"2060 tokens .*at most 2048", str(refused))
