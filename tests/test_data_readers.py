"""Readers: what they accept, what they count, and that a bad line is named and refused."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrag.data.checks import DataReport, Finding, Tally
from rlrag.data.corpus import MemoryCorpus
from rlrag.data.load import cut_words, load_corpus, load_questions
from rlrag.data.readers import read_passages, read_questions
from rlrag.errors import DataError, SetupError
from rlrag.records import Passage, Question

GOOD_PASSAGE = {"id": "p1", "contents": '"Rome"\nA city in Italy.'}
GOOD_QUESTION = {"id": "q1", "question": "Which city?", "golden_answers": ["Rome"]}


def write_jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def passages_of(path: Path) -> list[Passage]:
    return list(read_passages(path, Tally()))


def test_flashrag_contents_are_split_into_title_and_text(tmp_path: Path):
    path = write_jsonl(
        tmp_path / "corpus.jsonl",
        [
            GOOD_PASSAGE,
            {"id": "p2", "contents": "Unquoted title\nFirst line.\nSecond line."},
            {"id": "p3", "contents": "Only text."},
            {"id": "p4", "contents": '"Toys ""R"" Us"\nA shop.'},
            {"id": 5, "contents": "Number\nAn integer id."},
            {"id": "p6", "title": "Rome", "contents": "A city.\nIts river is the Tiber."},
            {"id": "p7", "title": "Rome", "contents": '"Rome"\nA city.'},
            {"id": "p8", "title": '"Rome"', "text": "ignored", "contents": "Rome\nA city."},
            {"id": "p9", "title": None, "contents": "Rome\nA city."},
        ],
    )
    assert passages_of(path) == [
        Passage("p1", "Rome", "A city in Italy."),
        Passage("p2", "Unquoted title", "First line.\nSecond line."),
        Passage("p3", "", "Only text."),
        Passage("p4", 'Toys "R" Us', "A shop."),
        Passage("5", "Number", "An integer id."),
        Passage("p6", "Rome", "A city.\nIts river is the Tiber."),
        Passage("p7", "Rome", "A city."),
        Passage("p8", "Rome", "A city."),
        Passage("p9", "Rome", "A city."),
    ]


def test_questions_keep_answers_and_metadata(tmp_path: Path):
    metadata = {"gold_ids": ["p1"], "type": "city"}
    path = write_jsonl(
        tmp_path / "q.jsonl",
        [{**GOOD_QUESTION, "metadata": metadata}, {**GOOD_QUESTION, "id": "q2", "metadata": None}],
    )
    first, second = read_questions(path, Tally())
    assert first == Question("q1", "Which city?", ("Rome",), metadata)
    assert first.gold_ids == ("p1",)
    assert second.gold_ids == ()


def test_an_empty_answer_list_marks_an_unanswerable_question(tmp_path: Path):
    path = write_jsonl(tmp_path / "q.jsonl", [{**GOOD_QUESTION, "golden_answers": []}])
    assert load_questions(str(path), tmp_path).questions[0].golden_answers == ()


def test_gzip_is_known_by_its_bytes_and_not_by_its_name(tmp_path: Path):
    plain = write_jsonl(tmp_path / "corpus.jsonl", [GOOD_PASSAGE])
    for name in ("corpus.jsonl.gz", "packed.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        assert passages_of(tmp_path / name) == passages_of(plain)
    (tmp_path / "plain.gz").write_bytes(plain.read_bytes())
    assert passages_of(tmp_path / "plain.gz") == passages_of(plain)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_harmless(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    line = json.dumps(GOOD_PASSAGE).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n")
    assert passages_of(path) == [Passage("p1", "Rome", "A city in Italy.")]


def test_a_line_separator_within_a_string_does_not_end_the_line(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "p1", "contents": "One\u2028two."}\n', "utf-8")
    assert passages_of(path)[0].text == "One\u2028two."


BAD_PASSAGE_LINES = {
    "not JSON": (b"{broken", "not JSON"),
    "not a number": (b'{"id": "p2", "contents": "t", "score": NaN}', "NaN"),
    "nested too deep": (b"[" * 100_000, "not JSON"),
    "a list": (b'["p2", "text"]', "not an object"),
    "a string": (b'"text"', "not an object"),
    "no id": (b'{"contents": "text"}', "'id' or '_id' is missing"),
    "null id": (b'{"id": null, "contents": "text"}', "'id' is None"),
    "true as id": (b'{"id": true, "contents": "text"}', "'id' is True"),
    "blank id": (b'{"id": " ", "contents": "text"}', "the id is blank"),
    "no contents": (b'{"id": "p2", "title": "t"}', "'contents' is missing"),
    "contents of another type": (b'{"id": "p2", "contents": ["text"]}', "expected a string"),
    "title of another type": (b'{"id": "p2", "title": 3, "text": "x"}', "'title' is 3"),
    "not UTF-8": (b'{"id": "p2", "contents": "caf\xe9"}', "not UTF-8"),
    "lone surrogate": (b'{"id": "p2", "contents": "a \\ud800"}', "lone surrogate"),
}


@pytest.mark.parametrize(("line", "message"), BAD_PASSAGE_LINES.values(), ids=BAD_PASSAGE_LINES)
def test_a_bad_passage_line_is_named(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json.dumps(GOOD_PASSAGE).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="expected") as caught:
        passages_of(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


BAD_QUESTIONS = {
    "no question": ({"id": "q", "golden_answers": []}, "'question' or 'text' is missing"),
    "no answers": ({"id": "q", "question": "?"}, "'golden_answers' is missing"),
    "answers as a string": ({**GOOD_QUESTION, "golden_answers": "Rome"}, "list of strings"),
    "a number as answer": ({**GOOD_QUESTION, "golden_answers": [1]}, "contains 1"),
    "a blank answer": ({**GOOD_QUESTION, "golden_answers": [" "]}, "not blank"),
    "metadata as a list": ({**GOOD_QUESTION, "metadata": []}, "expected an object"),
    "gold ids of another type": (
        {**GOOD_QUESTION, "metadata": {"gold_ids": "p1"}},
        "metadata: 'gold_ids'",
    ),
    "true as gold id": (
        {**GOOD_QUESTION, "metadata": {"gold_ids": [True]}},
        "metadata: 'gold_ids' contains True",
    ),
    "surrogate in an answer": ({**GOOD_QUESTION, "golden_answers": ["\ud800"]}, "surrogate"),
}


@pytest.mark.parametrize(("record", "message"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_a_bad_question_line_is_named(tmp_path: Path, record: dict[str, object], message: str):
    path = write_jsonl(tmp_path / "q.jsonl", [GOOD_QUESTION, record])
    with pytest.raises(DataError) as caught:
        load_questions(str(path), tmp_path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


TABLE = b"id,question,golden_answers\nq1,Which city?,Rome\n"
ARRAY = json.dumps([GOOD_QUESTION], indent=1).encode()
OTHER_FORMATS = {
    "parquet": (b"PAR1\x15\x04\x15 ", "is a Parquet file; .*read_parquet\\('.*q'\\)"),
    "arrow": (b"ARROW1\0\0", "is an Arrow file; .*read_feather"),
    "zip": (b"PK\x03\x04\x14\0", "is a zip archive or a spreadsheet; "),
    "bzip2": (bz2.compress(TABLE), "is packed by bzip2; .*gzip"),
    "xz": (lzma.compress(TABLE), "is packed by xz; "),
    "zstd": (b"\x28\xb5\x2f\xfd\0", "is packed by zstd; "),
    "UTF-16": (TABLE.decode().encode("utf-16"), "is UTF-16 text; .*iconv"),
    "CSV": (TABLE, "is a table of columns .*read_csv\\('.*q'\\)"),
    "packed CSV": (gzip.compress(TABLE, mtime=0), "is a table of columns"),
    "TSV": (TABLE.replace(b",", b"\t"), r"read_csv\('.*q', sep='\\t'\)\.to_json\('.*q.jsonl'"),
    "array": (ARRAY, r"is a JSON array; .*jq -c '\.\[\]' .*q > .*ql"),
    "array in one line": (json.dumps([GOOD_QUESTION]).encode(), "is a JSON array"),
    "object": (ARRAY.strip(b"[]\n ").replace(b"{", b"\n{\n", 1), "is JSON over several lines"),
}


@pytest.mark.parametrize(("content", "said"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
def test_another_format_is_named_with_what_to_do(tmp_path: Path, content: bytes, said: str):
    path = tmp_path / "q"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_questions(str(path), tmp_path)
    assert "; expected " in str(caught.value)
    with pytest.raises(DataError, match=said):
        load_corpus(str(path), tmp_path, 100)


def test_integer_gold_ids_are_those_of_integer_ids(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": 7, "contents": "Rome\nA city."}])
    record = {**GOOD_QUESTION, "metadata": {"gold_ids": [7, "8"], "type": "city"}}
    path = write_jsonl(tmp_path / "q.jsonl", [record])
    found = load_questions(str(path), tmp_path, load_corpus(str(corpus), tmp_path, 100))
    assert found.questions[0].metadata == {"gold_ids": ["7", "8"], "type": "city"}
    assert found.report.unknown_gold == Finding(1, ("8",))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlrag.data.lines.MAX_LINE_BYTES", 100)
    path = write_jsonl(tmp_path / "c.jsonl", [{"id": "p1", "contents": "x" * 200}])
    with pytest.raises(DataError, match="longer than 100 bytes"):
        passages_of(path)


@pytest.mark.parametrize("num_bytes_lost", [1, 9, 200])
def test_a_truncated_gzip_is_refused(tmp_path: Path, num_bytes_lost: int):
    records = [{"id": str(n), "contents": f"Passage {n} {os.urandom(8).hex()}"} for n in range(99)]
    packed = gzip.compress("\n".join(map(json.dumps, records)).encode())
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(packed[:-num_bytes_lost])
    with pytest.raises(DataError, match="damaged or truncated"):
        load_corpus(str(path), tmp_path, 100)
    assert not list((tmp_path / "corpora").iterdir())


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist; check the path$"):
        load_corpus(str(tmp_path / "nowhere.jsonl"), tmp_path, 100)
    with pytest.raises(DataError, match="set the environment variable RLRAG_DATA_DIR"):
        load_questions("$RLRAG_DATA_DIR/questions/nq.jsonl", tmp_path)


@pytest.mark.parametrize(
    "load", [lambda spec, cache: load_corpus(spec, cache, 100), load_questions]
)
def test_a_path_that_cannot_be_looked_at_is_named(
    tmp_path: Path, load: Callable[[str, Path], object]
):
    for spec in (f"{tmp_path}/{'a' * 300}", f"{tmp_path}/{'a' * 300}:test"):
        with pytest.raises(DataError, match=r"cannot be read: File name too long; expected"):
            load(spec, tmp_path)
    with pytest.raises(DataError, match=r"^~nobody-of-that-name/a\.jsonl does not exist"):
        load("~nobody-of-that-name/a.jsonl", tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n", gzip.compress(b"", mtime=0)])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^no passage with text was found in {path}; check"):
        load_corpus(str(path), tmp_path, 100)
    with pytest.raises(DataError, match=r"empty\.jsonl has no questions"):
        load_questions(str(path), tmp_path)


def test_a_folder_that_is_not_beir_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no corpus\.jsonl"):
        load_corpus(str(tmp_path), tmp_path / "cache", 100)


def test_duplicate_and_empty_passages_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = write_jsonl(
        tmp_path / "corpus.jsonl",
        [
            GOOD_PASSAGE,
            {"id": "p2", "contents": "Title\n  "},
            {"id": "p1", "contents": "Later\nThe second p1."},
            {"id": "p3", "contents": "Another text."},
        ],
    )
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(str(path), tmp_path, 100)
    assert [passage.id for passage in corpus] == ["p1", "p3"]
    assert corpus[0].text == "A city in Italy."
    assert "duplicate ids skipped: 1 (p1); empty texts skipped: 1 (p2)" in caplog.text


def test_question_findings_are_reported(tmp_path: Path):
    records = [
        {**GOOD_QUESTION, "metadata": {"gold_ids": ["p1", "p8"]}},
        {**GOOD_QUESTION, "id": "q2", "question": " "},
        {**GOOD_QUESTION, "question": "again"},
    ]
    path = write_jsonl(tmp_path / "q.jsonl", records)
    questions = load_questions(str(path), tmp_path, MemoryCorpus([Passage("p1", "", "text")]))
    assert questions.report == DataReport(
        str(path),
        num_read=3,
        num_kept=1,
        duplicates=Finding(1, ("q1",)),
        empty=Finding(1, ("q2",)),
        unknown_gold=Finding(1, ("p8",)),
    )
    assert not questions.report.is_clean


def test_a_report_names_the_first_few_and_survives_json():
    tally = Tally()
    for number in range(9):
        tally.duplicates.add(f"p{number}")
    report = tally.report("c.jsonl", 1)
    assert str(report.duplicates) == "9 (p0, p1, p2, p3, p4, ...)"
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def write_beir(folder: Path, splits: tuple[str, ...] = ("test",)) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(
        folder / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Rome", "text": "A city."},
            {"_id": "d2", "text": "No title.", "metadata": {}},
        ],
    )
    packed = gzip.compress(
        b'{"_id": "1", "text": "Which city?", "metadata": {"golden_answers": ["Rome"]}}\n'
        b'{"_id": "2", "text": "Unjudged?"}\n{"_id": "3", "text": "Nothing relevant?"}\n'
    )
    (folder / "queries.jsonl.gz").write_bytes(packed)
    for split in splits:
        (folder / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n1\td1\t2\n1\td2\t0\n3\td1\t0\n9\td1\t1\n"
        )
    return folder


def test_a_beir_folder_gives_passages_and_judged_queries(tmp_path: Path):
    folder = write_beir(tmp_path / "beir")
    corpus = load_corpus(str(folder), tmp_path, 100)
    assert list(corpus) == [Passage("d1", "Rome", "A city."), Passage("d2", "", "No title.")]
    questions = load_questions(str(folder), tmp_path, corpus)
    assert [question.id for question in questions.questions] == ["1", "3"]
    assert questions.questions[0].gold_ids == ("d1",)
    assert questions.questions[0].golden_answers == ("Rome",)
    assert questions.questions[1].gold_ids == ()
    assert questions.report.unknown_questions == Finding(1, ("9",))


def test_a_beir_split_is_named_where_there_are_several(tmp_path: Path):
    folder = write_beir(tmp_path / "beir", ("dev", "test"))
    assert len(load_questions(f"{folder}:dev", tmp_path)) == 2
    for spec in (str(folder), f"{folder}:train"):
        with pytest.raises(DataError, match="splits dev, test and not"):
            load_questions(spec, tmp_path)


@pytest.mark.parametrize("line", ["1\td1", "1\td1\thigh", "\td1\t1", "1 d1 1"])
def test_a_bad_relevance_line_is_named(tmp_path: Path, line: str):
    folder = write_beir(tmp_path / "beir")
    path = folder / "qrels" / "test.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(DataError) as caught:
        load_questions(str(folder), tmp_path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_hub_data_sets_take_the_same_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("corpus", "questions"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "corpus" / "train.jsonl", [GOOD_PASSAGE])
    write_jsonl(
        tmp_path / "questions" / "train.jsonl",
        [
            {**GOOD_QUESTION, "metadata": {"type": "a"}},
            {**GOOD_QUESTION, "id": "q2", "metadata": {"gold_ids": ["p1"]}},
        ],
    )
    corpus = load_corpus(f"hub:{tmp_path / 'corpus'}", tmp_path, 100)
    assert list(corpus) == [Passage("p1", "Rome", "A city in Italy.")]
    questions = load_questions(f"hub:{tmp_path / 'questions'}", tmp_path)
    assert questions.questions == (
        Question("q1", "Which city?", ("Rome",), {"type": "a"}),
        Question("q2", "Which city?", ("Rome",), {"gold_ids": ["p1"]}),
    )
    with pytest.raises(DataError, match="has splits train"):
        load_questions(f"hub:{tmp_path / 'questions'}:default:dev", tmp_path)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_questions(f"hub:{tmp_path / 'nothing'}", tmp_path)
    with pytest.raises(DataError, match="is not the name of a data set"):
        load_questions("hub:", tmp_path)
    for content, reason in (("", "StopIteration"), ('{"id": "a"}\n{broken', "ArrowInvalid")):
        (tmp_path / "questions" / "train.jsonl").write_text(content)
        with pytest.raises(DataError, match=rf"cannot be loaded \({reason}: .*its files"):
            load_questions(f"hub:{tmp_path / 'questions'}", tmp_path)


def test_without_the_datasets_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match=r"pip install -e '\.\[hub\]'"):
        load_corpus("hub:someone/something", tmp_path, 100)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(
    st.sampled_from(
        ["id", "_id", "contents", "title", "text", "question", "golden_answers", "metadata"]
    ),
    JSON_VALUES,
)
LINES = st.one_of(RECORDS.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))


@given(lines=st.lists(LINES, max_size=4), packed=st.booleans(), num_lost=st.integers(0, 8))
def test_only_data_errors_ever_leave_a_reader(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], packed: bool, num_lost: int
):
    content = b"\n".join(lines)
    content = gzip.compress(content, mtime=0) if packed else content
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content[: len(content) - num_lost])
    for read in (read_passages, read_questions):
        try:
            records = list(read(path, Tally()))
        except DataError as error:
            message = str(error)
        else:
            message = str(path)
            assert all(isinstance(record.id, str) for record in records)
        assert message.startswith(str(path))


def test_cutting_keeps_spacing_and_short_texts():
    assert cut_words("one  two\nthree four", 3) == "one  two\nthree"
    assert cut_words("one two", 2) == "one two"
    assert cut_words("one two ", 9) == "one two "
    assert cut_words("  one two", 1) == "  one"


@pytest.mark.data
def test_natural_questions_load_whole(tmp_path: Path):
    folder = Path(os.environ["RLRAG_DATA_DIR"])
    corpus = load_corpus(str(folder / "corpus" / "nq.jsonl.gz"), tmp_path, 100)
    assert len(corpus) == 17_109
    assert max(len(passage.text.split()) for passage in corpus) == 100
    questions = load_questions(str(folder / "questions" / "nq.dev.jsonl"), tmp_path, corpus)
    assert len(questions) == 279
    assert questions.report.is_clean
