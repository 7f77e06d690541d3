from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny_encoder

from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage
from rlrag.retrieval.cut_tokens import cut_share
from rlrag.retrieval.encoder import TextEncoder


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


def test_an_encoder_counts_what_it_does_not_read(tmp_path: Path) -> None:
    save_tiny_encoder(tmp_path / "encoder")
    encoder = TextEncoder(tmp_path / "encoder", "float32", 8, 4)
    short, long = encoder.count_tokens(["river", "river " * 30])
    assert short < 8 < 30 <= long
    assert "_for_passages" not in vars(encoder)  # the model itself is not loaded
