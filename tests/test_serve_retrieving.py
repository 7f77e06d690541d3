"""How far filters look, and which versions share what they retrieve with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from serve_bundles import NUM_CANDIDATES, make_bundle
from tiny_models import save_tiny_encoder

from rlrag.bundle import bundle_version
from rlrag.errors import RequestError
from rlrag.pipeline import Library
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.protocol import Hits, best_rows
from rlrag.serving import libraries
from rlrag.serving.records import Filters, Retrieved
from rlrag.serving.retrieving import Ask, RetrieverPart

NUM_PASSAGES = 60
QUESTION = "what does the lamp hold?"


class Scored:
    """Gives every question the same scores, and remembers how deep it was searched."""

    def __init__(self, name: str, scores_P: Sequence[float]) -> None:
        self.name = name
        self.depths: list[int] = []
        self._scores_P = np.array(scores_P, dtype=np.float32)

    def search(self, questions: Sequence[str], k: int) -> Hits:
        self.depths.append(k)
        rows_BK = np.tile(best_rows(self._scores_P, k), (len(questions), 1))
        return Hits(rows_BK, self._scores_P[rows_BK])

    def scores(self, questions: Sequence[str], rows_BN: np.ndarray) -> np.ndarray:
        return self._scores_P[rows_BN]


class Opened:
    """Opens libraries as `open_library` does, or with the retrievers it has, and counts them."""

    def __init__(self, given: RetrieverSet | None = None) -> None:
        self.num_opened = 0
        self._given = given
        self._open = libraries.open_library

    def __call__(self, *arguments: object) -> Library:
        self.num_opened += 1
        library = self._open(*arguments)
        return replace(library, retrievers=self._given) if self._given else library


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(openrag_files, cache_dir, tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("b") / "bundle", openrag_files, cache_dir, seed=1)


@pytest.fixture
def opened(monkeypatch) -> Opened:
    counter = Opened()
    monkeypatch.setattr(libraries, "open_library", counter)
    return counter


def load(part: RetrieverPart, directory: Path) -> str:
    """Under its own version, which it returns."""
    version = bundle_version(directory)
    part.load(version, directory)
    return version


def asked(part: RetrieverPart, version: str, wanted: int | None = None, **filters):
    (found,) = part.retrieve(version, [Ask(QUESTION, wanted, Filters(**filters))])
    return found


def scored_part(monkeypatch, bundle: Path, max_filtered: int, *ranked: Scored) -> RetrieverPart:
    """A part whose ranking is that of the first, over passages without vectors."""
    retrievers = RetrieverSet(
        primary=ranked[0],
        components={one.name: one for one in ranked[1:]} or {ranked[0].name: ranked[0]},
        encoder=None,
        passage_vectors=np.zeros((NUM_PASSAGES, 0), dtype=np.float32),
        manifest_hash="",
    )
    monkeypatch.setattr(libraries, "open_library", Opened(retrievers))
    part = RetrieverPart(max_filtered=max_filtered)
    load(part, bundle)
    ranked[0].depths.clear()
    return part


@pytest.mark.parametrize(("max_filtered", "depths"), [(3, [3]), (30, [20, 30])])
def test_a_filter_that_nothing_passes_is_searched_for_down_to_the_bound(
    monkeypatch, bundle, max_filtered, depths
):
    scored = Scored("bm25", range(NUM_PASSAGES))
    part = scored_part(monkeypatch, bundle, max_filtered, scored)
    found = asked(part, bundle_version(bundle), title_contains="no such title")
    assert isinstance(found, RequestError)
    assert f"leave 0 of the first {max_filtered} passages" in str(found)
    assert "limits.max_filtered" in str(found)
    assert scored.depths == depths


def test_a_bound_beyond_the_corpus_leaves_nothing_out(monkeypatch, bundle):
    scored = Scored("bm25", range(NUM_PASSAGES))
    part = scored_part(monkeypatch, bundle, 10 * NUM_PASSAGES, scored)
    found = asked(part, bundle_version(bundle), title_contains="no such title")
    assert f"leave 0 of {NUM_PASSAGES} passages" in str(found)
    assert scored.depths == [20, NUM_PASSAGES]


def test_a_question_that_matches_no_passage_is_counted(monkeypatch, bundle, caplog):
    part = scored_part(monkeypatch, bundle, 20, Scored("bm25", [0] * NUM_PASSAGES))
    asked(part, bundle_version(bundle), ids=("unknown",))  # among named passages nothing is odd
    assert "match no passage" not in caplog.text
    asked(part, bundle_version(bundle))
    assert "1 of 1 questions match no passage" in caplog.text


def test_named_passages_are_looked_up_however_far_down_they_stand(monkeypatch, bundle):
    scored = Scored("bm25", range(NUM_PASSAGES))
    part = scored_part(monkeypatch, bundle, 20, scored)
    corpus = part._loaded[bundle_version(bundle)].library.corpus
    ids = (*(corpus[row].id for row in (0, 2, 1, 2)), "unknown")
    found = asked(part, bundle_version(bundle), 2, ids=ids, exclude_ids=ids[1:2])
    assert [passage.id for passage in found.passages] == [ids[2], ids[0]]
    assert found.scores_NC.tolist() == [[1.0], [0.0]]
    assert scored.depths == []
    few = asked(part, bundle_version(bundle), 4, ids=ids)
    assert f"leave 3 of {NUM_PASSAGES} passages, but num_candidates is 4" in str(few)


def test_named_passages_that_fusion_scores_alike_are_told_apart(monkeypatch, bundle):
    fused = Scored("hybrid", [0.5, *[0.0] * (NUM_PASSAGES - 1)])
    words = Scored("bm25", [0.0, 0.0, 3.0, 3.0, *[0.0] * (NUM_PASSAGES - 4)])
    meaning = Scored("dense", np.linspace(0, 1, NUM_PASSAGES))
    part = scored_part(monkeypatch, bundle, 20, fused, words, meaning)
    corpus = part._loaded[bundle_version(bundle)].library.corpus
    ids = tuple(corpus[row].id for row in range(5))
    found = asked(part, bundle_version(bundle), 5, ids=ids)
    assert [corpus.row_of(passage.id) for passage in found.passages] == [0, 3, 2, 4, 1]
    assert found.scores_NC.shape == (5, 3)


def test_named_passages_come_as_a_search_among_them_brings_them(bundle):
    part = RetrieverPart()
    version = load(part, bundle)
    corpus = part._loaded[version].library.corpus
    ids = [passage.id for passage in corpus]
    named = asked(part, version, ids=tuple(ids[::4]))
    searched = asked(part, version, exclude_ids=tuple(set(ids) - set(ids[::4])))
    assert isinstance(named, Retrieved)
    assert len(named.passages) == NUM_CANDIDATES
    assert named.passages == searched.passages
    for field in ("scores_NC", "question_vector_D", "passage_vectors_ND"):
        assert np.allclose(getattr(named, field), getattr(searched, field), atol=1e-5)


def test_equal_encoders_over_one_corpus_are_opened_once(openrag_files, cache_dir, tmp_path, opened):
    encoder = openrag_files / "encoder"
    part = RetrieverPart()
    for seed in (1, 2):
        load(part, make_bundle(tmp_path / f"{seed}", openrag_files, cache_dir, seed, encoder))
    load(part, make_bundle(tmp_path / "untuned", openrag_files, cache_dir, seed=3))
    assert (len(part.loaded()), opened.num_opened) == (3, 1)


def test_a_bundle_at_the_path_of_another_gets_its_own_encoder(
    openrag_files, cache_dir, tmp_path, opened
):
    part = RetrieverPart()
    found = []
    for seed in (1, 2):
        encoder = save_tiny_encoder(tmp_path / f"encoder-{seed}", seed)
        place = make_bundle(tmp_path / "current", openrag_files, cache_dir, seed, encoder)
        found.append(asked(part, load(part, place), 1).question_vector_D)
    assert opened.num_opened == 2
    assert not np.allclose(*found, atol=1e-2)


def test_a_corpus_that_was_changed_in_place_is_read_again(
    bundle, openrag_files, cache_dir, tmp_path
):
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(openrag_files / "corpus.jsonl", corpus)
    part = RetrieverPart(str(corpus))
    old = load(part, bundle)
    with corpus.open("a") as file:
        file.write(json.dumps({"id": "new", "contents": "lamp\nthe lamp holds a new thing"}) + "\n")
    new = load(part, make_bundle(tmp_path / "other", openrag_files, cache_dir, seed=2))
    assert [passage.id for passage in asked(part, new, 1, ids=("new",)).passages] == ["new"]
    assert isinstance(asked(part, old, 1, ids=("new",)), RequestError)


def test_a_passage_that_is_added_to_a_corpus_in_use_is_noticed(bundle, openrag_files, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    shutil.copy(openrag_files / "corpus.jsonl", corpus)
    part = RetrieverPart(str(corpus))
    version = load(part, bundle)
    assert part.changed_corpus(version) is None
    with corpus.open("a") as file:
        file.write(json.dumps({"id": "new", "contents": "New\nIt was not there."}) + "\n")
    assert part.changed_corpus(version) == str(corpus)
    corpus.unlink()
    assert part.changed_corpus(version) == str(corpus)
    assert part.changed_corpus("another") is None
