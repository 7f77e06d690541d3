"""The trainable generator against plain forward passes, and what it writes against itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_llama

from rlrag.config import GeneratorTrainingConfig
from rlrag.errors import CheckpointError, ConfigError, GenerationError
from rlrag.training.learners.generator_model import LORA_ALPHA, TrainableGenerator

PROMPTS = [tuple(range(10 + i, 13 + 3 * i)) for i in range(1, 9)]  # 2 to 16 tokens
ANSWERS = [tuple(range(50 + 7 * i, 51 + 7 * i + i % 4)) for i in range(8)]  # 1 to 4 tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory) -> Path:
    """A tiny Llama whose vocabulary matrix is its embedding."""
    from transformers import AutoConfig, LlamaForCausalLM

    directory = save_tiny_llama(tmp_path_factory.mktemp("tied"))
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=True)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make(
    model_dir: Path, seed: int = 0, lora_alpha: float = LORA_ALPHA, **settings
) -> TrainableGenerator:
    config = GeneratorTrainingConfig(**{"precision": "float32", "lora_rank": 4} | settings)
    return TrainableGenerator(model_dir, config, "cpu", seed, lora_alpha=lora_alpha)


def disturb(model: TrainableGenerator, seed: int = 0) -> None:
    """Move every trained weight, as training would; LoRA's B is zero before."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


def plain_logps(directory: Path) -> list[float]:
    """Log-probabilities of the answers, one whole forward pass for each token, hand softmax."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        ids, total = list(prompt), 0.0
        for token in answer:
            with torch.inference_mode():
                odds = model(torch.tensor([ids])).logits[0, -1].double().exp()
            total += float((odds[token] / odds.sum()).log())
            ids.append(token)
        found.append(total)
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_answer_logp_equals_a_loop_over_tokens(model_dir, method):
    found = make(model_dir, method=method).answer_logp(PROMPTS, ANSWERS)
    assert found.tolist() == pytest.approx(plain_logps(model_dir), abs=1e-4)
    assert found.requires_grad
    assert found.dtype == torch.float32


def test_a_batch_of_eight_equals_eight_of_one(model_dir):
    model = make(model_dir)
    disturb(model)
    together = model.answer_logp(PROMPTS, ANSWERS)
    alone = [model.answer_logp([p], [a]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert together.tolist() == pytest.approx(torch.cat(alone).tolist(), abs=1e-4)


def gradients(model: TrainableGenerator) -> dict[str, torch.Tensor]:
    parameters = model.trainable_parameters()
    found = torch.autograd.grad(
        model.answer_logp(PROMPTS, ANSWERS).sum(), list(parameters.values())
    )
    return dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_prompts_share_is_read_once_with_the_same_gradient(model_dir, method):
    shared = tuple(range(100, 140))
    prompts = [shared + prompt for prompt in PROMPTS]
    model = make(model_dir, method=method)
    disturb(model)
    parameters = list(model.trainable_parameters().values())
    weights = torch.linspace(-1, 1, len(prompts))
    num_read = []

    def count(_, args, kwargs):
        num_read.append(kwargs["input_ids"].numel())

    model._model.register_forward_pre_hook(count, with_kwargs=True)

    def measure() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        logp = model.answer_logp(prompts, ANSWERS)
        return logp, torch.autograd.grad((weights * logp).sum(), parameters)

    logp, gradient = measure()
    shared_reads, num_read = sum(num_read), []
    model._shares_prefix = False
    plain_logp, plain_gradient = measure()
    assert torch.allclose(logp, plain_logp, atol=1e-4)
    for found, expected in zip(gradient, plain_gradient, strict=True):
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item() + 1e-6)
    assert shared_reads == sum(num_read) - (len(prompts) - 1) * len(shared)


def test_recomputed_activations_give_the_same_gradient_and_no_dropout(model_dir, tmp_path):
    dropping = shutil.copytree(model_dir, tmp_path / "dropping")
    settings = json.loads((dropping / "config.json").read_text())
    settings["attention_dropout"] = 0.5
    (dropping / "config.json").write_text(json.dumps(settings))
    plain, recomputing = make(model_dir), make(dropping, gradient_checkpointing=True)
    disturb(plain)
    disturb(recomputing)
    left, right = gradients(plain), gradients(recomputing)
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-5), name


def test_recomputing_saves_the_inputs_of_blocks_only(model_dir):
    """Bytes that autograd keeps for the backward pass."""

    def kept(model: TrainableGenerator) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            model.answer_logp(PROMPTS * 4, ANSWERS * 4)
        return sum(sizes)

    assert kept(make(model_dir, gradient_checkpointing=True)) < kept(make(model_dir)) / 2


def test_bfloat16_is_close_and_its_gradients_are_float32(model_dir):
    model = make(model_dir, precision="bfloat16")
    found = model.answer_logp(PROMPTS, ANSWERS)
    plain = make(model_dir).answer_logp(PROMPTS, ANSWERS)
    assert not torch.equal(found, plain)
    assert found.tolist() == pytest.approx(plain.tolist(), rel=0.03)
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_lora_starts_as_the_base_model_and_trains_the_linear_layers_alone(model_dir):
    model = make(model_dir)
    names = model.trainable_parameters()
    assert len(names) == 2 * 7 * 2  # two blocks of seven linear layers, A and B each
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not any("lm_head" in name for name in names)
    one, same, other = (make(model_dir, seed=s).trainable_tensors() for s in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_seed_of_an_adapter_leaves_the_global_generator_alone(model_dir):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make(model_dir, seed=9)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_answers_as_the_trained_model(model_dir, tied_dir, tmp_path, method, kind):
    from rlrag.generation.prompts import load_tokenizer

    source = tied_dir if kind == "tied" else model_dir
    model = make(source, method=method)
    disturb(model)
    trained = model.answer_logp(PROMPTS, ANSWERS).tolist()
    model.save_pretrained(tmp_path / "saved")
    assert plain_logps(tmp_path / "saved") == pytest.approx(trained, abs=2e-3)
    assert make(tmp_path / "saved").answer_logp(PROMPTS, ANSWERS).tolist() == pytest.approx(
        trained, abs=1e-3
    )
    assert trained != pytest.approx(plain_logps(source), abs=0.1)
    assert ("lm_head.weight" in model.merged_tensors(torch.float32)) == (kind == "untied")
    tokenizer = load_tokenizer(tmp_path / "saved")
    assert tokenizer.encode("Question:") == load_tokenizer(source).encode("Question:")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


def test_merging_is_by_hand_and_changes_no_training_weight(model_dir):
    model = make(model_dir, lora_rank=4, lora_alpha=6.0)
    disturb(model)
    before = {name: p.detach().clone() for name, p in model._model.named_parameters()}
    merged = model.merged_tensors(torch.float32)
    layer = "model.layers.1.mlp.down_proj"
    product = before[f"{layer}.lora_B.default.weight"] @ before[f"{layer}.lora_A.default.weight"]
    expected = before[f"{layer}.base_layer.weight"] + 6.0 / 4 * product
    assert torch.allclose(merged[f"{layer}.weight"], expected, atol=1e-6)
    for tensor in merged.values():
        tensor.zero_()
    for name, parameter in model._model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_merged_tensors_have_the_names_and_shapes_of_the_files(model_dir):
    from safetensors.torch import load_file

    files = load_file(model_dir / "model.safetensors")
    merged = make(model_dir).merged_tensors(torch.bfloat16)
    assert merged.keys() == files.keys()
    assert all(torch.equal(merged[name], files[name].bfloat16()) for name in files)


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_engine_that_took_what_is_published_holds_the_merged_model(
    model_dir, tied_dir, method, dtype, kind
):
    from rlrag.generation.backends.transformers import TransformersGenerator

    source, number_format = tied_dir if kind == "tied" else model_dir, getattr(torch, dtype)
    model = make(source, method=method, lora_alpha=6.0)
    disturb(model)
    published = model.published_weights(3, number_format)
    engine = TransformersGenerator(source, dtype, "cpu")
    engine.load_weights(published)
    held, merged = engine._model.state_dict(), model.merged_tensors(number_format)
    assert merged.keys() == dict(engine._model.named_parameters()).keys()
    assert all(torch.equal(held[name], merged[name]) for name in merged)
    assert (engine.version, published.is_adapter) == (3, method == "lora")


def test_of_lora_the_adapter_alone_is_published_and_in_float32(model_dir):
    model = make(model_dir, lora_rank=4, lora_alpha=6.0)
    disturb(model)
    published = model.published_weights(1, torch.bfloat16)
    assert published.adapter_scale == 1.5
    trained = model.trainable_tensors()
    assert published.tensors.keys() == {n.replace(".default.", ".") for n in trained}
    for name, tensor in trained.items():
        found = published.tensors[name.replace(".default.", ".")]
        assert torch.equal(found, tensor)
        assert found.dtype == torch.float32
    sent = sum(tensor.nbytes for tensor in published.tensors.values())
    assert sent < sum(t.nbytes for t in model.merged_tensors(torch.float32).values()) / 2
    digest = published.digest
    disturb(model, seed=1)  # what was published is a copy
    assert all(
        torch.equal(t, published.tensors[n.replace(".default.", ".")]) for n, t in trained.items()
    )
    assert model.published_weights(1, torch.bfloat16).digest != digest


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_tensors_come_back(model_dir, method):
    model, other = make(model_dir, method=method), make(model_dir, seed=1, method=method)
    disturb(model)
    kept = model.trainable_tensors()
    other.load_trainable(kept)
    disturb(model, seed=1)  # what was kept is a copy
    assert all(torch.equal(tensor, other.trainable_tensors()[n]) for n, tensor in kept.items())
    assert any(not torch.equal(tensor, model.trainable_tensors()[n]) for n, tensor in kept.items())


def test_tensors_of_another_adapter_are_refused(model_dir):
    tensors = make(model_dir, lora_rank=2).trainable_tensors()
    with pytest.raises(
        CheckpointError, match=r"28 generator tensors do not fit .* first 'model\.layers"
    ):
        make(model_dir).load_trainable(tensors)


def test_micro_batches_are_of_like_length_and_within_the_limit(model_dir):
    model = make(model_dir, micro_batch_tokens=64)
    lengths = [3, 40, 16, 9, 100, 16, 15, 33, 1]
    batches = model.micro_batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == [[4], [1], [7], [2, 5, 6, 3], [0, 8]]
    assert model.micro_batches([]) == []
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 64


@pytest.mark.parametrize(("prompt", "answer"), [((), (1,)), ((1,), ())])
def test_an_empty_prompt_or_answer_is_refused(model_dir, prompt, answer):
    with pytest.raises(GenerationError, match=r"training sequence 1 has .* at least one"):
        make(model_dir).answer_logp([(1,), prompt], [(1,), answer])


def test_a_sequence_longer_than_the_model_reads_is_refused(model_dir):
    with pytest.raises(GenerationError, match=r"takes 2049 tokens .* at most 2048; lower"):
        make(model_dir).answer_logp([(1,) * 2048], [(1,)])


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(GenerationError, match="cannot load the model in"):
        make(tmp_path)


def test_sharding_without_a_group_of_workers_is_refused(model_dir):
    with pytest.raises(ConfigError, match=r"sharding 'fsdp2' .* this process is in none"):
        make(model_dir, sharding="fsdp2")
