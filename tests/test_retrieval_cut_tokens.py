from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny_encoder, save_tiny_llama

from rlrag.config import SelectorConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage
from rlrag.retrieval.cut_tokens import cut_share
from rlrag.retrieval.dense.encoder import TextEncoder
from rlrag.selection.unread import count_unread, unread_warning


def corpus_of(*num_words: int) -> MemoryCorpus:
    return MemoryCorpus(
        Passage(str(row), "", " ".join(["word"] * num)) for row, num in enumerate(num_words)
    )


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_share_of_tokens_beyond_the_longest_text(caplog: pytest.LogCaptureFixture) -> None:
    assert cut_share(corpus_of(4, 10, 6), count_words, 5) == 6 / 20
    assert "30.0 % of the tokens of 3 sampled passages, in 2 of them" in caplog.text
    caplog.clear()
    assert cut_share(corpus_of(4, 10), count_words, 10) == 0
    assert cut_share(corpus_of(*[10] * 9, 11), count_words, 10) == 1 / 101  # hardly any
    assert caplog.messages == []


def test_a_large_corpus_is_sampled_evenly() -> None:
    seen: list[str] = []

    def count(texts: list[str]) -> list[int]:
        seen.extend(texts)
        return count_words(texts)

    assert cut_share(corpus_of(*[1, 3] * 2000), count, 2) == 0  # every fourth, the short ones
    assert len(seen) == 1000


@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder", "listwise_lm"])
def test_a_selector_counts_what_it_does_not_read(kind: str, tmp_path: Path) -> None:
    save = save_tiny_llama if kind == "listwise_lm" else save_tiny_encoder
    save(tmp_path / "model")
    config = SelectorConfig(kind=kind, model=str(tmp_path / "model"), max_tokens=24)
    assert config.reads_texts
    cut = count_unread(config, tmp_path / "model", ["river", "river " * 60])
    assert (cut.num_sampled, cut.num_passages) == (2, 1)
    assert cut.share > 0.3
    warning = unread_warning(cut)
    assert warning is not None
    assert warning.startswith("the selector reads 24 tokens of a passage: ")
    assert "raise selector.max_tokens" in warning
    roomy = config.model_copy(update={"max_tokens": 9000})
    assert unread_warning(count_unread(roomy, tmp_path / "model", ["river " * 60])) is None


@pytest.mark.parametrize("kind", ["features", "some.module:policy"])
def test_other_selectors_are_not_counted(kind: str) -> None:
    assert not SelectorConfig(kind=kind).reads_texts


def test_an_encoder_counts_what_it_does_not_read(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "encoder")
    encoder = TextEncoder(tmp_path / "encoder", "float32", 8, 4)
    short, long = encoder.count_tokens(["river", "river " * 30])
    assert short < 8 < 30 <= long
    assert "_for_passages" not in vars(encoder)  # the model itself is not loaded
