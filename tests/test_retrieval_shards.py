"""Parts of the vectors, searched alone and merged, give what one index over all of them gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.config import RetrievalConfig, RunConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import ConfigError, IndexMismatchError, RetrievalError
from rlrag.records import Passage
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.dense.encoder import EncoderIdentity
from rlrag.retrieval.dense.search import DenseRetriever, ShardedDenseRetriever
from rlrag.retrieval.dense.shards import ShardSource, VectorShard, merge, shard_sources
from rlrag.retrieval.manifest import Manifest
from rlrag.retrieval.protocol import Hits
from rlrag.retrieval.trainable.protocol import Role

NUM_PASSAGES, SIZE = 203, 8


class FewVectors:
    """Encodes a text as one of few vectors, so that many passages tie."""

    identity = EncoderIdentity("few", "float32", 99)
    size = SIZE

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        return vectors(len(texts), num_different=5)


class ShardsHere:
    """Searches the parts in this process."""

    def __init__(self, sources: Sequence[ShardSource]) -> None:
        self.shards = [VectorShard(source) for source in sources]

    def search(self, vectors_BD: np.ndarray, k: int) -> list[Hits]:
        return [shard.search(vectors_BD, k) for shard in self.shards]


def vectors(num: int, num_different: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num_different, SIZE)).astype(np.float32)[
        rng.integers(num_different, size=num)
    ]


@pytest.fixture
def vectors_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", vectors(NUM_PASSAGES, num_different=40))
    return tmp_path / "vectors.npy"


def config_of(**fields: object) -> RetrievalConfig:
    return RetrievalConfig.model_validate({"kind": "dense", **fields})


def both(vectors_file: Path, **fields: object) -> tuple[DenseRetriever, DenseRetriever]:
    """One index over everything, and the parts."""
    config = config_of(**fields)
    vectors_PD = np.load(vectors_file, mmap_mode="r")
    sources = shard_sources(vectors_file, len(vectors_PD), config, vectors_file.parent, None)
    one = DenseRetriever(FewVectors(), vectors_PD, config)
    return one, ShardedDenseRetriever(FewVectors(), vectors_PD, config, ShardsHere(sources))


@pytest.mark.parametrize("num_shards", [2, 7, NUM_PASSAGES])
@pytest.mark.parametrize("k", [1, 10, 60, NUM_PASSAGES])
def test_parts_find_what_one_index_finds(vectors_file: Path, num_shards: int, k: int) -> None:
    one, parts = both(vectors_file, num_shards=num_shards)
    asked = vectors(6, num_different=6)
    expected, found = one.search_vectors(asked, k), parts.search_vectors(asked, k)
    np.testing.assert_array_equal(found.rows_BK, expected.rows_BK)
    np.testing.assert_array_equal(found.scores_BK, expected.scores_BK)


def test_scores_do_not_depend_on_the_parts(vectors_file: Path) -> None:
    one, parts = both(vectors_file, num_shards=3)
    rows_BN = np.array([[0, 202, 68], [67, 5, 135]])
    questions = ["first", "second"]
    np.testing.assert_array_equal(one.scores(questions, rows_BN), parts.scores(questions, rows_BN))


def test_more_hits_than_passages_are_refused(vectors_file: Path) -> None:
    parts = both(vectors_file, num_shards=3)[1]
    with pytest.raises(ConfigError, match="204 candidates were requested from a corpus of 203"):
        parts.search_vectors(vectors(1, 1), NUM_PASSAGES + 1)


def test_no_question_has_no_hits(vectors_file: Path) -> None:
    found = both(vectors_file, num_shards=3)[1].search_vectors(np.zeros((0, SIZE), np.float32), 4)
    assert found.rows_BK.shape == (0, 4)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_parts_cover_every_passage_once(num_passages: int, num_shards: int, data: object) -> None:
    config = config_of(num_shards=num_shards)
    if num_shards > num_passages:
        with pytest.raises(ConfigError, match=f"{num_shards}, more than the {num_passages}"):
            shard_sources(Path("v"), num_passages, config, Path("i"), None)
        return
    sources = shard_sources(Path("v"), num_passages, config, Path("i"), None)
    rows = [row for source in sources for row in range(source.first, source.end)]
    assert rows == list(range(num_passages))
    sizes = [source.end - source.first for source in sources]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=6), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_merging_equals_sorting_everything(parts: list[list[float]], k: int) -> None:
    rows = iter(range(100))
    numbered = [[(next(rows), score) for score in part] for part in parts]
    everything = sorted((pair for part in numbered for pair in part), key=lambda p: (-p[1], p[0]))
    hits = []
    for part in numbered:
        best = sorted(part, key=lambda p: (-p[1], p[0]))[:k]
        hits.append(
            Hits(
                np.array([[row for row, _ in best]], np.int64).reshape(1, -1),
                np.array([[score for _, score in best]], np.float32).reshape(1, -1),
            )
        )
    assert merge(hits, k).rows_BK[0].tolist() == [row for row, _ in everything[:k]]


def test_each_part_has_an_approximate_index_of_its_own(vectors_file: Path) -> None:
    config = config_of(index="hnsw", num_shards=2)
    manifest = Manifest("hnsw", "corpus", NUM_PASSAGES)
    place = vectors_file.parent
    sources = shard_sources(vectors_file, NUM_PASSAGES, config, place, manifest)
    assert len({source.index_dir for source in sources}) == 2
    asked = vectors(4, num_different=4)
    found = merge(ShardsHere(sources).search(asked, 5), 5)
    exact = both(vectors_file)[0].search_vectors(asked, 5)
    np.testing.assert_array_equal(found.scores_BK, exact.scores_BK)  # so small a graph is complete
    other = dataclasses.replace(sources[0], manifest=sources[1].manifest)
    with pytest.raises(IndexMismatchError, match="first_row is 0 and not 101"):
        VectorShard(other)


def test_damaged_vectors_are_named(vectors_file: Path) -> None:
    vectors_file.write_bytes(b"no vectors")
    source = shard_sources(vectors_file, NUM_PASSAGES, config_of(), vectors_file.parent, None)[0]
    with pytest.raises(IndexMismatchError, match=r"vectors\.npy is damaged"):
        VectorShard(source)


def test_impossible_configurations_are_refused(tmp_path: Path) -> None:
    corpus = MemoryCorpus([Passage("a", "A", "one"), Passage("b", "B", "two")])
    with pytest.raises(ValueError, match=r"without retrieval\.encoder there are no vectors"):
        RetrievalConfig(kind="bm25", encoder=None, num_shards=2)
    with pytest.raises(ValueError, match="'local' runs without Ray, which searches shards"):
        RunConfig.model_validate(
            {"retrieval": {"num_shards": 2}, "training": {"launcher": "local"}}
        )
    with pytest.raises(ConfigError, match="which this program does not use"):
        open_retrievers(corpus, config_of(num_shards=2, num_candidates=1), tmp_path, FewVectors())


def test_an_actor_that_ray_ended_for_its_memory_is_named(
    vectors_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import OutOfMemoryError

    from rlrag import shard_actors

    def get(answer: object) -> Hits:
        raise OutOfMemoryError("the node runs low on memory")

    made = SimpleNamespace(search=SimpleNamespace(remote=lambda vectors, k: "answer"))
    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda source: made))
    ray = SimpleNamespace(
        remote=lambda _: options, put=id, get=get, wait=lambda refs, **_: (refs, [])
    )
    monkeypatch.setattr(shard_actors, "ray", ray)
    config = config_of(num_shards=2)
    sources = shard_sources(vectors_file, NUM_PASSAGES, config, vectors_file.parent, None)
    with pytest.raises(RetrievalError, match=r"passages 0 to 101 has ended 4 times.*low on memory"):
        shard_actors.ShardActors(sources).search(vectors(1, 1), 10)


@pytest.mark.usefixtures("cluster")
def test_actors_find_the_same_and_come_back_when_they_are_killed(vectors_file: Path) -> None:
    import os
    import signal
    import time

    import ray

    from rlrag.shard_actors import ShardActors

    config = config_of(num_shards=2)
    sources = shard_sources(vectors_file, NUM_PASSAGES, config, vectors_file.parent, None)
    actors = ShardActors(sources, cpus=0.1, timeout_s=120)
    asked = vectors(3, num_different=3)
    expected = both(vectors_file)[0].search_vectors(asked, 10)
    found = merge(actors.search(asked, 10), 10)
    np.testing.assert_array_equal(found.rows_BK, expected.rows_BK)

    pid = ray.get(actors._actors[0].__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    os.kill(pid, signal.SIGKILL)
    np.testing.assert_array_equal(merge(actors.search(asked, 10), 10).rows_BK, expected.rows_BK)

    damaged = [dataclasses.replace(sources[0], vectors_file=vectors_file.with_name("none.npy"))]
    with pytest.raises(IndexMismatchError, match=r"none\.npy is damaged"):
        ShardActors(damaged, cpus=0.1, timeout_s=120).search(asked, 10)
    started = time.monotonic()
    with pytest.raises(RetrievalError, match="passages 0 to 101, the index of passages 101 to 203"):
        ShardActors(sources, cpus=99.0, timeout_s=0.5).search(asked, 10)
    assert time.monotonic() - started < 30
