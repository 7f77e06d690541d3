"""Texts to vectors in vocabulary space: the formula, its gradient, and the model around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_llama, save_tiny_masked_lm, save_word_pieces

from rlrag.config import BUILTIN_VOCABULARY_ENCODER
from rlrag.errors import ConfigError, DataError
from rlrag.models.directories import resolve_model
from rlrag.retrieval.role_directories import has_encoder_each
from rlrag.retrieval.vocabulary import space as vocabulary_space
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.retrieval.vocabulary.space import elu1p, max_logits, sparsified

TEXTS = (
    "Niamey is the capital of Niger.",
    "Mercury",
    "",
    "The river Niger flows through Guinea, Mali, Niger, Benin and Nigeria to the sea.",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_masked_lm(tmp_path_factory.mktemp("masked_lm"))


def encoder_of(model_dir: Path, **settings: Any) -> VocabularyEncoder:
    chosen = {"max_tokens": 64, "top_k": 20, "head": "masked_lm", **settings}
    return VocabularyEncoder(model_dir, **chosen)


def load_plain(model_dir: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(model_dir, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(model_dir)


def ordinary_ids(tokenizer: Any) -> list[int]:
    return [
        token_id
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
        if not (token.startswith("[") and token.endswith("]") and len(token) > 2)
    ]


def test_elu1p_is_elu_plus_one_with_its_gradient() -> None:
    values = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.elu(values.detach()) + 1
    torch.testing.assert_close(elu1p(values), expected)
    elu1p(values).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.minimum(expected, torch.ones(5)).double())
    assert elu1p(torch.tensor(-90.0)) > 0
    assert elu1p(torch.tensor(1e30)) == 1e30


def space(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(3, 5, 4, generator=generator, dtype=dtype)
    embeddings_VD = torch.randn(7, 4, generator=generator, dtype=dtype)
    bias_V = torch.randn(7, generator=generator, dtype=dtype)
    mask_BT = torch.tensor(
        [[True] * 5, [True, True, False, False, False], [False, True] * 2 + [True]]
    )
    return hidden_BTD, mask_BT, embeddings_VD, bias_V


def plain_max_logits(
    hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, embeddings_VD: torch.Tensor, bias_V: Any
) -> torch.Tensor:
    logits_BTV = torch.einsum("btd,vd->btv", hidden_BTD, embeddings_VD) + bias_V
    return logits_BTV.masked_fill(~mask_BT.unsqueeze(2), -torch.inf).amax(dim=1)


@pytest.mark.parametrize("sparse_gradient", [False, True])
def test_max_logits_and_their_gradients_equal_plain_autograd(
    sparse_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_space, "_CHUNK_COLUMNS", 3)
    hidden, mask, embeddings, bias = space(0, torch.float32)
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    if sparse_gradient:
        weights[:, ::2] = 0
    found = []
    for formula in (max_logits, plain_max_logits):
        leaves = [each.clone().requires_grad_() for each in (hidden, embeddings, bias)]
        pooled = formula(leaves[0], mask, leaves[1], leaves[2])
        (elu1p(pooled) * weights).sum().backward()
        found.append([pooled.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_max_logits_pass_a_finite_difference_check() -> None:
    hidden, mask, embeddings, bias = space(2, torch.float64)
    leaves = [each.requires_grad_() for each in (hidden, embeddings, bias)]
    assert torch.autograd.gradcheck(
        lambda hidden, embeddings, bias: elu1p(max_logits(hidden, mask, embeddings, bias)),
        leaves,
        eps=1e-6,
        atol=1e-7,
    )


def test_a_bias_may_be_absent() -> None:
    hidden, mask, embeddings, _ = space(3, torch.float32)
    plain = plain_max_logits(hidden, mask, embeddings, 0)
    torch.testing.assert_close(max_logits(hidden, mask, embeddings), plain)


def test_sparsified_keeps_the_largest_and_the_tokens() -> None:
    vectors = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    bags = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    expected = torch.tensor([[5.0, 4.0, 0.0, 2.0, 1.0], [0.0, 0.0, 0.0, 4.0, 5.0]])
    torch.testing.assert_close(sparsified(vectors, bags, 2), expected, rtol=0, atol=0)
    torch.testing.assert_close(sparsified(vectors, bags, 0), vectors * bags, rtol=0, atol=0)
    torch.testing.assert_close(sparsified(vectors, bags, 99), vectors, rtol=0, atol=0)


def test_the_columns_are_the_ordinary_tokens(model_dir: Path) -> None:
    encoder, (_, tokenizer) = encoder_of(model_dir), load_plain(model_dir)
    assert encoder.vocabulary.token_ids_V.tolist() == ordinary_ids(tokenizer)
    assert encoder.size == len(tokenizer) - 8


def test_vectors_come_from_the_models_own_logits(model_dir: Path) -> None:
    encoder, (model, tokenizer) = encoder_of(model_dir, top_k=10**6), load_plain(model_dir)
    vectors_BV = encoder.embed(TEXTS, "question").vectors_BD
    for text, vector_V in zip(TEXTS, vectors_BV, strict=True):
        with torch.no_grad():
            logits_TV = model(**tokenizer(text, return_tensors="pt")).logits[0]
        expected = torch.nn.functional.elu(logits_TV[:, ordinary_ids(tokenizer)]).amax(dim=0) + 1
        torch.testing.assert_close(vector_V, expected, rtol=1e-4, atol=1e-5)


def test_the_head_of_vdr_is_a_new_layer_norm(model_dir: Path) -> None:
    encoder = encoder_of(model_dir, head="layer_norm", top_k=10**6)
    model, tokenizer = load_plain(model_dir)
    embeddings = model.get_input_embeddings().weight[ordinary_ids(tokenizer)]
    for text, vector_V in zip(TEXTS, encoder.embed(TEXTS, "passage").vectors_BD, strict=True):
        hidden_TD = model.bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        logits_TV = torch.nn.functional.layer_norm(hidden_TD, (32,)) @ embeddings.T
        expected = torch.nn.functional.elu(logits_TV).amax(dim=0) + 1
        torch.testing.assert_close(vector_V, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["masked_lm", "layer_norm"])
def test_padding_changes_nothing(model_dir: Path, head: str) -> None:
    encoder = encoder_of(model_dir, head=head)
    together = encoder.embed(TEXTS, "passage")
    for row, text in enumerate(TEXTS):
        alone = encoder.embed([text], "passage")
        torch.testing.assert_close(
            together.vectors_BD[row], alone.vectors_BD[0], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(together.bags_BD[row], alone.bags_BD[0])


@pytest.mark.parametrize("top_k", [0, 5, 10**6])
def test_encoded_vectors_have_exactly_their_entries(model_dir: Path, top_k: int) -> None:
    encoder, full = encoder_of(model_dir, top_k=top_k), encoder_of(model_dir, top_k=10**6)
    encoded, bags = encoder.encode(TEXTS, "passage"), encoder.bags(TEXTS).toarray()
    embedded = encoder.embed(TEXTS, "passage")
    np.testing.assert_allclose(encoded.toarray(), embedded.vectors_BD.detach(), rtol=1e-5)
    np.testing.assert_array_equal(bags, embedded.bags_BD)
    assert (encoded.dtype, encoded.shape) == (np.float32, (4, encoder.size))
    for row, vector_V in enumerate(full.embed(TEXTS, "passage").vectors_BD.detach().numpy()):
        largest = np.argsort(-vector_V)[:top_k]
        expected = sorted({*largest.tolist(), *np.flatnonzero(bags[row]).tolist()})
        assert encoded.indices[encoded.indptr[row] : encoded.indptr[row + 1]].tolist() == expected
        np.testing.assert_allclose(encoded[[row]].toarray()[0, expected], vector_V[expected], 1e-5)


def test_batches_of_one_give_the_vectors_of_a_large_batch(model_dir: Path) -> None:
    whole = encoder_of(model_dir).encode(TEXTS, "question")
    parts = encoder_of(model_dir, batch_size=1).encode(TEXTS, "question")
    np.testing.assert_array_equal(whole.indices, parts.indices)
    np.testing.assert_allclose(whole.data, parts.data, rtol=1e-5)
    assert encoder_of(model_dir).encode([], "question").shape == (0, whole.shape[1])


def test_a_bag_is_the_set_of_ordinary_tokens_that_are_read(model_dir: Path) -> None:
    encoder, (_, tokenizer) = encoder_of(model_dir, max_tokens=6), load_plain(model_dir)
    columns = ordinary_ids(tokenizer)
    bags = encoder.bags([*TEXTS, "Niger niger NIGER"]).toarray()
    for text, bag_V in zip([*TEXTS, "Niger niger NIGER"], bags, strict=True):
        ids = tokenizer(text)["input_ids"]
        read = [each for each in ids if each in columns][:4]  # six with [CLS] and [SEP]
        assert np.flatnonzero(bag_V).tolist() == sorted({columns.index(each) for each in read})
    assert encoder.bags([]).shape == (0, encoder.size)


def test_every_weight_learns_and_dropout_stays_off(model_dir: Path) -> None:
    for head in ("masked_lm", "layer_norm"):
        encoder = encoder_of(model_dir, head=head).train()
        assert not any(module.training for module in encoder.modules())
        encoder.embed(TEXTS, "question").vectors_BD.square().sum().backward()
        lacking = [
            name
            for name, weights in encoder.named_parameters()
            if weights.requires_grad and (weights.grad is None or not weights.grad.any())
        ]
        # A key's bias shifts all attention scores of a query alike, so it has no gradient.
        assert [name for name in lacking if not name.endswith("key.bias")] == []


def test_a_step_changes_vectors_and_identity_and_saving_keeps_them(
    model_dir: Path, tmp_path: Path
) -> None:
    for head in ("masked_lm", "layer_norm"):
        encoder = encoder_of(model_dir, head=head)
        before = encoder.identity
        assert before == encoder_of(model_dir, head=head).identity
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        encoder.embed(TEXTS, "question").vectors_BD.square().mean().backward()
        optimizer.step()
        assert encoder.identity != before
        encoder.save_pretrained(tmp_path / head)
        loaded = encoder_of(tmp_path / head, head=head)
        assert loaded.identity == encoder.identity
        assert loaded.bags_identity == encoder.bags_identity
        ours, theirs = (each.encode(TEXTS, "question") for each in (encoder, loaded))
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray())
        assert copy.deepcopy(encoder).identity == encoder.identity
    with pytest.raises(ConfigError, match=r"saved with a LayerNorm.*vocabulary_head to layer_norm"):
        encoder_of(tmp_path / "layer_norm")


def test_identity_covers_what_decides_the_vectors(model_dir: Path, tmp_path: Path) -> None:
    encoders = [
        encoder_of(model_dir),
        encoder_of(model_dir, top_k=21),
        encoder_of(model_dir, head="layer_norm"),
        encoder_of(model_dir, max_tokens=63),
        encoder_of(save_tiny_masked_lm(tmp_path / "other", seed=1)),
    ]
    assert len({encoder.identity for encoder in encoders}) == len(encoders)
    assert len({encoder.bags_identity for encoder in encoders}) == 2  # max_tokens alone


def test_an_encoder_each_starts_alike_and_learns_alone(model_dir: Path, tmp_path: Path) -> None:
    encoder = encoder_of(model_dir, tied=False)
    start = encoder_of(model_dir).encode(TEXTS, "question").toarray()
    for role in ("question", "passage"):
        np.testing.assert_array_equal(encoder.encode(TEXTS, role).toarray(), start)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    encoder.embed(TEXTS, "question").vectors_BD.square().mean().backward()
    optimizer.step()
    assert not np.array_equal(encoder.encode(TEXTS, "question").toarray(), start)
    np.testing.assert_array_equal(encoder.encode(TEXTS, "passage").toarray(), start)
    encoder.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["passage", "question"]
    assert has_encoder_each(tmp_path / "saved")
    assert not has_encoder_each(model_dir)
    loaded = encoder_of(tmp_path / "saved", tied=False)
    assert loaded.identity == encoder.identity
    for role in ("question", "passage"):
        expected = encoder.encode(TEXTS, role).toarray()
        np.testing.assert_array_equal(loaded.encode(TEXTS, role).toarray(), expected)
    with pytest.raises(ConfigError, match="separate encoders for questions and passages"):
        encoder_of(tmp_path / "saved")


def test_weights_that_are_no_numbers_are_refused(model_dir: Path) -> None:
    encoder = encoder_of(model_dir)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="the vector of 'Mercury' is not finite"):
        encoder.encode(["Mercury"], "passage")


def save_architecture(directory: Path, kind: str, **settings: Any) -> Path:
    import transformers

    directory.mkdir()
    tokenizer = save_word_pieces(directory)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "DistilBert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **{**sizes, **settings}
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DistilBert", {}),
        ("Roberta", {"intermediate_size": 64}),
        ("Electra", {"intermediate_size": 64, "embedding_size": 16}),
        ("ModernBert", {"intermediate_size": 64, "cls_token_id": 4, "sep_token_id": 5}),
    ],
)
def test_other_architectures(tmp_path: Path, kind: str, settings: dict[str, int]) -> None:
    model_dir = save_architecture(tmp_path / kind, kind, **settings)
    test_vectors_come_from_the_models_own_logits(model_dir)


def test_a_head_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    mobile = save_architecture(tmp_path / "mobile", "MobileBert", embedding_size=16)
    with pytest.raises(ConfigError, match=f"prediction head of {mobile} cannot be used"):
        encoder_of(mobile)
    electra = save_architecture(
        tmp_path / "electra", "Electra", embedding_size=16, intermediate_size=64
    )
    with pytest.raises(ConfigError, match="have 32 numbers, its word embeddings 16"):
        encoder_of(electra, head="layer_norm")


def headless(directory: Path) -> Path:
    from transformers import BertModel

    model, tokenizer = load_plain(save_tiny_masked_lm(directory / "whole"))
    BertModel(model.config).save_pretrained(directory / "headless")
    tokenizer.save_pretrained(directory / "headless")
    return directory / "headless"


def no_masked_lm(directory: Path) -> Path:
    return save_tiny_llama(directory / "llama")


def other_tokenizer(directory: Path) -> Path:
    model_dir = save_tiny_masked_lm(directory / "model")
    save_word_pieces(model_dir, num_tokens=200)
    return model_dir


def no_tokenizer(directory: Path) -> Path:
    model_dir = save_tiny_masked_lm(directory / "model")
    for path in model_dir.glob("tokenizer*"):
        path.unlink()  # transformers then makes one up that knows the special tokens alone
    return model_dir


def nothing(directory: Path) -> Path:
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (headless, r"is missing the weights cls\.predictions.*with its prediction head"),
        (no_masked_lm, "has no masked language model that transformers can load"),
        (
            other_tokenizer,
            r"has 200 tokens, but the model has \d+ word embeddings; use the tokenizer",
        ),
        (no_tokenizer, r"has 5 tokens, but the model has \d+ word embeddings"),
        (nothing, "has no tokenizer that transformers can load"),
    ],
)
def test_what_is_no_masked_language_model_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_of(make(tmp_path))


def test_more_tokens_than_the_model_reads_are_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder_max_tokens is 129.*at most 128 tokens"):
        encoder_of(model_dir, max_tokens=129)


def test_the_built_in_model(tmp_path: Path) -> None:
    encoder = encoder_of(resolve_model(BUILTIN_VOCABULARY_ENCODER, tmp_path), top_k=768)
    assert encoder.size == 30522 - 999
    assert encoder.vocabulary.token_ids_V[[0, -1]].tolist() == [999, 30521]
    question = encoder.encode(["What is the capital of Niger?"], "question")
    passages = encoder.encode(["Niamey is the capital of Niger.", "How to bake bread"], "passage")
    scores = (passages @ question.T).toarray()[:, 0]
    assert scores[0] > 2 * scores[1]
    assert question.nnz <= 768 + 7
