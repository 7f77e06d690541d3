"""Published weights in one process: what fits, what a model answers after it took them over."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_llama

from rlrag.errors import GenerationError
from rlrag.generation.call_lock import CallLock
from rlrag.generation.identity import pushed_identity
from rlrag.generation.protocol import Generator, Sampling
from rlrag.generation.transformers_backend import TransformersGenerator
from rlrag.generation.weight_layout import WeightLayout, check_tied
from rlrag.generation.weight_protocols import ChecksWeights, check_shapes
from rlrag.generation.weights import GeneratorWeights, pack_weights
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
        pairs = list(layout.pairs(given))
        assert sorted(name for name, _ in pairs) == sorted([*tensors, "lm_head.weight"])
        assert dict(pairs)["lm_head.weight"] is embedding
    own = tensors_of(first)
    assert list(WeightLayout.of(first).pairs(own)) == list(own.items())


def test_a_tied_model_without_a_known_embedding_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"first.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GenerationError, match="0 tensors are named like one"):
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
