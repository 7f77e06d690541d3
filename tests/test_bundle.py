"""A bundle gives back the policy that was saved, and refuses what does not belong to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import episodes
import numpy as np
import pytest
import torch
from loop_runs import changed
from safetensors.torch import load_file, save_file
from stand_ins import make_table
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag import __version__
from rlrag.bundle import FORMAT, Bundle, bundle_version, load_bundle, save_bundle
from rlrag.config import GeneratorTrainingConfig, RetrievalConfig, RunConfig
from rlrag.errors import CheckpointError, ModelNotFoundError
from rlrag.files.directories import whole_directory
from rlrag.generation.backends.transformers import TransformersGenerator
from rlrag.generation.protocol import Sampling
from rlrag.generation.weights import pack_weights
from rlrag.models.directories import weights_hash
from rlrag.pipeline import open_policy
from rlrag.records import Prompt
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.training.learners.generator_model import TrainableGenerator

HASHES = {"corpus": "c" * 16, "train_questions": "q" * 16}


def write_generator(directory: Path, value: float) -> Path:
    """What a bundle looks at of a language model: its files."""
    directory.mkdir(exist_ok=True)
    save_file({"weight": torch.full((2, 2), value)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def config(small_config, tmp_path) -> RunConfig:
    model = write_generator(tmp_path / "generator", 1.0)
    generator = small_config.generator.model_copy(update={"model": str(model)})
    return small_config.model_copy(update={"generator": generator})


def trained_policy(config: RunConfig, seed: int = 1):
    policy = open_policy(config, make_table(4))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


@pytest.fixture
def saved(config, tmp_path) -> Path:
    save_bundle(tmp_path / "bundle", config, trained_policy(config), make_table(4), HASHES, 12)
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trained(model_dir) -> TrainableGenerator:
    """A tiny generator whose adapter is not zero."""
    generator = TrainableGenerator(model_dir, GeneratorTrainingConfig(lora_rank=2), "cpu", seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in generator.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return generator


@pytest.fixture
def with_generator(small_config, model_dir, trained, tmp_path) -> Path:
    generator = small_config.generator.model_copy(update={"model": str(model_dir)})
    config = small_config.model_copy(update={"generator": generator})
    policy = trained_policy(config)
    directory = tmp_path / "bundle"
    save_bundle(directory, config, policy, make_table(4), HASHES, 7, trained.save_pretrained)
    return directory


def rewrite(bundle: Path, name: str, **changes) -> None:
    """Change a JSON file of a bundle as another version would have written it, manifest and all."""
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    del files["manifest.json"]
    files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()
    with whole_directory(bundle) as directory:
        for file, content in files.items():
            (directory / file).write_bytes(content)


def test_a_bundle_gives_back_policy_configuration_and_facts(config, saved):
    bundle = load_bundle(saved)
    assert isinstance(bundle, Bundle)
    # The cache of this configuration is nowhere, so that the default one is taken.
    assert bundle.config == config.model_copy(update={"cache_dir": RunConfig().cache_dir})
    assert (bundle.facts.format, bundle.facts.step) == (FORMAT, 12)
    assert bundle.facts.score_names == ("dense", "bm25")
    assert bundle.facts.vector_size == 8
    assert bundle.facts.hashes == HASHES
    assert bundle.facts.generator_weights == weights_hash(Path(config.generator.model))
    assert bundle.facts.code_version == __version__
    assert bundle.version == bundle_version(saved)
    assert (bundle.golden, bundle.evaluation) == ((), None)
    written = trained_policy(config)
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, bundle.policy.state_dict()[name]), name
    unseen = make_table(30, seed=3)
    assert (episodes.picks(bundle.policy, unseen) == episodes.picks(written, unseen)).all()
    untrained = open_policy(config, unseen)
    assert (episodes.picks(written, unseen) != episodes.picks(untrained, unseen)).any()


def test_nothing_is_pickled(saved):
    assert {path.name for path in saved.iterdir()} == {
        "config.json",
        "bundle.json",
        "golden.json",
        "licences.json",
        "selector.safetensors",
        "manifest.json",
    }


def test_a_new_bundle_takes_the_place_of_the_old_one(config, saved):
    save_bundle(saved, config, trained_policy(config, seed=2), make_table(4), HASHES, 20)
    assert load_bundle(saved).facts.step == 20


def test_a_bundle_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none does not exist; give the bundle directory"):
        load_bundle(tmp_path / "none")


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["config.json", "bundle.json", "selector.safetensors"])
def test_a_damaged_file_is_named(saved, name, harm):
    path = saved / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-2] if harm == "truncated" else whole[:-2] + b"??")
    with pytest.raises(CheckpointError, match=rf"bundle/{name} is missing, truncated or altered"):
        load_bundle(saved)


def test_another_format_is_refused_before_anything_else_is_read(saved):
    rewrite(saved, "config.json", field_of_the_future=1)
    rewrite(saved, "bundle.json", format=FORMAT + 1)
    with pytest.raises(
        CheckpointError, match=rf"has format {FORMAT + 1}, this version reads {FORMAT}"
    ):
        load_bundle(saved)


def test_a_bundle_of_an_earlier_format_is_refused(saved):
    rewrite(saved, "bundle.json", format=FORMAT - 1)
    message = f"has format {FORMAT - 1}, this version reads {FORMAT}"
    with pytest.raises(CheckpointError, match=message):
        load_bundle(saved)


def test_without_a_trained_generator_there_are_no_weights(saved):
    bundle = load_bundle(saved)
    assert bundle.generator_dir is None
    assert bundle.retriever_dir is None
    assert bundle.generator_weights("float32") is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_generator_comes_back_as_engines_take_it(with_generator, trained, dtype):
    """The weights are those that the learner would publish whole, name by name and bit by bit."""
    bundle = load_bundle(with_generator)
    assert bundle.generator_dir == with_generator / "generator"
    found = bundle.generator_weights(dtype)
    merged = trained.merged_tensors(getattr(torch, dtype))
    assert found.version == 1
    assert found.tensors.keys() == merged.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in merged.items())
    assert found.digest == pack_weights(merged, 0).digest


def test_an_engine_answers_alike_from_the_bundles_directory_and_its_weights(
    with_generator, model_dir
):
    bundle = load_bundle(with_generator)
    pushed, untrained = (TransformersGenerator(model_dir, "float32", "cpu") for _ in range(2))
    pushed.load_weights(bundle.generator_weights("float32"))
    opened = TransformersGenerator(bundle.generator_dir, "float32", "cpu")
    prompts = [Prompt(tuple(range(5, 25)), "", 1), Prompt(tuple(range(40, 50)), "", 1)]
    answers = [(7, 8, 9), (11,)]
    found, expected, before = (
        [s.logp for s in engine.score(prompts, answers)] for engine in (pushed, opened, untrained)
    )
    assert found == expected != before
    texts = [
        [g.text for g in engine.generate(prompts, Sampling(max_new_tokens=4))]
        for engine in (pushed, opened)
    ]
    assert texts[0] == texts[1]


def test_the_tokenizer_comes_along(with_generator, model_dir):
    names = {path.name for path in (with_generator / "generator").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= names
    assert "manifest.json" not in names


def test_a_damaged_generator_is_named(with_generator):
    path = with_generator / "generator" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"generator/model\.safetensors is missing, trunc"):
        load_bundle(with_generator)


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture
def with_retriever(config, encoder_dir, tmp_path) -> tuple[Path, TrainableTextEncoder]:
    """A bundle with an encoder whose weights were changed, and that encoder."""
    retrieval = {"kind": "dense", "encoder": str(encoder_dir), "encoder_max_tokens": 32}
    config = changed(config, retrieval=retrieval | {"encoder_dtype": "float32"})
    encoder = TrainableTextEncoder(encoder_dir, 32)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_bundle(
        tmp_path / "bundle",
        config,
        trained_policy(config),
        make_table(4),
        HASHES,
        9,
        save_retriever=encoder.save_pretrained,
    )
    return tmp_path / "bundle", encoder


def test_a_trained_retriever_comes_back_with_its_vectors(with_retriever, encoder_dir, tmp_path):
    """The index that evaluation builds from the bundle holds what the trained encoder makes."""
    directory, encoder = with_retriever
    bundle = load_bundle(directory)
    assert bundle.generator_dir is None
    assert bundle.retriever_dir == directory / "retriever"
    corpus = make_table(6).corpus
    texts = [passage.contents for passage in corpus]
    tuned = tuned_retrieval(bundle.config.retrieval, bundle.retriever_dir)
    assert tuned.kind == "dense"
    found = open_retrievers(corpus, tuned, tmp_path / "cache")
    original = open_retrievers(corpus, bundle.config.retrieval, tmp_path / "cache")
    untrained = TrainableTextEncoder(encoder_dir, 32)
    with torch.no_grad():
        tuned_PD = encoder.embed(texts, "passage").vectors_BD.numpy()
        untrained_PD = untrained.embed(texts, "passage").vectors_BD.numpy()
    assert np.allclose(found.passage_vectors, tuned_PD, atol=1e-5)
    assert np.allclose(original.passage_vectors, untrained_PD, atol=1e-5)
    assert not np.allclose(tuned_PD, untrained_PD, atol=1e-2)
    assert found.manifest_hash != original.manifest_hash


def test_the_configuration_of_a_bundle_still_names_the_untrained_encoder(
    with_retriever, encoder_dir
):
    """What the tuned retriever is compared with is opened from it."""
    directory, _ = with_retriever
    assert load_bundle(directory).config.retrieval.encoder == str(encoder_dir)


@pytest.mark.parametrize("harm", ["truncated", "missing"])
def test_a_damaged_retriever_is_named(with_retriever, harm):
    directory, _ = with_retriever
    path = next((directory / "retriever").rglob("model.safetensors"))
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"retriever/.*model\.safetensors is missing, trunc"):
        load_bundle(directory)


def test_a_tuned_encoder_into_the_vocabulary_takes_the_place_of_its_own_field(tmp_path):
    retrieval = RetrievalConfig(kind="semi_parametric")
    tuned = tuned_retrieval(retrieval, tmp_path)
    assert tuned.vocabulary_encoder == str(tmp_path)
    assert tuned.encoder == retrieval.encoder


def test_a_bundle_that_was_being_replaced_when_its_writer_was_killed_is_read(with_generator):
    with_generator.rename(with_generator.with_name(".bundle.replaced"))
    bundle = load_bundle(with_generator)
    assert bundle.facts.step == 7
    assert bundle.generator_weights("float32") is not None


def test_a_selector_of_another_shape_is_refused(config, saved):
    stopping = config.selector.model_copy(update={"may_stop": True})
    rewrite(saved, "config.json", selector=stopping.model_dump(mode="json"))
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        load_bundle(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(config, saved, value):
    before = (saved / "manifest.json").read_bytes()
    policy = trained_policy(config)
    with torch.no_grad():
        next(policy.parameters()).view(-1)[0] = value
    message = r"selector\.safetensors contains NaN or infinite values, first in '"
    with pytest.raises(CheckpointError, match=message):
        save_bundle(saved, config, policy, make_table(4), HASHES, 12)
    assert (saved / "manifest.json").read_bytes() == before
    with whole_directory(saved) as staging:
        for path in saved.iterdir():
            (staging / path.name).write_bytes(path.read_bytes())
        save_file(policy.state_dict(), staging / "selector.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_bundle(saved)


def test_a_generator_that_is_not_finite_is_neither_written_nor_read(with_generator, trained):
    path = with_generator / "generator" / "model.safetensors"
    with torch.no_grad():
        next(iter(trained.trainable_parameters().values())).fill_(float("nan"))
    message = "generator contains NaN or infinite values"
    with pytest.raises(CheckpointError, match=message):
        trained.save_pretrained(with_generator.parent / "generator")
    bundle = load_bundle(with_generator)
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(float("-inf"))
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        bundle.generator_weights("float32")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read_the_files_of_a_bundle(config, trained, tmp_path, umask):
    before = os.umask(umask)
    try:
        save_bundle(
            tmp_path / "new",
            *(config, trained_policy(config), make_table(4), HASHES, 12),
            save_generator=trained.save_pretrained,
        )
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*.*")}
    assert modes == {0o666 & ~umask}


def test_a_generator_with_other_weights_is_refused(config, saved):
    trained_with = weights_hash(Path(config.generator.model))
    write_generator(Path(config.generator.model), 2.0)
    here = weights_hash(Path(config.generator.model))
    assert here != trained_with
    with pytest.raises(CheckpointError, match=rf"weights {here} here.*trained with {trained_with}"):
        load_bundle(saved)


def test_a_generator_that_is_gone_is_named(config, saved):
    Path(config.generator.model).rename(saved.parent / "moved")
    with pytest.raises(ModelNotFoundError, match="generator' does not exist"):
        load_bundle(saved)
