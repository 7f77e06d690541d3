"""Published weights in one process: what fits, what a model answers after it took them over."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_llama

from rlrag.errors import GenerationError
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.backends.weight_layout import WeightLayout, check_tied
from rlrag.generation.call_lock import CallLock
from rlrag.generation.identity import pushed_identity
from rlrag.generation.protocol import Generator, Sampling
from rlrag.generation.weights import (
    ChecksWeights,
    GeneratorWeights,
    adapter_names,
    check_shapes,
    pack_weights,
)
from rlrag.models.adapters import merge_adapter
from rlrag.records import Prompt

PREFIX = tuple(range(20, 40))
PROMPTS = [Prompt((*PREFIX, 5, 6), "a", 0), Prompt((7, 8, 9), "b", 0), Prompt((11,), "c", 0)]
ANSWERS = [(4, 5), (6,), (7, 8, 9)]


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("first"), seed=1)


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("second"), seed=2)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """The first model with its embedding as output layer."""
    from transformers import LlamaForCausalLM

    path = save_tiny_llama(tmp_path_factory.mktemp("tied"), seed=1)
    model = LlamaForCausalLM.from_pretrained(path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(path)
    return path


def open_model(path: Path, dtype: str = "float32") -> TransformersGenerator:
    return TransformersGenerator(path, dtype, "cpu", batch_size=2, shared_prefix=PREFIX)


def tensors_of(path: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return {name: p.detach() for name, p in model.named_parameters()}


def logps(generator: Generator) -> list[float]:
    return [score.logp for score in generator.score(PROMPTS, ANSWERS)]


def test_weights_taken_over_in_place_equal_those_opened_from_disk(first, second):
    generator, wanted = open_model(first), open_model(second)
    before = logps(generator)  # fills the cache of the shared prefix, which must not survive
    generator.load_weights(pack_weights(tensors_of(second), version=7))
    assert logps(generator) == logps(wanted) != before
    sampling = Sampling(max_new_tokens=5, stop=())
    ours, theirs = generator.generate(PROMPTS, sampling), wanted.generate(PROMPTS, sampling)
    assert [g.text for g in ours] == [g.text for g in theirs]
    assert {r.version for r in [*ours, *generator.score(PROMPTS, ANSWERS)]} == {7}
    assert {r.version for r in theirs} == {wanted.version} == {0}
    generator.load_weights(pack_weights(tensors_of(first), version=8))
    assert logps(generator) == before


def test_the_identity_names_the_tensors_not_the_version(first, second):
    weights = tensors_of(second)
    one, other, again = open_model(first), open_model(first, "bfloat16"), open_model(first)
    start = one.identity
    one.load_weights(pack_weights(weights, version=1))
    other.load_weights(pack_weights(weights, version=1))
    again.load_weights(pack_weights(weights, version=5))
    assert one.identity == again.identity == pushed_identity(start, pack_weights(weights, 9).digest)
    assert len({start, one.identity, other.identity}) == 3


def test_tensors_are_cast_to_the_number_format_of_the_model(first, second):
    generator, wanted = open_model(first, "bfloat16"), open_model(second, "bfloat16")
    generator.load_weights(pack_weights(tensors_of(second), version=1))
    assert logps(generator) == logps(wanted)
    exact = open_model(first)
    exact.load_weights(pack_weights(tensors_of(second, "bfloat16"), version=1))
    assert logps(exact) == pytest.approx(logps(open_model(second)), abs=0.5)
    assert logps(exact) != logps(open_model(second))


def test_a_tied_embedding_is_the_output_layer_too(tied):
    generator = open_model(tied)
    weights = {name: 1.5 * tensor for name, tensor in tensors_of(tied).items()}
    assert "lm_head.weight" not in weights
    generator.load_weights(pack_weights(weights, version=1))
    alone = logps(generator)
    model = generator._model
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    generator.load_weights(pack_weights(both, version=2))
    assert logps(generator) == alone
    both["lm_head.weight"][0, 0] += 1
    with pytest.raises(GenerationError, match=r"ties 'lm_head\.weight' to 'model\.embed_tokens"):
        generator.load_weights(pack_weights(both, version=3))
    assert (logps(generator), generator.version) == (alone, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing \('model\.norm\.weight'\)"),
        (lambda t: t.update(lora_A=torch.ones(1)), r"1 unexpected \('lora_A'\)"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"'model\.norm\.weight' is \(31,\), not \(32,\)",
        ),
        (lambda t: t.clear(), r"21 missing \(.* and 18 more\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_the_old_ones_go_on(first, second, change, named):
    generator = open_model(first)
    before, identity = logps(generator), generator.identity
    tensors = tensors_of(second)
    change(tensors)
    assert isinstance(generator, ChecksWeights)
    with pytest.raises(GenerationError, match=named):
        generator.check_weights({name: tensor.shape for name, tensor in tensors.items()})
    with pytest.raises(GenerationError, match=named):
        generator.load_weights(GeneratorWeights(1, "bad", tensors))
    assert (logps(generator), generator.version, generator.identity) == (before, 0, identity)


RANK, SCALE = 3, 1.7


def adapter_of(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A and B of every linear layer but the output layer, far from zero."""
    random = torch.Generator().manual_seed(seed)
    adapter = {}
    for weight, tensor in tensors_of(path).items():
        if weight.endswith("_proj.weight"):
            down, up = adapter_names(weight)
            adapter[down] = 0.3 * torch.randn(RANK, tensor.shape[1], generator=random)
            adapter[up] = 0.3 * torch.randn(tensor.shape[0], RANK, generator=random)
    return adapter


def merged_by_hand(path: Path, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights in float64, W + scale B A written out as a sum of outer products."""
    found = {}
    for weight, tensor in tensors_of(path).items():
        found[weight] = tensor.double()
        down, up = adapter_names(weight)
        if down in adapter:
            for row, column in zip(adapter[down].double(), adapter[up].double().T, strict=True):
                found[weight] = found[weight] + SCALE * column[:, None] * row[None, :]
    return found


def in_shards(path: Path, target: Path) -> Path:
    """The same model in files of a few tensors each."""
    from transformers import LlamaForCausalLM

    shutil.copytree(path, target)
    (target / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(path).save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("*.safetensors"))) > 3
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_leaves_the_tensors_of_a_merged_set_bit_by_bit(first, dtype):
    adapter = adapter_of(first, seed=1)
    merged = tensors_of(first)
    for weight, tensor in merged.items():
        down, up = (adapter.get(name) for name in adapter_names(weight))
        if down is not None:
            merged[weight] = merge_adapter(tensor, down, up, SCALE)
    for weight, tensor in merged_by_hand(first, adapter).items():
        assert torch.allclose(merged[weight].double(), tensor, atol=1e-5), weight
    pushed, whole = open_model(first, dtype), open_model(first, dtype)
    before = logps(pushed)  # fills the cache of the shared prefix
    pushed.load_weights(pack_weights(adapter, 4, SCALE))
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in merged.items()}
    whole.load_weights(pack_weights(rounded, 4))
    ours, theirs = pushed._model.state_dict(), whole._model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logps(pushed) == logps(whole) != before
    assert pushed.version == 4


def test_an_adapter_is_merged_into_what_is_on_disk_whatever_was_pushed_before(first, second):
    generator = open_model(first)
    start = logps(generator)
    adapter, other = (pack_weights(adapter_of(first, seed), 1, SCALE) for seed in (1, 2))
    generator.load_weights(adapter)
    found, identity = logps(generator), generator.identity
    generator.load_weights(other)
    assert logps(generator) != found
    generator.load_weights(pack_weights(tensors_of(second), 2))
    generator.load_weights(adapter)
    assert (logps(generator), generator.identity) == (found, identity)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items()}
    generator.load_weights(pack_weights(nothing, 3, SCALE))
    assert logps(generator) == start


def test_an_adapter_of_a_tied_model_keeps_the_output_layer_tied(tied):
    generator, adapter = open_model(tied), adapter_of(tied, seed=1)
    embedding = tensors_of(tied)["model.embed_tokens.weight"]
    generator.load_weights(pack_weights(adapter, 1, SCALE))
    assert torch.equal(generator._model.lm_head.weight, embedding)
    layout = WeightLayout.of(tied)
    pairs = dict(layout.pairs(layout.merged(adapter, SCALE, torch.float32), True))
    assert torch.equal(pairs.pop("lm_head.weight"), embedding)
    for name, tensor in merged_by_hand(tied, adapter).items():
        assert torch.allclose(pairs.pop(name).double(), tensor, atol=1e-5), name
    assert not pairs


def test_weights_in_several_files_are_merged_as_those_in_one(first, tmp_path):
    sharded, adapter = in_shards(first, tmp_path / "sharded"), adapter_of(first, seed=1)
    one, many = (
        dict(WeightLayout.of(path).merged(adapter, SCALE, torch.bfloat16))
        for path in (first, sharded)
    )
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    generator, wanted = open_model(sharded), open_model(first)
    for each in (generator, wanted):
        each.load_weights(pack_weights(adapter, 1, SCALE))
    ours, theirs = generator._model.state_dict(), wanted._model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_are_read_when_they_are_asked_for(first, tmp_path):
    sharded = in_shards(first, tmp_path / "sharded")
    layout = WeightLayout.of(sharded)
    (sharded / layout.files["model.norm.weight"]).unlink()
    pairs = layout.merged(adapter_of(first, seed=1), SCALE, torch.float32)
    name, tensor = next(pairs)
    assert torch.equal(tensor, tensors_of(first)[name])
    with pytest.raises(OSError, match="No such file"):
        list(pairs)


def test_a_generator_whose_files_are_gone_closes_rather_than_answer_with_half(first, tmp_path):
    sharded = in_shards(first, tmp_path / "sharded")
    generator, adapter = open_model(sharded), pack_weights(adapter_of(first, seed=1), 1, SCALE)
    generator.load_weights(adapter)
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(GenerationError, match=r"was closed .* could not be read again"):
        generator.load_weights(adapter)
    with pytest.raises(GenerationError, match="closed; create a new one"):
        logps(generator)


def test_an_adapter_is_refused_where_transformers_renames_the_weights(first, tmp_path):
    from safetensors.torch import save_file

    renamed = shutil.copytree(first, tmp_path / "renamed")
    tensors = {name.removeprefix("model."): t for name, t in tensors_of(first).items()}
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    generator = open_model(renamed)
    assert logps(generator) == logps(open_model(first))
    with pytest.raises(GenerationError, match=r"renames .* 20 weights .*'model\.embed_tokens"):
        generator.load_weights(pack_weights(adapter_of(first, seed=1), 1, SCALE))
    assert generator.version == 0


DOWN = "model.layers.0.self_attn.k_proj.lora_A.weight"
UP = "model.layers.0.self_attn.k_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(DOWN), rf"1 missing \('{DOWN}'\)"),
        (lambda t: t.pop(UP), rf"1 missing \('{UP}'\)"),
        (lambda t: t.clear(), r"1 missing \(A and B of any weight\)"),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(3, 32)}), r"1 unexpected \('x\.lora_A"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3)}), r"1 unexpected \('lm_head\.weight"),
        (
            lambda t: t.update({"model.norm.lora_A.weight": torch.ones(3, 32)}),
            r"1 unexpected \('model\.norm\.lora_A\.weight'\)",
        ),
        (lambda t: t.update({DOWN: torch.ones(3, 31)}), rf"'{DOWN}' is \(3, 31\), not \(rank, 32"),
        (lambda t: t.update({DOWN: torch.ones(32)}), rf"'{DOWN}' is \(32,\), not \(rank, 32\)"),
        (lambda t: t.update({DOWN: torch.ones(0, 32)}), rf"'{DOWN}' is \(0, 32\), not \(rank, 32"),
        (lambda t: t.update({DOWN: torch.ones(4, 32)}), rf"'{UP}' is \(16, 3\), not \(16, 4\)"),
        (lambda t: t.update({UP: torch.ones(15, 3)}), rf"'{UP}' is \(15, 3\), not \(16, 3\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_and_nothing_changes(first, change, named):
    generator = open_model(first)
    before, identity = logps(generator), generator.identity
    adapter = adapter_of(first, seed=1)
    generator.check_weights({name: tensor.shape for name, tensor in adapter.items()}, adapter=True)
    change(adapter)
    weights = GeneratorWeights(1, "bad", adapter, SCALE)
    with pytest.raises(GenerationError, match=named):
        generator.check_weights(weights.shapes, weights.is_adapter)
    with pytest.raises(GenerationError, match=named):
        generator.load_weights(weights)
    with pytest.raises(GenerationError, match=named):
        WeightLayout.of(first).check(weights.shapes, adapter=True)
    assert (logps(generator), generator.version, generator.identity) == (before, 0, identity)


def test_a_set_is_no_adapter_and_an_adapter_no_set(first):
    generator, adapter = open_model(first), adapter_of(first, seed=1)
    with pytest.raises(GenerationError, match=r"21 missing .* 28 unexpected"):
        generator.load_weights(pack_weights(adapter, 1))
    with pytest.raises(GenerationError, match="21 unexpected"):
        generator.load_weights(pack_weights(tensors_of(first), 1, SCALE))


def test_the_digest_of_an_adapter_covers_its_scale(first):
    adapter = adapter_of(first, seed=1)
    digests = [pack_weights(adapter, 1, scale).digest for scale in (None, 1.0, 2.0, 2.0)]
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_a_closed_generator_takes_no_weights(first):
    generator = open_model(first)
    generator.close()
    with pytest.raises(GenerationError, match="closed"):
        generator.load_weights(pack_weights({}, version=1))


def test_optional_names_may_be_missing_but_not_misshapen():
    check_shapes({"a": (2,)}, {"a": torch.Size([2])}, optional={"b": (1,)})
    check_shapes({"a": (2,)}, {"a": (2,), "b": (1,)}, optional={"b": (1,)})
    with pytest.raises(GenerationError, match=r"1 of another shape \('b' is \(3,\), not \(1,\)\)"):
        check_shapes({"a": (2,)}, {"a": (2,), "b": (3,)}, optional={"b": (1,)})


def test_the_layout_of_a_directory_holds_what_the_model_holds(first, tied):
    for path, embedding in ((first, None), (tied, "model.embed_tokens.weight")):
        layout = WeightLayout.of(path)
        tensors = tensors_of(path)
        assert layout.shapes == {name: tuple(t.shape) for name, t in tensors.items()}
        assert layout.embedding == embedding
        layout.check({name: t.shape for name, t in tensors.items()})


def test_a_tied_embedding_goes_to_the_engine_under_both_names_once(first, tied):
    tensors = tensors_of(tied)
    embedding = tensors["model.embed_tokens.weight"]
    for given in (tensors, {**tensors, "lm_head.weight": embedding.clone()}):
        layout = WeightLayout.of(tied)
        layout.check({name: t.shape for name, t in given.items()})
        pairs = list(layout.pairs(given.items(), True))
        assert sorted(name for name, _ in pairs) == sorted([*tensors, "lm_head.weight"])
        assert dict(pairs)["lm_head.weight"] is embedding
        # an engine whose class has no output layer, as vLLM's Gemma 2
        assert sorted(dict(layout.pairs(given.items(), False))) == sorted(tensors)
    own = tensors_of(first)
    assert list(WeightLayout.of(first).pairs(own.items(), True)) == list(own.items())


def test_an_output_layer_of_another_name_is_not_the_embedding(tmp_path):
    from safetensors.torch import save_file

    tensors = {"embed_out.weight": torch.ones(5, 2), "x.embed_in.weight": torch.zeros(5, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    layout = WeightLayout.of(tmp_path)
    assert layout.embedding is None
    assert list(layout.pairs(tensors.items(), True)) == list(tensors.items())


def test_a_tied_model_without_a_known_embedding_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"first.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GenerationError, match="0 tensors have the name of an embedding"):
        WeightLayout.of(tmp_path)


def test_tied_tensors_must_agree():
    check_tied({"a": torch.ones(2)}, {"b": "a"})
    check_tied({"a": torch.ones(2), "b": torch.ones(2)}, {"b": "a"})
    with pytest.raises(GenerationError, match="'b' to 'a'"):
        check_tied({"a": torch.ones(2), "b": torch.zeros(2)}, {"b": "a"})


def test_no_call_sees_two_sets_of_weights():
    lock, version, seen = CallLock(), 0, []

    def call() -> None:
        for _ in range(200):
            with lock.call():
                before = version
                threading.Event().wait(0.0001)
                seen.append((before, version))

    calls = [threading.Thread(target=call) for _ in range(3)]
    for thread in calls:
        thread.start()
    for _ in range(20):
        with lock.change():
            version += 1
    for thread in calls:
        thread.join(30)
    assert len(seen) == 600
    assert all(before == after for before, after in seen)


def test_an_error_in_a_call_or_a_change_frees_the_lock():
    lock = CallLock()
    for hold in (lock.call, lock.change, lock.call):
        with pytest.raises(KeyError), hold():
            raise KeyError("x")
    with lock.change():
        pass


def test_a_set_without_a_digest_is_what_the_engine_started_with(first):
    generator = open_model(first)
    start, identity = logps(generator), generator.identity
    generator.load_weights(pack_weights(adapter_of(first, seed=1), 1, SCALE))
    assert (logps(generator) == start, generator.identity == identity) == (False, False)
    nothing = {name: torch.zeros_like(t) for name, t in adapter_of(first, seed=1).items()}
    generator.load_weights(replace(pack_weights(nothing, 0, SCALE), digest=None))
    assert (logps(generator), generator.identity, generator.version) == (start, identity, 0)
