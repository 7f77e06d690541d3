from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, IndexMismatchError, SetupError
from rlrag.records import Passage
from rlrag.retrieval.build import RetrieverSet, open_retrievers
from rlrag.retrieval.dense.encoder import EncoderIdentity
from rlrag.retrieval.manifest import Manifest, check_manifest, staged_directory
from rlrag.retrieval.trainable.protocol import Role


class TextSeedEncoder:
    """One random vector a text, seeded by the text; counts the texts that it encodes."""

    size = 8

    def __init__(
        self, weights_hash: str = "a", dtype: str = "float32", max_tokens: int = 9
    ) -> None:
        self.identity = EncoderIdentity(weights_hash, dtype, max_tokens)
        self.num_texts = 0

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        self.num_texts += len(texts)
        seeds = [zlib.crc32(text.encode()) for text in texts]
        vectors_BD = np.array(
            [np.random.default_rng(seed).standard_normal(self.size) for seed in seeds]
        ).reshape(len(texts), self.size)
        lengths = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        return (vectors_BD / lengths).astype(np.float32)


def corpus_of(num_passages: int, word: str = "city") -> MemoryCorpus:
    return MemoryCorpus(Passage(f"p{i}", f"{word}{i}", f"{word} text") for i in range(num_passages))


def opened(
    cache_dir: Path, corpus: MemoryCorpus | None = None, encoder: Any = None, **settings: Any
) -> RetrieverSet:
    config = RetrievalConfig.model_validate(settings)
    return open_retrievers(
        corpus or corpus_of(300), config, cache_dir, encoder=encoder or TextSeedEncoder()
    )


def directories(cache_dir: Path) -> dict[str, Path]:
    found = sorted((cache_dir / "indexes").iterdir())
    assert not any(path.name.startswith(".") for path in found)
    return {path.name.split("-")[0]: path for path in found}


EXPECTED = Manifest(
    kind="hnsw",
    corpus_hash="c0ffee",
    num_passages=7,
    encoder="name",
    encoder_identity=EncoderIdentity("weights", "float32", 160),
    parameters={"links": 32},
)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(EXPECTED, kind="ivfpq"), "kind is 'hnsw' and not 'ivfpq'"),
        (replace(EXPECTED, corpus_hash="dead"), "corpus_hash is 'c0ffee' and not 'dead'"),
        (replace(EXPECTED, num_passages=8), "num_passages is 7 and not 8"),
        (replace(EXPECTED, parameters={"links": 16}), "parameters.links is 32 and not 16"),
        (replace(EXPECTED, parameters={}), "parameters.links is 32 and not None"),
        (
            replace(EXPECTED, encoder_identity=EncoderIdentity("other", "bfloat16", 128)),
            "encoder_weights_hash is 'weights' and not 'other'; encoder_dtype is 'float32' and "
            "not 'bfloat16'; encoder_max_tokens is 160 and not 128",
        ),
        (replace(EXPECTED, encoder_identity=None), "encoder_dtype is 'float32' and not None"),
    ],
)
def test_each_differing_field_is_named_with_both_values(
    tmp_path: Path, other: Manifest, message: str
) -> None:
    with staged_directory(tmp_path / "index", EXPECTED):
        pass
    check_manifest(tmp_path / "index", EXPECTED)
    with pytest.raises(IndexMismatchError, match=re.escape(message)) as caught:
        check_manifest(tmp_path / "index", other)
    assert "delete the directory" in str(caught.value)
    assert other.directory_name != EXPECTED.directory_name


def test_the_same_weights_under_another_name_belong(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "index", EXPECTED):
        pass
    check_manifest(tmp_path / "index", replace(EXPECTED, encoder="/some/path"))
    content = json.loads((tmp_path / "index" / "manifest.json").read_text())
    assert content["encoder"] == "name"
    assert content["libraries"]["numpy"] == np.__version__


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "index", EXPECTED):
        pass
    path = tmp_path / "index" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 0'))
    with pytest.raises(IndexMismatchError, match="format_version is 0 and not 2"):
        check_manifest(tmp_path / "index", EXPECTED)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"compared": 3}'])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "index").mkdir()
    if text is not None:
        (tmp_path / "index" / "manifest.json").write_text(text)
    with pytest.raises(
        IndexMismatchError, match=r"manifest\.json is missing or unreadable.*delete"
    ):
        check_manifest(tmp_path / "index", EXPECTED)


def test_whoever_may_read_the_cache_may_read_what_is_built(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    mode = (tmp_path / "ordinary").stat().st_mode
    found = opened(tmp_path, kind="hybrid", index="hnsw").index_dirs
    assert [place.stat().st_mode for place in found] == [mode] * 3


def test_a_directory_that_was_not_finished_does_not_appear(tmp_path: Path) -> None:
    def stop_in_the_middle() -> None:
        with staged_directory(tmp_path / "index", EXPECTED) as staging:
            (staging / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_in_the_middle()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match=r"cannot write .*index: No space left.*free space"),
        staged_directory(tmp_path / "index", EXPECTED),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_a_process_that_was_first_stays(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "index", EXPECTED) as staging:
        (staging / "file").write_text("second")
        with staged_directory(tmp_path / "index", EXPECTED) as other:
            (other / "file").write_text("first")
    assert (tmp_path / "index" / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_second_opening_builds_nothing(tmp_path: Path) -> None:
    first = opened(tmp_path, kind="hybrid", index="hnsw")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    encoder = TextSeedEncoder()
    second = opened(tmp_path, encoder=encoder, kind="hybrid", index="hnsw")
    assert encoder.num_texts == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
    assert first.manifest_hash == second.manifest_hash
    hits = [each.primary.search(["city7", "text"], 5) for each in (first, second)]
    np.testing.assert_array_equal(hits[0].rows_BK, hits[1].rows_BK)
    assert set(directories(tmp_path)) == {"bm25", "vectors", "hnsw"}


def test_a_changed_parameter_builds_its_own_part_only(tmp_path: Path) -> None:
    opened(tmp_path, kind="hybrid")
    encoder = TextSeedEncoder()
    opened(tmp_path, encoder=encoder, kind="hybrid", bm25_k1=1.2)
    assert encoder.num_texts == 0
    names = sorted(path.name.split("-")[0] for path in (tmp_path / "indexes").iterdir())
    assert names == ["bm25", "bm25", "vectors"]


def test_an_index_of_other_words_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = opened(tmp_path, kind="bm25")
    monkeypatch.setattr("rlrag.retrieval.build.WORDS_VERSION", 99)
    assert opened(tmp_path, kind="bm25").manifest_hash != before.manifest_hash
    assert len(list((tmp_path / "indexes").glob("bm25-*"))) == 2


@pytest.mark.parametrize(
    ("kind", "names", "primary"),
    [
        ("bm25", ("bm25", "dense"), "bm25"),
        ("dense", ("dense",), "dense"),
        ("hybrid", ("hybrid", "bm25", "dense"), "hybrid"),
    ],
)
def test_components(tmp_path: Path, kind: str, names: tuple[str, ...], primary: str) -> None:
    retrievers = opened(tmp_path, kind=kind)
    assert retrievers.score_names == names
    assert retrievers.primary.name == primary
    assert retrievers.passage_vectors.shape == (300, 8)
    assert retrievers.question_vectors(["a", "b"]).shape == (2, 8)


def test_bm25_alone_has_vectors_of_length_zero(tmp_path: Path) -> None:
    config = RetrievalConfig(kind="bm25", encoder=None)
    retrievers = open_retrievers(corpus_of(20), config, tmp_path)
    assert retrievers.score_names == ("bm25",)
    assert retrievers.encoder is None
    assert retrievers.passage_vectors.shape == (20, 0)
    assert retrievers.question_vectors(["a", "b"]).shape == (2, 0)
    with pytest.raises(ConfigError, match=r"retrieval\.encoder is unset"):
        open_retrievers(corpus_of(20), config, tmp_path, encoder=TextSeedEncoder())


def test_manifest_hash_covers_corpus_encoder_and_every_parameter(tmp_path: Path) -> None:
    hashes = [
        opened(tmp_path, kind="hybrid"),
        opened(tmp_path, corpus_of(300, "town"), kind="hybrid"),
        opened(tmp_path, encoder=TextSeedEncoder(weights_hash="b"), kind="hybrid"),
        opened(tmp_path, encoder=TextSeedEncoder(max_tokens=8), kind="hybrid"),
        opened(tmp_path, kind="hybrid", bm25_b=0.5),
        opened(tmp_path, kind="bm25"),
        opened(tmp_path, kind="hybrid", index="hnsw"),
        opened(tmp_path, kind="hybrid", index="ivfpq"),
    ]
    assert len({each.manifest_hash for each in hashes}) == len(hashes)
    # Settings that no part of the flat index reads change nothing.
    same = opened(tmp_path, kind="hybrid", num_candidates=3)
    assert same.manifest_hash == hashes[0].manifest_hash


@pytest.mark.parametrize("part", ["bm25", "vectors", "ivfpq"])
def test_an_index_of_another_corpus_in_its_place_is_refused(tmp_path: Path, part: str) -> None:
    opened(tmp_path / "ours", kind="hybrid", index="ivfpq")
    opened(tmp_path / "theirs", corpus_of(300, "town"), kind="hybrid", index="ivfpq")
    ours, theirs = directories(tmp_path / "ours")[part], directories(tmp_path / "theirs")[part]
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    with pytest.raises(
        IndexMismatchError, match=f"index {ours} was built from something else.*corpus_hash is"
    ):
        opened(tmp_path / "ours", kind="hybrid", index="ivfpq")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("bm25", "data.csc.index.npy"),
        ("bm25", "vocab.index.json"),
        ("vectors", "vectors.npy"),
        ("ivfpq", "index.faiss"),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_truncated_file_is_refused_with_a_way_out(
    tmp_path: Path, part: str, name: str, missing: bool
) -> None:
    opened(tmp_path, kind="hybrid", index="ivfpq")
    file = directories(tmp_path)[part] / name
    whole = file.read_bytes()
    if missing:
        file.unlink()
    else:
        file.write_bytes(whole[:-7])
    message = f"{file} is damaged: .*not {len(whole)}; delete {file.parent} and run again"
    with pytest.raises(IndexMismatchError, match=message):
        opened(tmp_path, kind="hybrid", index="ivfpq")
    shutil.rmtree(file.parent)
    opened(tmp_path, kind="hybrid", index="ivfpq")


@pytest.mark.parametrize(
    ("part", "name"),
    [("bm25", "params.index.json"), ("vectors", "vectors.npy"), ("ivfpq", "index.faiss")],
)
def test_a_file_of_the_right_size_with_other_bytes_is_refused(
    tmp_path: Path, part: str, name: str
) -> None:
    opened(tmp_path, kind="hybrid", index="ivfpq")
    file = directories(tmp_path)[part] / name
    whole = file.read_bytes()
    file.write_bytes(b"?" * 64 + whole[64:])
    with pytest.raises(IndexMismatchError, match=f"{file} is damaged"):
        opened(tmp_path, kind="hybrid", index="ivfpq")


def test_more_candidates_than_passages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"12 candidates .* corpus of 11 passages"):
        opened(tmp_path, corpus_of(11), num_candidates=12)
    assert list(tmp_path.iterdir()) == []


def test_ivfpq_with_too_few_vectors_is_refused_before_encoding(tmp_path: Path) -> None:
    encoder = TextSeedEncoder()
    with pytest.raises(ConfigError, match="at least 256 vectors, but there are 150 in a shard"):
        opened(tmp_path, encoder=encoder, kind="dense", index="ivfpq", num_shards=2)
    assert encoder.num_texts == 0
