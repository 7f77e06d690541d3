"""The transformers back end against plain forward passes without cache, padding or batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from rlrag.config import GeneratorConfig, PromptConfig
from rlrag.errors import ConfigError, GenerationError, ModelNotFoundError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.build import check_positions, measure_speed, open_engine
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Prompt

TOLERANCE = 1e-4
PREFIX = tuple(range(20, 50))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<|end|>", *alphabet])}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.3,  # peaked distributions, so that greedy choices are no ties
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(model_dir) -> TransformersGenerator:
    return TransformersGenerator(model_dir, "float32", "cpu", batch_size=8, shared_prefix=PREFIX)


@pytest.fixture(scope="module")
def plain_model(model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval()


def prompt(*ids: int) -> Prompt:
    return Prompt(token_ids=ids, text=f"prompt {ids}", num_passages=0)


def prompts_of_many_lengths(number: int) -> list[Prompt]:
    """Half with the shared prefix, half without, lengths 1 to about 60."""
    random = torch.Generator().manual_seed(3)
    found = []
    for i in range(number):
        size = 1 + (7 * i) % 29
        rest = torch.randint(1, 250, (size,), generator=random).tolist()
        found.append(prompt(*(PREFIX if i % 2 else ()), *rest))
    return found


def answers_of_many_lengths(number: int) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(4)
    return [
        tuple(torch.randint(1, 250, (1 + i % 5,), generator=random).tolist()) for i in range(number)
    ]


@torch.inference_mode()
def plain_logp(model, prompt_ids, answer_ids) -> float:
    """Sum of log p, one full forward pass for each token."""
    ids, total = list(prompt_ids), 0.0
    for token in answer_ids:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        ids.append(token)
    return total


@torch.inference_mode()
def plain_greedy(model, prompt_ids, length: int) -> list[int]:
    ids = list(prompt_ids)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt_ids) :]


def test_it_is_a_generator(generator):
    assert isinstance(generator, Generator)
    assert generator.score([], []) == []
    assert generator.generate([], Sampling()) == []


def test_a_speed_is_measured_on_any_number_of_prompts(generator):
    assert measure_speed(generator, prompts_of_many_lengths(1)) > 0
    assert measure_speed(generator, prompts_of_many_lengths(3)) > 0
    too_long = prompt(*range(1, 200))
    with pytest.raises(GenerationError, match="reads at most 128"):
        measure_speed(generator, [too_long, too_long])


@pytest.mark.parametrize("place", ["max_position_embeddings", "n_positions", "text_config"])
def test_prompts_that_the_model_has_no_positions_for_are_refused_at_the_start(tmp_path, place):
    limit = {"max_position_embeddings": 128} if place == "text_config" else 128
    (tmp_path / "config.json").write_text(json.dumps({place: limit}))

    def config(prompt_tokens: int, new: int) -> GeneratorConfig:
        prompt = PromptConfig(max_prompt_tokens=prompt_tokens)
        return GeneratorConfig(prompt=prompt, max_new_tokens=new)

    check_positions(config(116, 12), tmp_path)
    with pytest.raises(ConfigError, match=r"reads at most 128 .*set max_prompt_tokens to 116 or"):
        check_positions(config(117, 12), tmp_path)
    with pytest.raises(ConfigError, match="max_new_tokens is 128; lower it"):
        check_positions(config(16, 128), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({place: -1}))
    if place != "text_config":
        check_positions(config(117, 12), tmp_path)


def test_score_equals_a_plain_loop(generator, plain_model):
    prompts, answers = prompts_of_many_lengths(20), answers_of_many_lengths(20)
    scores = generator.score(prompts, answers)
    for p, a, score in zip(prompts, answers, scores, strict=True):
        assert score.logp == pytest.approx(plain_logp(plain_model, p.token_ids, a), abs=TOLERANCE)
        assert (score.num_tokens, score.num_prompt_tokens) == (len(a), len(p.token_ids))


def test_many_answers_to_one_prompt_are_scored_each(generator, plain_model):
    asked = prompt(*PREFIX, 60, 61)
    answers = [*answers_of_many_lengths(20), (5,), (5,)]
    other = prompt(7, 8)
    scores = generator.score([asked] * 22 + [other], [*answers, (9, 9)])
    expected = [plain_logp(plain_model, asked.token_ids, a) for a in answers]
    expected.append(plain_logp(plain_model, other.token_ids, (9, 9)))
    assert [s.logp for s in scores] == pytest.approx(expected, abs=TOLERANCE)


def test_a_batch_of_8_equals_8_batches_of_1(model_dir, generator):
    alone = TransformersGenerator(model_dir, "float32", "cpu", batch_size=1)
    prompts, answers = prompts_of_many_lengths(8), answers_of_many_lengths(8)
    together = generator.score(prompts, answers)
    assert [s.logp for s in together] == pytest.approx(
        [alone.score([p], [a])[0].logp for p, a in zip(prompts, answers, strict=True)],
        abs=TOLERANCE,
    )
    for sampling in (Sampling(stop=()), Sampling(stop=(), temperature=0.7, seed=5)):
        answered = generator.generate(prompts, sampling)
        singly = [alone.generate([p], sampling)[0] for p in prompts]
        assert [g.text for g in answered] == [g.text for g in singly]
        assert [g.logp for g in answered] == pytest.approx([g.logp for g in singly], abs=TOLERANCE)


def test_sharing_the_prefix_changes_nothing(model_dir, generator):
    whole = TransformersGenerator(model_dir, "float32", "cpu", batch_size=8)
    prompts, answers = prompts_of_many_lengths(8), answers_of_many_lengths(8)
    for _ in range(2):  # the second time the prefix is there already, and is not used up
        shared = generator.score(prompts, answers)
        assert [s.logp for s in shared] == pytest.approx(
            [s.logp for s in whole.score(prompts, answers)], abs=TOLERANCE
        )
    only_prefix = [prompt(*PREFIX), prompt(*PREFIX[:-1], 99, 3)]
    assert [s.logp for s in generator.score(only_prefix, answers[:2])] == pytest.approx(
        [s.logp for s in whole.score(only_prefix, answers[:2])], abs=TOLERANCE
    )


def test_greedy_answers_equal_a_plain_loop(generator, plain_model):
    prompts = prompts_of_many_lengths(12)
    answers = generator.generate(prompts, Sampling(max_new_tokens=6, stop=()))
    for p, answer in zip(prompts, answers, strict=True):
        expected = plain_greedy(plain_model, p.token_ids, 6)
        assert answer.num_tokens == len(expected)
        text = generator._tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answer.text == text
        logp = plain_logp(plain_model, p.token_ids, expected)
        assert answer.logp == pytest.approx(logp, abs=TOLERANCE)


def test_text_ends_before_the_first_stop_string(generator):
    asked = prompts_of_many_lengths(12)
    free = generator.generate(asked, Sampling(max_new_tokens=10, stop=()))
    source = max(range(12), key=lambda i: len(set(free[i].text)))
    text = free[source].text
    mark = text[len(text) // 2 : len(text) // 2 + 2]
    (stopped,) = generator.generate([asked[source]], Sampling(max_new_tokens=10, stop=(mark,)))
    assert stopped.text == text[: text.index(mark)].strip()
    assert stopped.num_tokens < 10
    together = generator.generate(asked, Sampling(max_new_tokens=10, stop=(mark,)))
    assert together[source].text == stopped.text
    for before, after in zip(free, together, strict=True):
        assert after.text == before.text.split(mark)[0].strip()


def test_seeded_sampling_repeats_and_seeds_differ(generator):
    asked = prompts_of_many_lengths(6)
    hot = Sampling(max_new_tokens=8, temperature=1.5, stop=(), seed=1)
    first, again = generator.generate(asked, hot), generator.generate(asked[::-1], hot)[::-1]
    other = generator.generate(asked, Sampling(max_new_tokens=8, temperature=1.5, stop=(), seed=2))
    assert [g.text for g in first] == [g.text for g in again]
    assert [g.text for g in first] != [g.text for g in other]


def test_sampling_follows_the_tempered_distribution(generator, plain_model):
    asked = prompt(5, 6, 7)
    with torch.inference_mode():
        logits = plain_model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    probability = (logits / 2.0).softmax(-1)
    best = int(probability.argmax())
    expected_logp = float(logits.log_softmax(-1)[best])
    draws = [
        generator.generate([asked], Sampling(1, temperature=2.0, stop=(), seed=s))[0]
        for s in range(300)
    ]
    share = sum(abs(d.logp - expected_logp) < 1e-3 for d in draws) / len(draws)
    p = float(probability[best])
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / 300) ** 0.5)


def test_tokens_are_counted(model_dir):
    fresh = TransformersGenerator(model_dir, "float32", "cpu")
    fresh.score([prompt(1, 2, 3), prompt(4)], [(5, 6), (7,)])
    assert (fresh.tokens.spent, fresh.tokens.num_requests) == (7, 2)
    answer = fresh.generate([prompt(1, 2)], Sampling(max_new_tokens=3, stop=()))[0]
    assert fresh.tokens.spent == 7 + 2 + answer.num_tokens


def test_identity_names_weights_and_format(model_dir, generator, tmp_path):
    other = TransformersGenerator(model_dir, "bfloat16", "cpu")
    assert other.identity != generator.identity
    assert TransformersGenerator(model_dir, "float32", "cpu", 2).identity == generator.identity


@pytest.mark.parametrize(
    ("prompts", "answers", "named"),
    [
        ([prompt(1)], [()], "answer 0 has no tokens"),
        ([prompt(1)], [], "1 prompts but 0 answers"),
    ],
)
def test_unusable_requests_are_refused(generator, prompts, answers, named):
    with pytest.raises(GenerationError, match=named):
        generator.score(prompts, answers)


@pytest.mark.parametrize(
    ("ids", "named"), [((), "a prompt has no tokens"), ((1,) * 127, "129 tokens.*at most 128")]
)
def test_a_prompt_that_is_refused_gets_the_error_and_the_others_their_answers(
    generator, ids, named
):
    prompts, sampling = [prompt(5, 6), prompt(*ids), prompt(7)], Sampling(max_new_tokens=2)
    others, before = [prompts[0], prompts[2]], generator.tokens.num_requests
    for found, alone in (
        (generator.generate(prompts, sampling), generator.generate(others, sampling)),
        (generator.score(prompts, [(1, 1)] * 3), generator.score(others, [(1, 1)] * 2)),
    ):
        assert isinstance(found[1], GenerationError)
        assert re.search(named, str(found[1]))
        assert [found[0], found[2]] == alone
    assert generator.tokens.num_requests == before + 8


@pytest.mark.parametrize(("max_model_len", "limit"), [(64, 64), (2048, 128)])
def test_a_configured_length_bounds_prompt_and_answer_as_the_models_own_does(
    model_dir, max_model_len, limit
):
    config = GeneratorConfig(
        backend="transformers", dtype="float32", device="cpu", max_model_len=max_model_len
    )
    engine = open_engine(config, model_dir, PREFIX)
    fits, too_long = prompt(*(1,) * (limit - 2)), prompt(*(1,) * (limit - 1))
    for found in (
        engine.generate([fits, too_long], Sampling(max_new_tokens=2)),
        engine.score([fits, too_long], [(1, 1)] * 2),
    ):
        assert not isinstance(found[0], GenerationError)
        assert f"take {limit + 1} tokens but the model reads at most {limit};" in str(found[1])


def test_a_call_of_refused_prompts_alone_asks_the_model_nothing(generator):
    (found,) = generator.generate([prompt()], Sampling())
    assert isinstance(found, GenerationError)


def other_model(directory: Path, tokenizer_dir: Path, model) -> Path:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def test_a_sliding_window_sees_the_shared_prefix_whatever_is_in_the_batch(model_dir, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).eval()
    path = other_model(tmp_path, model_dir, model)
    windowed = TransformersGenerator(path, "float32", "cpu", 8, PREFIX)
    prompts, answers = prompts_of_many_lengths(8), answers_of_many_lengths(8)
    expected = [plain_logp(model, p.token_ids, a) for p, a in zip(prompts, answers, strict=True)]
    found = [score.logp for score in windowed.score(prompts, answers)]
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        TransformersGenerator(tmp_path, "float32", "cpu")


def test_a_closed_generator_says_so(model_dir):
    closed = TransformersGenerator(model_dir, "float32", "cpu")
    closed.close()
    with pytest.raises(GenerationError, match="closed"):
        closed.score([prompt(1)], [(2,)])
