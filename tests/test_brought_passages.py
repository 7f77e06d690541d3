"""Retrievers that bring the texts of their passages, with a corpus and without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openrag_runs import make_corpus
from test_retrieval_tables import CORPUS, QUESTIONS, WordEncoder

import rlrag
from rlrag.bundle import bundle_version
from rlrag.bundle_files import read_bundle
from rlrag.cli import export, train
from rlrag.config import RetrievalConfig, RunConfig
from rlrag.data.corpus import NO_CORPUS, Corpus, ExtendedCorpus
from rlrag.environment.document_selection import DocumentSelectionEnv
from rlrag.errors import ConfigError, RequestError, RetrievalError, RunDirectoryError
from rlrag.evaluation.question_records import read_questions
from rlrag.pipeline import Library, load_pipeline
from rlrag.records import Passage
from rlrag.retrieval import tables
from rlrag.retrieval.build import RetrieverSet, open_retrievers
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.plugin import PluginRetriever
from rlrag.serving import retrieving
from rlrag.serving.libraries import OpenedLibrary
from rlrag.serving.records import Filters
from rlrag.serving.retrieving import Ask, RetrieverPart
from rlrag.serving.selecting import Choice, SelectorPart
from rlrag.testing import check_retriever

SOURCE = """
import json
from pathlib import Path
from rlrag.data.readers import read_passages
from rlrag.data.checks import Tally
from rlrag.records import Passage

class Excerpts:
    '''Makes up passages that repeat the question.'''
    num_asked = 0
    def __init__(self, corpus=None, few: int = 99, prefix: bool = True):
        self.corpus, self.few, self.prefix = corpus, few, prefix
    def search(self, questions, k):
        type(self).num_asked += len(questions)
        return [self.found(question, k)[: self.few] for question in questions]
    def found(self, question, k):
        ids = [f"{question if self.prefix else ''}#{n}" for n in range(k)]
        return [
            (Passage(id, f"Page {n}", f"{n} is about {question}"), 1.0 / (1 + n))
            for n, id in enumerate(ids)
        ]

class Mixed:
    '''Its first passage is the corpus's, the second the same with its text, the others are new.'''
    def __init__(self, corpus): self.corpus = corpus
    def search(self, questions, k):
        new = [Passage(f"new{n}", "", f"river{n} town") for n in range(k - 2)]
        found = [self.corpus[1].id, self.corpus[0], *new]
        return [[(p, -float(n)) for n, p in enumerate(found[:k])] for _ in questions]

class Wrong:
    passage = None
    def search(self, questions, k):
        return [[(self.passage, 1.0), (Passage("b", "", "text"), 0.5)] for _ in questions]

class Library:
    '''Finds by words what lies in a file that is no corpus of the run.'''
    def __init__(self, file: str):
        self.passages = list(read_passages(Path(file), Tally()))
    def search(self, questions, k):
        def ranked(question):
            asked = set(question.lower().split())
            words = [set(passage.contents.lower().split()) for passage in self.passages]
            scored = [(float(len(asked & w)), p) for w, p in zip(words, self.passages)]
            best = sorted(scored, key=lambda found: (-found[0], found[1].id))[:k]
            return [(passage, score) for score, passage in best]
        return [ranked(question) for question in questions]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "bringing.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "bringing"
    sys.modules.pop("bringing", None)


def own(kind: str, **settings: Any) -> RetrievalConfig:
    return RetrievalConfig.model_validate(
        {"kind": kind, "encoder": None, "num_candidates": 4, **settings}
    )


def opened(config: RetrievalConfig, corpus: Corpus, cache_dir: Path) -> RetrieverSet:
    encoder = WordEncoder() if config.encoder else None
    return open_retrievers(corpus, config, cache_dir, encoder=encoder)


def table(config: RetrievalConfig, corpus: Corpus, cache_dir: Path) -> CandidateTable:
    retrievers = opened(config, corpus, cache_dir)
    return tables.candidate_table(QUESTIONS, "file", corpus, retrievers, config, cache_dir)


def test_texts_stay_the_same_when_they_are_read_again(module, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK_QUESTIONS", 2)
    config = own(f"{module}:Excerpts", encoder="words")
    first, again = (table(config, NO_CORPUS, tmp_path) for _ in range(2))
    assert sys.modules[module].Excerpts.num_asked == len(QUESTIONS)
    for made in (first, again):
        for row, question in enumerate(QUESTIONS):
            assert [passage.text for passage in made.passages(row)] == [
                f"{n} is about {question.question}" for n in range(4)
            ]
    assert first.corpus.content_hash == again.corpus.content_hash != NO_CORPUS.content_hash
    batches = [made.batch([3, 0]) for made in (first, again)]
    encoder = WordEncoder()
    for batch in batches:
        assert batch.passage_texts[0][2] == f"Page 2\n2 is about {QUESTIONS[3].question}"
        for place in range(2):
            expected = encoder.encode(batch.passage_texts[place])
            assert np.array_equal(batch.passage_vectors_BND[place], expected)
            products = expected @ batch.question_vectors_BD[place]
            assert np.allclose(batch.scores_BNC[place, :, 1], products, atol=1e-6)


def test_an_id_has_one_text_in_a_run_and_in_an_answer_that_of_its_question(module, tmp_path):
    config = own(f"{module}:Excerpts", options=("prefix=no",))
    with pytest.raises(
        RetrievalError,
        match=f"retriever '{module}:Excerpts' returned .* with different texts.*unique id",
    ):
        table(config, NO_CORPUS, tmp_path)
    asked = Library(NO_CORPUS, opened(config, NO_CORPUS, tmp_path)).search(["who", "where"], 2)
    assert [asked.passages(row)[1].text for row in range(2)] == [
        "1 is about who",
        "1 is about where",
    ]


def test_what_the_corpus_has_and_what_it_lacks_stand_side_by_side(module, tmp_path):
    config = own(f"{module}:Mixed", encoder="words", num_candidates=5)
    made = table(config, CORPUS, tmp_path)
    found = made.passages(4)
    assert [passage.id for passage in found] == ["p1", "p0", "new0", "new1", "new2"]
    assert made.rows_QN[4].tolist() == [1, 0, 40, 41, 42]
    assert len(made.corpus) == 43  # equal passages of several questions are one
    batch = made.batch([4])
    expected = WordEncoder().encode([passage.contents for passage in found])
    assert np.array_equal(batch.passage_vectors_BND[0], expected)
    assert np.allclose(
        batch.scores_BNC[0, :, 1], expected @ batch.question_vectors_BD[0], atol=1e-6
    )


def test_more_may_be_found_than_a_small_corpus_has(module, tmp_path):
    config = own(f"{module}:Mixed", num_candidates=60)
    assert table(config, CORPUS, tmp_path).rows_QN.shape == (len(QUESTIONS), 60)


def test_scores_of_words_are_not_there_for_what_no_corpus_has(module, tmp_path):
    with pytest.raises(ConfigError, match=r"returned passage 'new0'.*set retrieval.bm25_scores Fa"):
        table(own(f"{module}:Mixed", bm25_scores=True), CORPUS, tmp_path)


@pytest.mark.parametrize(
    ("passage", "error"),
    [
        (
            "a",
            "the corpus has no passage 'a'; return an id of the corpus, or the passage with",
        ),
        (Passage("a", "title", " \n"), "passage 'a' has an empty text"),
        (Passage("", "", "text"), "needs an id, a title and a text"),
        (Passage("a", None, "text"), "needs an id, a title and a text"),
        (Passage("a", "", "\ud800"), "contains the lone surrogate"),
        (Passage("b", "", "another text"), "a result has the same passage twice"),
        (Passage("p3", "", "mine"), "passage 'p3' has another title or text than in the"),
    ],
)
def test_what_cannot_be_shown_is_one_error(module, passage, error):
    corpus = CORPUS if getattr(passage, "id", "") == "p3" else NO_CORPUS
    wrong = PluginRetriever(corpus, own(f"{module}:Wrong"))
    wrong._part.passage = passage
    with pytest.raises(RetrievalError, match=error) as raised:
        wrong.search(["where?"], 2)
    assert f"retriever '{module}:Wrong', question 'where?'" in str(raised.value)


def test_a_retriever_that_needs_a_corpus_says_so_where_there_is_none(module):
    with pytest.raises(
        ConfigError, match="Mixed' needs a corpus, but the run has none; configure one"
    ):
        PluginRetriever(NO_CORPUS, own(f"{module}:Mixed"))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"retrieval": {"kind": "hybrid"}}, "retrieval.kind 'hybrid' searches one"),
        ({"retrieval": {"bm25_scores": True}}, "retrieval.bm25_scores counts the words of one"),
        ({"retrieval": {"index": "hnsw"}}, "retrieval.index 'hnsw' is built of one"),
        ({"retrieval": {"num_shards": 2}}, "retrieval.num_shards 2 divides one"),
        ({"evaluation": {"systems": ["bm25"]}}, "evaluation.systems bm25 search one"),
        (
            {"algorithm": {"name": "feedback", "log": "log"}},
            "algorithm.log names passages of one by their ids",
        ),
    ],
)
def test_parts_that_search_a_corpus_are_refused_without_one(settings, error):
    retrieval = {"kind": "bringing:Library", **settings.pop("retrieval", {})}
    values = {"data": {"corpus": None}, "retrieval": retrieval, **settings}
    with pytest.raises(ConfigError, match=f"data.corpus is None, but {error}; name a corpus"):
        RunConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(("name", "corpus"), [("Excerpts", NO_CORPUS), ("Mixed", CORPUS)])
def test_they_keep_the_contract_of_retrievers(module, name, corpus):
    check_retriever(PluginRetriever(corpus, own(f"{module}:{name}")), corpus, ["where?", "who?"])


def test_texts_that_change_break_the_contract(module):
    retriever = PluginRetriever(NO_CORPUS, own(f"{module}:Excerpts"))
    search, calls = retriever._part.search, []

    def forgetful(questions, k):
        calls.append(k)
        return [
            [(Passage(p.id, p.title, f"{p.text} {len(calls)}"), score) for p, score in hits]
            for hits in search(questions, k)
        ]

    retriever._part.search = forgetful
    with pytest.raises(AssertionError, match="otherwise, or has other texts, when"):
        check_retriever(retriever, NO_CORPUS, ["where?", "who?"])


def test_the_environment_shows_the_texts(module, tmp_path):
    made = table(own(f"{module}:Excerpts", encoder="words"), NO_CORPUS, tmp_path)
    environment = DocumentSelectionEnv(candidates=made, num_selected=1)
    observation, info = environment.reset(options={"question_row": 2})
    assert info["passages"][1] == f"Page 1\n1 is about {QUESTIONS[2].question}"
    assert observation["candidate_embeddings"].shape == (4, WordEncoder.size)


def test_a_corpus_with_what_was_brought_is_a_corpus():
    both = ExtendedCorpus(CORPUS, [Passage("x", "", "one"), Passage("x", "", "two")])
    assert [passage.id for passage in both][-3:] == ["p39", "x", "x"]
    assert (both.row_of("p0"), both.row_of("x"), both.row_of("y")) == (0, 40, None)
    with pytest.raises(IndexError):
        both[42]
    with pytest.raises(IndexError):
        NO_CORPUS[0]


def test_what_an_own_retriever_found_is_found_anew_in_another_corpus(module, tmp_path):
    config = own(f"{module}:Excerpts")
    hashes = {opened(config, corpus, tmp_path).manifest_hash for corpus in (CORPUS, NO_CORPUS)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("few", "filters", "expected"),
    [
        (99, {"exclude_ids": ("who#0", "who#2")}, ["who#1", "who#3", "who#4"]),
        (
            99,
            {"title_contains": "page 47"},
            "leave 1 of the first 50 passages, the bound of limits",
        ),
        (3, {"exclude_ids": ("who#9",)}, ["who#0", "who#1", "who#2"]),
        (3, {"exclude_ids": ("who#0",)}, "leave 2 of the passages that the retriever finds, but"),
        (99, {"ids": ("who#0",)}, "filters.ids names passages of a corpus, and this bundle has no"),
    ],
)
def test_filters_look_through_what_is_brought(few, filters, expected, module, tmp_path):
    config = own(f"{module}:Excerpts", num_candidates=3, options=(f"few={few}",))
    library = Library(NO_CORPUS, opened(config, NO_CORPUS, tmp_path))
    part = RetrieverPart(max_filtered=50)
    one = OpenedLibrary("", library, None, None)
    part._loaded = {"v": retrieving._Loaded(one, config.num_candidates)}
    (found,) = part.retrieve("v", [Ask("who", filters=Filters(**filters))])
    if isinstance(expected, str):
        assert isinstance(found, RequestError)
        assert expected in str(found)
    else:
        assert [passage.id for passage in found.passages] == expected
        assert found.passages[0].text.endswith("is about who")


def flags(files: Path, folder: Path, module: str) -> list[str]:
    found = {
        "run-dir": folder / "run",
        "cache-dir": folder / "cache",
        "data.corpus": None,
        "data.train-questions": files / "train.jsonl",
        "data.eval-questions": files / "eval.jsonl",
        "data.max-train-questions": 12,
        "data.num-validation-questions": 4,
        "retrieval.encoder": files / "encoder",
        "retrieval.kind": f"{module}:Library",
        "retrieval.options": f"file={files / 'corpus.jsonl'}",
        "retrieval.num-candidates": 5,
        "retrieval.bm25-scores": False,
        "environment.num-selected": 2,
        "generator.model": files / "generator",
        "training.launcher": "local",
        "training.num-epochs": 1,
        "training.batch-size": 4,
        "evaluation.systems": "no_retrieval retriever_order trained",
    }
    return [word for name, value in found.items() for word in (f"--{name}", *str(value).split(" "))]


@pytest.mark.slow
def test_a_run_without_a_corpus_is_trained_bundled_evaluated_and_served(
    openrag_files, tmp_path, module
):
    words = ["factbook", *flags(openrag_files, tmp_path, module)]
    train.main(words)
    bundle, kind = tmp_path / "run" / "bundle", f"{module}:Library"
    assert read_bundle(bundle).config.data.corpus is None
    passages = {passage.id: passage for passage in make_corpus()}
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["systems"]["retriever_order"]["recall@2"] == 1.0
    recorded = read_questions(tmp_path / "run" / "evaluation.questions.jsonl")
    assert recorded.passages
    assert all(passages[id_].title == title for id_, (title, _) in recorded.passages.items())
    question = read_bundle(bundle).golden[0]
    with load_pipeline(bundle, allow_code=(kind,)) as pipeline:
        answer = pipeline.answer(question.question)
        candidates = pipeline.retrieve(question.question)
    assert answer.text == question.answer
    assert answer.passages == tuple(passages[id_] for id_ in question.passage_ids)
    again = rlrag.evaluate(bundle, None, str(openrag_files / "eval.jsonl"), allow_code=(kind,))
    assert again["systems"]["trained"]["em"] == found["systems"]["trained"]["em"]

    part = RetrieverPart(allow_code=(kind,))
    version = bundle_version(bundle)
    part.load(version, bundle)
    (served,) = part.retrieve(version, [Ask(question.question)])
    assert list(served.passages) == [one.passage for one in candidates]
    assert part.changed_corpus(version) is None
    selector = SelectorPart(allow_code=(kind,))
    selector.load(version, bundle)
    (picked,) = selector.select(version, [Choice(question.question, served)])
    assert tuple(served.passages[place] for place in picked.positions) == answer.passages
    exported = ["--run-dir", str(tmp_path / "run"), "--output", str(tmp_path / "exported")]
    with pytest.raises(ConfigError, match="--index adds the indexes of the corpus, but data"):
        export.main([*exported, "--index"])
    export.main([*exported, "--hub"])
    assert (
        "questions from what its retriever brings" in (tmp_path / "exported/README.md").read_text()
    )

    (tmp_path / "cache" / "candidates").rename(tmp_path / "gone")
    corpus = openrag_files / "corpus.jsonl"
    before = corpus.read_text()
    try:
        corpus.write_text(before.replace("the", "teh"))
        with pytest.raises(RunDirectoryError, match="a different version of corpus"):
            train.main(words)
    finally:
        corpus.write_text(before)
