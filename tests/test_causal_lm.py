"""Tiny random models of many families: opened and read alike everywhere, or refused with a reason.

The reference is one plain forward pass over prompt and answer, without cache, padding or batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, save_family, save_tokenizer

from rlrag.config import GeneratorTrainingConfig
from rlrag.errors import ConfigError, GenerationError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.backends.weight_layout import WeightLayout
from rlrag.generation.weights import pack_weights
from rlrag.models.causal_lm import attention_for, differ, has_windows
from rlrag.records import Prompt
from rlrag.selection.listwise_lm import ListwiseLMPolicy
from rlrag.training.learners.generator_model import TrainableGenerator

TOLERANCE = 1e-4
PREFIX = tuple(range(100, 140))
PROMPTS = [(*PREFIX, *range(7, 7 + number)) for number in (3, 30, 12)]
ANSWERS = [(5,), (60, 61, 62), (400, 5)]
SMALL = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

NO_ADAPTER = {
    "gpt2": (ConfigError, "GPT2LMHeadModel has none; train all its weights"),
    "gpt_neox": (GenerationError, "renames or reshapes 1 weights .*method full"),
    "qwen2_moe": (GenerationError, "renames or reshapes 4 weights .*method full"),
}


def saved(directory: Path, model: Any) -> Path:
    """The model with large random weights, and a tokenizer."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "norm" not in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=random))
    save_tokenizer(directory)
    model.save_pretrained(directory)
    return directory


def plain_logps(directory: Path, attention: str = "eager") -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        logp = logits.double().log_softmax(-1)
        found.append(sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(answer)))
    return found


def opened(directory: Path) -> TransformersGenerator:
    return TransformersGenerator(directory, "float32", "cpu", 8, PREFIX)


def scores(generator: TransformersGenerator) -> list[float]:
    prompts = [Prompt(prompt, "", 0) for prompt in PROMPTS]
    return [score.logp for score in generator.score(prompts, ANSWERS)]


def learner(directory: Path, method: str) -> TrainableGenerator:
    config = GeneratorTrainingConfig(method=method, precision="float32", lora_rank=4)
    return TrainableGenerator(directory, config, "cpu", seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_scored_trained_and_pushed_as_a_plain_forward_pass_has_it(family, tmp_path):
    directory = save_family(tmp_path, family)
    generator, expected = opened(directory), plain_logps(directory)
    assert scores(generator) == pytest.approx(expected, abs=TOLERANCE)
    random = torch.Generator().manual_seed(1)
    methods = ["full"] if family in NO_ADAPTER else ["full", "lora"]
    for method in methods:
        model = learner(directory, method)
        assert model.answer_logp(PROMPTS, ANSWERS).tolist() == pytest.approx(
            expected, abs=TOLERANCE
        )
        with torch.no_grad():
            for p in model.trainable_parameters().values():
                p.add_(0.05 * torch.randn(p.shape, generator=random))
            trained = model.answer_logp(PROMPTS, ANSWERS).tolist()
        assert trained != pytest.approx(expected, abs=0.01)
        generator.load_weights(model.published_weights(1, torch.float32))
        assert scores(generator) == pytest.approx(trained, abs=TOLERANCE)
    if family in NO_ADAPTER:
        error, reason = NO_ADAPTER[family]
        with pytest.raises(error, match=reason):
            generator.load_weights(learner(directory, "lora").published_weights(1, torch.float32))


def mpt() -> Any:
    return transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=600, d_model=32, n_layers=2, n_heads=4, max_seq_len=256)
    )


def gpt_neo() -> Any:
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=600,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            max_position_embeddings=256,
        )
    )


@pytest.mark.parametrize(("make", "is_logged"), [(mpt, True), (gpt_neo, False)])
def test_what_goes_by_columns_shares_no_prefix_and_scores_right(make, is_logged, tmp_path, caplog):
    directory = saved(tmp_path, make())
    with caplog.at_level(logging.WARNING):
        generator = opened(directory)
    assert scores(generator) == pytest.approx(plain_logps(directory), abs=TOLERANCE)
    assert generator._prefix == ()
    logged = (
        "no prefix is shared between prompts" in caplog.text and "plain forward pass" in caplog.text
    )
    assert logged == is_logged  # GPT-Neo's windows are known from its configuration
    assert has_windows(generator._model.config) != is_logged


def test_a_prefix_that_leaves_no_room_is_not_tried(tmp_path):
    directory = save_family(tmp_path, "llama")
    generator = TransformersGenerator(directory, "float32", "cpu", 8, PREFIX, len(PREFIX) + 3)
    assert generator._prefix == PREFIX


def bert(model_class: Any = None, **options: Any) -> Any:
    model_class = model_class or transformers.BertLMHeadModel
    return model_class(transformers.BertConfig(**SMALL, **options))


def bart() -> Any:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=600,
            d_model=32,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=256,
            **sizes,
        )
    )


def lfm2() -> Any:
    return transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            **SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        )
    )


def rwkv() -> Any:
    return transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2)
    )


def xlstm() -> Any:
    return transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(
            vocab_size=600, hidden_size=32, num_hidden_layers=2, num_blocks=2, num_heads=4
        )
    )


def recurrent_gemma() -> Any:
    return transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **SMALL, head_dim=8, lru_width=32, block_types=["recurrent", "attention"]
        )
    )


def xlnet() -> Any:
    return transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=600, d_model=32, n_layer=2, n_head=4, d_inner=64)
    )


STATES = "recurrent layers instead of a key-value cache"
NO_LM = "which is not a causal language model"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (bert, NO_LM),
    "masked bert": (lambda: bert(transformers.BertForMaskedLM), NO_LM),
    "bart": (bart, NO_LM),
    "lfm2": (lfm2, STATES),
    "rwkv": (rwkv, STATES),
    "xlstm": (xlstm, STATES),
    "recurrent_gemma": (recurrent_gemma, STATES),
    "xlnet": (xlnet, "cannot (be read in a padded batch|go on from the keys and values)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_in_parts_is_refused_by_everyone_who_opens_it(name, tmp_path):
    make, reason = REFUSED[name]
    directory = saved(tmp_path, make())
    with pytest.raises(ConfigError, match=rf"{reason}.*; use generator\.backend vllm"):
        opened(directory)
    with pytest.raises(ConfigError, match=rf"{reason}.*; name another generator\.model"):
        learner(directory, "lora")
    with pytest.raises(ConfigError, match=r"set selector\.model"):
        ListwiseLMPolicy(directory, num_selected=2)


def test_a_bert_that_is_told_to_be_a_decoder_is_one(tmp_path):
    directory = saved(tmp_path, bert(is_decoder=True))
    assert scores(opened(directory)) == pytest.approx(plain_logps(directory), abs=TOLERANCE)


def test_a_router_that_is_a_linear_layer_gets_no_adapter(tmp_path):
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    directory = saved(tmp_path, PhimoeForCausalLM(config))
    model = learner(directory, "lora")
    found = model.answer_logp(PROMPTS, ANSWERS).tolist()
    assert found == pytest.approx(plain_logps(directory), abs=TOLERANCE)
    with pytest.raises(GenerationError, match=r"renames or reshapes .*method full"):
        opened(directory).load_weights(model.published_weights(1, torch.float32))


def test_capped_attention_is_eager_for_everyone(tmp_path):
    directory = save_family(tmp_path, "gemma2")
    config = transformers.AutoConfig.from_pretrained(directory)
    assert attention_for(config, "sdpa") == "eager"
    config.attn_logit_softcapping = None
    assert attention_for(config, "sdpa") == "sdpa"
    uncapped, capped = plain_logps(directory, "sdpa"), plain_logps(directory)
    assert uncapped != pytest.approx(capped, abs=0.1)
    policy = ListwiseLMPolicy(directory, num_selected=2)  # compares both ways to read by itself
    assert policy.model.config._attn_implementation == "eager"


def test_a_model_that_sees_what_follows_is_found_out_whatever_it_says(tmp_path):
    directory = save_family(tmp_path, "llama")
    generator = opened(directory)
    plain = generator._model.forward

    def both_ways(input_ids=None, use_cache=None, **options):
        if use_cache is False:  # what follows the first token changes what it gives
            input_ids = input_ids.flip(1)
        return plain(input_ids=input_ids, use_cache=use_cache, **options)

    generator._model.forward = both_ways
    with pytest.raises(ConfigError, match=r"padded batch: log p of 3 tokens is -.* plain forward"):
        generator._check_reading(directory)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 5e-3), ("bfloat16", 0.4)])
def test_rounding_is_told_from_a_difference_by_number_format_and_length(dtype, bound):
    number_format = getattr(torch, dtype)
    for num_tokens in (1, 3):
        total = bound * num_tokens
        assert not differ(-2.0, -2.0 - 0.99 * total, num_tokens, number_format)
        assert differ(-2.0, -2.0 + 1.01 * total, num_tokens, number_format)
    assert differ(float("nan"), -2.0, 1, number_format)
    assert differ(float("-inf"), -2.0, 1, number_format)


def test_a_set_with_another_output_layer_is_not_taken_for_a_tied_one(tmp_path):
    directory = save_family(tmp_path, "gemma2")
    tensors = dict(opened(directory)._model.named_parameters())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(GenerationError, match="ties"):
        opened(directory).load_weights(pack_weights(tensors, 1))


def test_a_mixture_of_experts_is_known_by_its_files_and_gets_advice_that_helps(tmp_path):
    directory = save_family(tmp_path / "moe", "qwen2_moe")
    layout = WeightLayout.of(directory)
    assert layout.has_experts
    assert not WeightLayout.of(save_family(tmp_path / "llama", "llama")).has_experts
    model = opened(directory)._model
    fused = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(GenerationError, match=r"packs the weights .*backend transformers"):
        layout.check(fused)
