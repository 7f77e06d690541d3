"""The dense encoder with a gradient against the one that only encodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_encoder

from rlrag.data.sample import sample_corpus
from rlrag.errors import ConfigError
from rlrag.models.directories import weights_hash
from rlrag.retrieval.dense.encoder import TextEncoder
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder

MAX_TOKENS = 24
TEXTS = ["one", *(passage.text for passage in list(sample_corpus())[:6]), "two words"]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def encoder(encoder_dir) -> TrainableTextEncoder:
    return TrainableTextEncoder(encoder_dir, MAX_TOKENS)


def frozen_vectors(directory: Path, texts: list[str]) -> np.ndarray:
    return TextEncoder(directory, "float32", MAX_TOKENS, batch_size=4).encode(texts)


def vectors_of(encoder: TrainableTextEncoder) -> np.ndarray:
    with torch.no_grad():
        return encoder.embed(TEXTS, "passage").vectors_BD.numpy()


def test_vectors_are_those_of_the_frozen_encoder(encoder, encoder_dir):
    expected = frozen_vectors(encoder_dir, TEXTS)
    for role in ("question", "passage"):
        found = encoder.embed(TEXTS, role)
        assert found.bags_BD is None
        assert np.allclose(found.vectors_BD.detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "default", "before_question", "before_passage"),
    [
        ({"query": "search: ", "document": "text: "}, None, "search: ", "text: "),
        ({"query": "search: ", "passage": "text: "}, None, "search: ", "text: "),
        ({"query": "search: "}, None, "search: ", ""),
        ({"query": "search: "}, "query", "search: ", ""),
        ({"any": "any: "}, "any", "any: ", "any: "),
    ],
)
def test_prompts_of_the_roles_stand_before_the_texts(
    encoder_dir, tmp_path, prompts, default, before_question, before_passage
):
    from sentence_transformers import SentenceTransformer

    prompted = SentenceTransformer(str(encoder_dir), prompts=prompts, default_prompt_name=default)
    prompted.save_pretrained(str(tmp_path / "prompted"), create_model_card=False)
    frozen = TextEncoder(tmp_path / "prompted", "float32", MAX_TOKENS, batch_size=4)
    encoder = TrainableTextEncoder(tmp_path / "prompted", MAX_TOKENS)
    for role, before in (("question", before_question), ("passage", before_passage)):
        expected = frozen_vectors(encoder_dir, [before + text for text in TEXTS])
        assert np.allclose(frozen.encode(TEXTS, role), expected, atol=1e-5), role
        found = encoder.embed(TEXTS, role).vectors_BD.detach().numpy()
        assert np.allclose(found, expected, atol=1e-5), role


def test_padding_changes_nothing(encoder):
    together = encoder.embed(TEXTS, "passage").vectors_BD
    alone = torch.cat([encoder.embed([text], "passage").vectors_BD for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS)))


def test_the_gradient_is_that_of_finite_differences(encoder):
    encoder.double()
    weight = dict(encoder.named_parameters())["model.0.model.embeddings.word_embeddings.weight"]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value() -> torch.Tensor:
        return (encoder.embed(TEXTS[:3], "question").vectors_BD @ direction).sum()

    value().backward()
    token = int(weight.grad.abs().sum(dim=1).argmax())
    step = 1e-6
    for column in (0, 17):
        with torch.no_grad():
            weight[token, column] += step
            above = value()
            weight[token, column] -= 2 * step
            below = value()
            weight[token, column] += step
        slope = (above - below) / (2 * step)
        assert weight.grad[token, column].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_dropout_stays_off(encoder):
    assert any(m.p > 0 for m in encoder.modules() if isinstance(m, torch.nn.Dropout))
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    first, second = (encoder.embed(TEXTS, "passage").vectors_BD for _ in range(2))
    assert torch.equal(first, second)


def test_the_frozen_encoder_loads_what_was_trained(encoder, encoder_dir, tmp_path):
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.5)
    vectors = encoder.embed(TEXTS, "passage").vectors_BD
    (vectors[0] @ vectors[1:].T).sum().backward()
    optimizer.step()
    encoder.save_pretrained(tmp_path / "new" / "encoder")
    found = frozen_vectors(tmp_path / "new" / "encoder", TEXTS)
    assert np.allclose(found, vectors_of(encoder), atol=1e-5)
    assert not np.allclose(found, frozen_vectors(encoder_dir, TEXTS), atol=1e-3)
    again = TrainableTextEncoder(tmp_path / "new" / "encoder", MAX_TOKENS)
    assert all(
        torch.equal(tensor, again.state_dict()[name])
        for name, tensor in encoder.state_dict().items()
    )


@pytest.mark.parametrize("used", [False, True])
def test_equal_weights_are_saved_with_equal_hashes(encoder_dir, tmp_path, used):
    """Whatever texts the tokenizer has read: it remembers how it last cut and padded."""
    from sentence_transformers import SentenceTransformer

    source = SentenceTransformer(str(encoder_dir))
    if used:
        source.encode(TEXTS)
    source.save_pretrained(str(tmp_path / "source"))
    encoder = TrainableTextEncoder(tmp_path / "source", MAX_TOKENS)
    encoder.save_pretrained(tmp_path / "before")
    expected = vectors_of(encoder)
    encoder.save_pretrained(tmp_path / "after")
    assert np.array_equal(vectors_of(encoder), expected)
    TrainableTextEncoder(tmp_path / "after", 2 * MAX_TOKENS).save_pretrained(tmp_path / "again")
    hashes = {weights_hash(tmp_path / name) for name in ("before", "after", "again")}
    assert len(hashes) == 1


def test_a_directory_that_exists_is_not_written_into(encoder, tmp_path):
    with pytest.raises(FileExistsError):
        encoder.save_pretrained(tmp_path)


def test_a_model_that_reads_less_is_refused(encoder_dir):
    with pytest.raises(ConfigError, match=r"encoder_max_tokens is 4096, .* at most 256"):
        TrainableTextEncoder(encoder_dir, 4096)
