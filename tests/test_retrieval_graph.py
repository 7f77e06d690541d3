"""The passage graph: edges worked out by hand, changes against a rebuild, files."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.data.load import load_corpus, load_questions
from rlrag.errors import ConfigError, DataError, IndexMismatchError, RetrievalError
from rlrag.records import Passage
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.graph import EdgeKind, PassageGraph
from rlrag.retrieval.graph.incidence import Keys
from rlrag.retrieval.graph.texts import (
    NameTree,
    hash_texts,
    mentions_of,
    name_of,
    rare_spans,
    words_in_order,
)

OUT, IN, DOCUMENT, SHARED, LINKED, OWN = EdgeKind

TEN = [
    Passage("0", "New York", "a large city; the album came out in 1977"),
    Passage("1", "New York Dolls", "a band of new york; members met the ramones"),
    Passage("2", "York", "a walled city in england"),
    Passage("3", "Ramones (band)", "a band whose first record was made in 1977"),
    Passage("4", "Ramones (album)", "the record by the ramones"),
    Passage("5", "Aruba - Area", "small; near curaçao"),
    Passage("6", "Aruba - Capital", "it is oranjestad"),
    Passage("7", "Aruba - Climate", "tropical"),
    Passage("8", "It", "a story told in aruba"),
    Passage("9", "", "no title; it is about CURAÇAO and york"),
]


def edges(graph, row):
    """The edges of a row: weight in nats rounded, by row and kind."""
    found = graph.neighbours(row)
    pairs = zip(found.rows.tolist(), map(EdgeKind, found.kinds), strict=True)
    return {
        pair: round(weight, 5) for pair, weight in zip(pairs, found.weights.tolist(), strict=True)
    }


def information(num_passages, df):
    return round(math.log(num_passages / df), 5)


def titles(graph, row, kind):
    return sorted(to for to, found in edges(graph, row) if found == kind)


@pytest.mark.parametrize(
    ("row", "to"),
    [
        (0, []),
        (1, [0, 3, 4]),  # "new york" and not the "york" within it; both documents called Ramones
        (2, []),
        (3, []),
        (4, [3]),  # its own name, which is that of another document too
        (5, []),
        (8, [5, 6, 7]),  # all passages of a document of paths
        (9, [2]),  # "it" is no name
    ],
)
def test_titles_that_a_text_mentions(row, to):
    assert titles(PassageGraph.build(TEN), row, OUT) == to


def test_title_edges_have_two_ends():
    graph = PassageGraph.build(TEN)
    out = {(row, to) for row in range(10) for to in titles(graph, row, OUT)}
    back = {(to, row) for row in range(10) for to in titles(graph, row, IN)}
    assert out == back != set()


def test_a_document_that_names_itself_has_no_title_edges():
    texts = ["the area of aruba", "it is oranjestad", "aruba is dry"]
    graph = PassageGraph.build(
        [Passage(str(n), f"Aruba - Part {n}", text) for n, text in enumerate(texts)]
    )
    assert [set(graph.neighbours(row).kinds) for row in range(3)] == [{DOCUMENT, SHARED}] * 3


def test_weights_are_the_information_of_what_is_shared():
    graph = PassageGraph.build(TEN)
    # Two passages mention the Ramones, three are of Aruba, two hold the year 1977.
    assert edges(graph, 3) == {
        (0, SHARED): information(10, 2),
        (1, IN): information(10, 2),
        (4, IN): information(10, 2),
        # Title spans: "ramones" is written by two passages with a capital letter.
        (4, SHARED): information(10, 2),
    }
    assert edges(graph, 6) == {
        (5, DOCUMENT): information(10, 3),
        (7, DOCUMENT): information(10, 3),
        (8, IN): information(10, 1),
    } | {(row, SHARED): information(10, 3) for row in (5, 7)}


def test_edges_are_sorted_by_weight_and_row():
    found = PassageGraph.build(TEN).neighbours(6)
    assert found.rows.tolist() == [8, 5, 5, 7, 7]
    assert found.kinds.tolist() == [IN, DOCUMENT, SHARED, DOCUMENT, SHARED]
    dtypes = (found.rows.dtype, found.kinds.dtype, found.weights.dtype)
    assert dtypes == (np.int64, np.int8, np.float32)


def test_rare_spans_are_those_of_2_to_12_passages_and_the_15_strongest():
    def rows(num_holders):
        texts = [f"about Wolfram {row}" for row in range(num_holders)] + ["nothing"] * 10
        graph = PassageGraph.build([Passage(str(n), "", text) for n, text in enumerate(texts)])
        return titles(graph, 0, SHARED)

    assert rows(1) == []
    assert rows(2) == [1]
    assert rows(12) == list(range(1, 12))
    assert rows(13) == []
    # Thirty passages that share a span each with the first; two of them share a rarer one too.
    hub = Passage("hub", "", ", ".join(f"Name{n}" for n in "abcdef") + ", Zinc")
    others = [Passage(str(n), "", f"x Name{'abcdef'[n % 6]}") for n in range(30)]
    others[17] = Passage("17", "", "x Namef and Zinc")
    found = PassageGraph.build([hub, *others]).neighbours(0)
    # Spans of six passages each, with the hub's, weigh alike: the first rows are kept.
    assert found.rows.tolist() == [18, *range(1, 15)]
    assert found.weights[0] == pytest.approx(math.log(31 / 6) + math.log(31 / 2))


def test_a_question_names_documents():
    graph = PassageGraph.build(TEN)
    assert graph.named_in("Who of the RAMONES lived in New  York?").tolist() == [0, 3, 4]
    assert graph.named_in("Is it near York, or Aruba?").tolist() == [2, 5, 6, 7]
    assert graph.named_in("").tolist() == []
    assert graph.named_in("Who?").dtype == np.int64


def test_names_in_other_scripts_and_forms():
    passages = [
        Passage("0", "東京", "日本の首都"),
        Passage("1", "Straße", "."),
        Passage("2", "Pelé", "."),
        Passage("3", "दिल्ली", "."),
        Passage("4", "", "私は東京都に住む"),
        Passage("5", "", "STRASSE and Pele\u0301's"),
        Passage("6", "", "दिल्ली में"),
    ]
    graph = PassageGraph.build(passages)
    assert [titles(graph, row, OUT) for row in (4, 5, 6)] == [[0], [1, 2], [3]]
    assert graph.named_in("東京はどこ").tolist() == [0]
    assert rare_spans("Élan Vital и Лев Толстой 1910") == ["élan vital", "лев толстой", "1910"]


def test_a_document_of_many_passages_takes_no_more_room(tmp_path):
    def size(num_documents):
        passages = [
            Passage(str(n), f"Land{n % num_documents}", f"text of part {n}") for n in range(2000)
        ]
        PassageGraph.build(passages).save(directory := tmp_path / str(num_documents))
        return sum(path.stat().st_size for path in directory.iterdir())

    assert size(1) < size(1000)
    whole = PassageGraph.build([Passage(str(n), "Land", "text") for n in range(2000)])
    assert titles(whole, 7, DOCUMENT) == [row for row in range(2000) if row != 7]


WORDS = ["ada", "new", "york", "city", "the", "of", "Ida", "Rome", "1977", "Nile", "東京", "x"]
TITLES = ["", "New York", "New York City", "York", "The City", "Ada", "Ada (film)", "Ida - Life"]
TITLES += ["Ida - Work", "Rome", "The", "City of York", "東京", "New"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
parts = st.tuples(st.sampled_from(TITLES), texts)


def naive_mentions(names, words):
    """The longest of the names at each place, less those within another one found."""
    spans = []
    for start in range(len(words)):
        fits = [n for n in names if n and tuple(words[start : start + len(n)]) == n]
        if fits:
            spans.append((start, start + len(max(fits, key=len)), max(fits, key=len)))
    return {
        name
        for start, end, name in spans
        if not any(
            (first, last) != (start, end) and first <= start and end <= last
            for first, last, _ in spans
        )
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(TITLES).map(name_of), max_size=8),
    st.lists(texts, min_size=1, max_size=4),
)
def test_the_tree_finds_the_longest_names(names, found_in):
    tree = NameTree()
    nodes = dict(zip(tree.add(names).tolist(), map(tuple, names), strict=True))
    words = [words_in_order(text) for text in found_in]
    starts = np.cumsum([0, *map(len, words)])
    hashes_T = hash_texts(word for each in words for word in each)
    is_name = np.isin(np.arange(len(tree.nodes)), [node for node in nodes if node >= 0])
    found = mentions_of(tree, hashes_T, starts, is_name)
    expected = [naive_mentions(set(nodes.values()), each) for each in words]
    assert [{nodes[node] for node in each.tolist()} for each in found] == expected


def links(passages):
    """Each passage's id is a number; it leads to the next and to twice it."""
    for passage in passages:
        yield passage.id, str(int(passage.id) + 1), 1.5
        yield passage.id, str(2 * int(passage.id)), len(passage.text) / 8


def asks(passages):
    return [(passage.id, str(int(passage.id) // 2), 3.0) for passage in passages]


asks.kind = EdgeKind.LINKED

changes = st.lists(
    st.tuples(
        st.sampled_from(["add", "replace", "delete", "save"]),
        st.lists(parts, min_size=1, max_size=3),
        st.integers(0, 10**6),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, max_size=6), changes)
def test_changes_give_the_graph_of_a_rebuild(tmp_path_factory, first, made):
    directory = tmp_path_factory.mktemp("graphs")
    now = [Passage(str(number), *part) for number, part in enumerate(first)]
    next_id = len(now)
    sources = [links, asks]
    graph = PassageGraph.build(now, sources)
    for step, (what, new, seed) in enumerate(made):
        random = np.random.default_rng(seed)
        rows = random.permutation(len(now))[: len(new)].tolist()
        if what == "add":
            passages = [Passage(str(next_id + n), *part) for n, part in enumerate(new)]
            next_id += len(new)
            graph.add(passages)
            now += passages
        elif what == "replace":
            changed = [Passage(now[row].id, *part) for row, part in zip(rows, new, strict=False)]
            graph.replace(rows, changed)
            for row, passage in zip(rows, changed, strict=True):
                now[row] = passage
        elif what == "delete":
            graph.delete(rows)
            now = [passage for row, passage in enumerate(now) if row not in rows]
        else:
            graph.save(directory / str(step), "digest")
            graph = PassageGraph.load(directory / str(step), "digest", sources)
        assert_equal(graph, PassageGraph.build(now, sources))


def assert_equal(graph, rebuilt):
    assert graph.num_passages == rebuilt.num_passages
    for row in range(rebuilt.num_passages):
        ours, theirs = graph.neighbours(row), rebuilt.neighbours(row)
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.kinds, theirs.kinds)
        np.testing.assert_array_equal(ours.weights, theirs.weights)
    for text in ("new york city of york", "ada and ida in rome", "東京 the city"):
        np.testing.assert_array_equal(graph.named_in(text), rebuilt.named_in(text))


def test_a_new_title_is_found_in_texts_that_were_there():
    graph = PassageGraph.build([Passage("0", "York", "."), Passage("1", "", "in new york")])
    assert titles(graph, 1, OUT) == [0]
    graph.add([Passage("2", "New York", ".")])
    assert titles(graph, 1, OUT) == [2]
    graph.replace([2], [Passage("2", "Newer", ".")])
    assert titles(graph, 1, OUT) == [0]
    graph.delete([0])
    assert titles(graph, 0, OUT) == []


def test_edges_that_are_brought(caplog):
    passages = [Passage(str(n), "", ".") for n in range(1, 5)]
    with caplog.at_level(logging.WARNING):
        graph = PassageGraph.build(passages, [links, asks])
    assert edges(graph, 1) == {(2, OWN): 1.5, (3, OWN): 0.125, (0, LINKED): 3.0}
    # From 1 to 2 twice: the heavier counts.
    assert edges(graph, 0) == {(1, OWN): 1.5}
    # 3 to 6, 4 to 5, 4 to 8 and 1 to 0.
    assert "4 edges that were brought lead to passages that the corpus lacks" in caplog.text
    graph.add([Passage("6", "", "long text.")])
    assert edges(graph, 2) == {(3, OWN): 1.5, (4, OWN): 0.125, (0, LINKED): 3.0}
    assert edges(graph, 4) == {(2, LINKED): 3.0}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_edges.py").write_text(
        "def chain(passages):\n"
        "    return [(p.id, '0', 1.0) for p in passages]\n"
        "def strange(passages):\n"
        "    return [('elsewhere', '0', 1.0)]\n"
        "def infinite(passages):\n"
        "    return [(p.id, 'x', float('inf')) for p in passages]\n"
        "def fails(passages):\n"
        "    raise OSError('no such server')\n"
        "def titled(passages):\n"
        "    return []\n"
        "titled.kind = 0\n"
        "class Made:\n"
        "    pass\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_edges"
    sys.modules.pop("own_edges", None)


def test_a_source_is_found_by_its_name_and_is_part_of_what_is_stored(module, tmp_path):
    corpus = MemoryCorpus(TEN)
    graph = PassageGraph.build(corpus, [f"{module}:chain"])
    assert edges(graph, 7)[0, OWN] == 1.0
    graph.save(tmp_path / "graph")
    again = PassageGraph.load(tmp_path / "graph", corpus.content_hash, [f"{module}:chain"])
    assert_equal(again, graph)
    with pytest.raises(IndexMismatchError, match=r"parameters\.sources is .*chain.* and not \[\]"):
        PassageGraph.load(tmp_path / "graph", corpus.content_hash)


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("strange", RetrievalError, "brought an edge from 'elsewhere', which is none of the"),
        ("infinite", RetrievalError, "brought the weight inf from '0' to 'x'"),
        ("fails", RetrievalError, "failed with OSError: no such server"),
        ("titled", ConfigError, "has the kind TITLE_OUT; set it to OWN or LINKED"),
        ("Made", ConfigError, "is a type; name a function"),
        ("number", ConfigError, "is a int; name a function"),
        ("chian", ConfigError, "has no 'chian'; did you mean 'chain'?"),
    ],
)
def test_a_source_that_breaks_its_contract_is_named(module, name, kind, error):
    with pytest.raises(kind, match=error):
        PassageGraph.build(TEN, [f"{module}:{name}"])


def test_rows_that_are_none_are_refused():
    graph = PassageGraph.build(TEN)
    with pytest.raises(IndexError, match="row 10 is outside the graph of 10 passages"):
        graph.neighbours(10)
    with pytest.raises(IndexError, match="row -1"):
        graph.neighbours(-1)
    with pytest.raises(DataError, match="row 10 is outside"):
        graph.delete([10])
    with pytest.raises(DataError, match="a row comes twice"):
        graph.delete([1, 1])
    with pytest.raises(DataError, match="2 rows were to be replaced by 1 passages"):
        graph.replace([1, 2], TEN[:1])
    assert_equal(graph, PassageGraph.build(TEN))


def test_a_graph_of_another_corpus_is_refused(tmp_path):
    corpus, other = MemoryCorpus(TEN), MemoryCorpus(TEN[:9])
    graph = PassageGraph.build(corpus)
    graph.save(directory := tmp_path / "graph")
    graph.save(directory)  # there it lies already
    assert_equal(PassageGraph.load(directory, corpus.content_hash), graph)
    with pytest.raises(IndexMismatchError) as refused:
        PassageGraph.load(directory, other.content_hash)
    message = str(refused.value)
    assert f"corpus_hash is {corpus.content_hash!r} and not {other.content_hash!r}" in message
    assert "num_passages" not in message
    with pytest.raises(IndexMismatchError, match="was built from something else"):
        PassageGraph.build(other).save(directory)
    with pytest.raises(IndexMismatchError, match="is missing or unreadable"):
        PassageGraph.load(tmp_path / "nowhere", corpus.content_hash)


def test_a_damaged_graph_is_refused(tmp_path):
    PassageGraph.build(TEN).save(directory := tmp_path / "graph")
    digest = MemoryCorpus(TEN).content_hash
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    name = max(listed, key=lambda each: listed[each]["bytes"])
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(IndexMismatchError, match=f"{name} is damaged"):
        PassageGraph.load(directory, digest)


def test_a_graph_that_followed_changes_is_saved_under_the_new_corpus(tmp_path):
    graph = PassageGraph.build(TEN)
    graph.delete([3])
    with pytest.raises(ConfigError, match="has followed changes"):
        graph.save(tmp_path / "graph")
    digest = MemoryCorpus([*TEN[:3], *TEN[4:]]).content_hash
    graph.save(tmp_path / "graph", digest)
    loaded = PassageGraph.load(tmp_path / "graph", digest)
    assert_equal(loaded, PassageGraph.build([*TEN[:3], *TEN[4:]]))


def test_keys_are_numbered_as_they_come():
    random, keys, known = np.random.default_rng(0), Keys(), {}
    for _ in range(20):
        hashes = random.integers(0, 60, 9).astype(np.uint64)
        expected = [known.setdefault(int(each), len(known)) for each in hashes]
        assert keys.add(hashes).tolist() == expected
    assert keys.hashes_K.tolist() == list(known)


@pytest.mark.data
def test_one_title_hop_finds_what_no_single_search_does(data_dir, tmp_path):
    """Published multi-hop questions: all gold passages within the first hits, and one hop away."""
    corpus = load_corpus(str(data_dir / "corpus" / "2wiki.jsonl.gz"), tmp_path, 1000)
    questions = load_questions(
        str(data_dir / "questions" / "2wiki.dev.jsonl"), Path(tmp_path)
    ).questions
    graph = PassageGraph.build(corpus)
    config = RetrievalConfig(kind="bm25", encoder=None, num_candidates=20)
    bm25 = open_retrievers(corpus, config, tmp_path).primary
    found = bm25.search([question.question for question in questions], 20).rows_BK.tolist()
    whole: dict[str, list[bool]] = {"first 20": [], "first 5 and a hop": [], "named too": []}
    sizes = []
    for question, rows in zip(questions, found, strict=True):
        gold = {corpus.row_of(passage_id) for passage_id in question.gold_ids}
        hopped = with_hop(graph, rows[:5])
        named = with_hop(graph, [*rows[:5], *graph.named_in(question.question).tolist()])
        whole["first 20"].append(gold <= set(rows))
        whole["first 5 and a hop"].append(gold <= hopped)
        whole["named too"].append(gold <= named)
        sizes.append(len(hopped))
    shares = {name: np.mean(each) for name, each in whole.items()}
    assert shares["first 20"] < 0.6
    assert shares["first 5 and a hop"] > 0.85
    assert shares["named too"] > 0.93
    assert np.mean(sizes) < 15


def with_hop(graph, rows):
    found = set(rows)
    for row in rows:
        near = graph.neighbours(row)
        found |= set(near.rows[near.kinds == OUT].tolist())
    return found
