"""Public data sets become a folder that recipes read, from their files or from the hub."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rlrag.cli import data, train
from rlrag.data import published
from rlrag.data.folder import PUBLISHED, corpus_path, questions_path
from rlrag.data.json_objects import read_json_objects
from rlrag.data.load import load_corpus, load_questions
from rlrag.errors import ConfigError, DataError, SetupError
from rlrag.recipes import RECIPES
from rlrag.records import Passage, Question

PASSAGES = [
    ("7", "Rome", "Its river is the Tiber."),
    ("8", 'The "Old" Bridge', 'A "film" of 1999.'),
]


def dpr(number: int) -> dict[str, Any]:
    def context(own: str, title: str, text: str) -> dict[str, Any]:
        return {"title": title, "text": text, "score": 1000, "passage_id": own}

    return {
        "dataset": "nq_train_psgs_w100",
        "question": f"which river is in rome {number}",
        "answers": ["Tiber", "the Tiber"],
        "positive_ctxs": [context(*PASSAGES[0])],
        "negative_ctxs": [],
        "hard_negative_ctxs": [context(*PASSAGES[1])],
    }


def hotpotqa(number: int) -> dict[str, Any]:
    return {
        "_id": f"5a{number}",
        "answer": "Tiber",
        "question": f"Which river crosses the capital of Italy {number}?",
        "supporting_facts": [["Italy", 0], ["Rome", 1]],
        "context": [
            ["Italy", ["Its capital is Rome."]],
            ["Spain", ["Its capital is Madrid."]],
            ["Rome", ["A city.", " Its river is the Tiber."]],
        ],
        "type": "bridge",
        "level": "hard",
    }


def hotpotqa_row(number: int) -> dict[str, Any]:
    """The same question as the hub has it."""
    record = hotpotqa(number)
    facts, context = (
        zip(*record["supporting_facts"], strict=True),
        zip(*record["context"], strict=True),
    )
    return {
        **record,
        "id": record["_id"],
        "supporting_facts": dict(zip(("title", "sent_id"), map(list, facts), strict=True)),
        "context": dict(zip(("title", "sentences"), map(list, context), strict=True)),
    }


def musique(number: int, answerable: bool = True) -> dict[str, Any]:
    return {
        "id": f"2hop__{number}_1",
        "paragraphs": [
            {"idx": 0, "title": "Spain", "paragraph_text": "Madrid.", "is_supporting": False},
            {"idx": 1, "title": "Rome", "paragraph_text": "The Tiber.", "is_supporting": True},
        ],
        "question": "Which river?",
        "question_decomposition": [
            {"id": 1, "question": "Rome >> river", "answer": "Tiber", "paragraph_support_idx": 1}
        ],
        "answer": "Tiber",
        "answer_aliases": ["the Tiber"],
        "answerable": answerable,
    }


def squad2() -> dict[str, Any]:
    answered = {
        "id": "s1",
        "question": "Which river?",
        "answers": [{"text": "Tiber", "answer_start": 13}, {"text": "Tiber", "answer_start": 13}],
        "is_impossible": False,
    }
    impossible = {
        "id": "s2",
        "question": "Which sea?",
        "answers": [],
        "plausible_answers": [{"text": "Tiber", "answer_start": 13}],
        "is_impossible": True,
    }
    paragraph = {"context": "Its river is the Tiber.", "qas": [answered, impossible]}
    return {"version": "v2.0", "data": [{"title": "Ancient_Rome", "paragraphs": [paragraph]}]}


def squad2_rows() -> list[dict[str, Any]]:
    """The same questions as the hub has them."""
    row = {"title": "Ancient_Rome", "context": "Its river is the Tiber."}
    return [
        {**row, "id": "s1", "question": "Which river?", "answers": {"text": ["Tiber", "Tiber"]}},
        {**row, "id": "s2", "question": "Which sea?", "answers": {"text": []}},
    ]


def write(path: Path, *records: Any, form: str = "lines") -> Path:
    texts = {
        "lines": lambda: "".join(json.dumps(record) + "\n" for record in records),
        "array": lambda: json.dumps(list(records)),
        "indented": lambda: json.dumps(list(records), indent=4),
        "one": lambda: json.dumps(records[0]),
    }
    content = texts[form]().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def run(name: str, output: Path, *files: Path, **flags: Any) -> None:
    words = [name, "--output", str(output)]
    words += ["--from", *map(str, files)] if files else []
    for flag, value in flags.items():
        words += [f"--{flag.replace('_', '-')}", *([] if value is True else [str(value)])]
    data.main(words)


def questions(folder: Path, name: str, split: str, tmp_path: Path) -> list[Question]:
    return list(load_questions(str(questions_path(folder, name, split)), tmp_path).questions)


def passages(folder: Path, name: str, tmp_path: Path) -> dict[str, Passage]:
    corpus = load_corpus(str(corpus_path(folder, name)), tmp_path, 100)
    return {passage.id: passage for passage in (corpus[row] for row in range(len(corpus)))}


@pytest.mark.parametrize("form", ["lines", "array", "indented"])
def test_nq_of_dpr(form, tmp_path, capsys):
    train_file = write(tmp_path / "biencoder-nq-train.json.gz", dpr(1), dpr(2), form=form)
    dev_file = write(tmp_path / "biencoder-nq-dev.json", dpr(3), form=form)
    run("nq", tmp_path / "new" / "folder", train_file, dev_file)
    said = capsys.readouterr().out
    assert "nq: 2 train questions\nnq: 1 dev questions\nnq: 2 passages\n" in said
    assert f"export RLRAG_DATA_DIR={tmp_path}/new/folder" in said
    found = questions(tmp_path / "new" / "folder", "nq", "train", tmp_path)
    assert found[0] == Question(
        "nq-train-0",
        "which river is in rome 1",
        ("Tiber", "the Tiber"),
        {"dataset": "nq", "type": "single-hop", "gold_ids": ["7"]},
    )
    assert passages(tmp_path / "new" / "folder", "nq", tmp_path) == {
        own: Passage(own, title, text) for own, title, text in PASSAGES
    }


def test_nq_of_tevatron(tmp_path):
    context = {"docid": "7", "title": "Rome", "text": "Its river is the Tiber."}
    record = {"query_id": "0", "query": "which river", "answers": ["Tiber"]}
    record |= {"positive_passages": [context], "negative_passages": [context | {"docid": "9"}]}
    run(
        "nq",
        tmp_path,
        write(tmp_path / "train.jsonl", record),
        write(tmp_path / "dev.jsonl", record),
    )
    (found,) = questions(tmp_path, "nq", "dev", tmp_path)
    assert (found.question, found.gold_ids) == ("which river", ("7",))
    assert set(passages(tmp_path, "nq", tmp_path)) == {"7", "9"}


def test_nq_open_with_the_passages_of_dpr(tmp_path):
    record = {"question": "which river", "answer": ["Tiber"]}
    files = [write(tmp_path / f"NQ-open.{split}.jsonl", record) for split in ("train", "dev")]
    with pytest.raises(DataError, match=r"^nq has no passages in these files; give a file of pass"):
        run("nq", tmp_path / "d", *files)
    assert not list((tmp_path / "d").iterdir())
    table = tmp_path / "psgs_w100.tsv"
    rows = [
        f'{own}\t"{text.replace(chr(34), chr(34) * 2)}"\t{title}' for own, title, text in PASSAGES
    ]
    table.write_text("id\ttext\ttitle\n" + "\n".join(rows) + "\n")
    run("nq", tmp_path / "d", *files, table)
    assert passages(tmp_path / "d", "nq", tmp_path) == {
        own: Passage(own, title, text) for own, title, text in PASSAGES
    }
    # A passage of a question is the same as that of the table.
    with_gold = write(tmp_path / "biencoder-nq-train.json", dpr(1), form="array")
    run("nq", tmp_path / "e", with_gold, files[1], table)
    assert len(passages(tmp_path / "e", "nq", tmp_path)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7\tno title\n", "psgs.tsv:2: 2 columns; expected id, text and title, separated by tabs"),
        ('7\t"no end\n' + "x" * 140_000, "psgs.tsv:3: field larger than field limit"),
    ],
)
def test_a_malformed_table_is_named_by_its_line(line, message, tmp_path):
    table = tmp_path / "psgs.tsv"
    table.write_text("id\ttext\ttitle\n" + line)
    record = {"question": "which river", "answer": ["Tiber"]}
    files = [write(tmp_path / f"{split}.jsonl", record) for split in ("train", "dev")]
    with pytest.raises(DataError, match=message):
        run("nq", tmp_path / "d", *files, table)
    assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize("record", [hotpotqa, hotpotqa_row])
@pytest.mark.parametrize("name", ["hotpotqa", "2wiki"])
def test_hotpotqa_and_its_like(name, record, tmp_path):
    one = record(1)
    if name == "2wiki":
        one["evidences"] = [["Italy", "capital", "Rome"]]
    run(
        name,
        tmp_path,
        write(tmp_path / "hotpot_train_v1.1.json", one, form="array"),
        write(tmp_path / "hotpot_dev_distractor_v1.json", record(2), form="array"),
    )
    (found,) = questions(tmp_path, name, "train", tmp_path)
    known = passages(tmp_path, name, tmp_path)
    assert (found.id, found.golden_answers) == ("5a1", ("Tiber",))
    assert [known[own].title for own in found.gold_ids] == ["Italy", "Rome"]
    candidates = [known[own].title for own in found.metadata["candidate_ids"]]
    assert candidates == ["Italy", "Spain", "Rome"]
    assert known[found.gold_ids[1]].text == "A city. Its river is the Tiber."
    assert found.metadata["type"] == "bridge"
    assert found.metadata.get("evidences") == one.get("evidences")
    assert len(known) == 3  # both questions have the same


def test_musique(tmp_path):
    run(
        "musique",
        tmp_path,
        write(tmp_path / "musique_full_v1.0_train.jsonl", musique(1), musique(2, answerable=False)),
        write(tmp_path / "musique_full_v1.0_dev.jsonl", musique(3)),
    )
    first, second = questions(tmp_path, "musique", "train", tmp_path)
    known = passages(tmp_path, "musique", tmp_path)
    assert first.golden_answers == ("Tiber", "the Tiber")
    assert second.golden_answers == ()
    assert [known[own].title for own in first.gold_ids] == ["Rome"]
    assert [known[own].title for own in first.metadata["candidate_ids"]] == ["Spain", "Rome"]
    assert first.metadata["type"] == "2hop"
    assert first.metadata["hops"] == [
        {"question": "Rome >> river", "answer": "Tiber", "gold_id": first.gold_ids[0]}
    ]


@pytest.mark.parametrize("rows", [False, True])
def test_squad2(rows, tmp_path):
    for split in ("train", "dev"):
        records, form = (squad2_rows(), "lines") if rows else ([squad2()], "one")
        write(tmp_path / f"{split}-v2.0.json", *records, form=form)
    run("squad2", tmp_path, tmp_path / "train-v2.0.json", tmp_path / "dev-v2.0.json")
    first, second = questions(tmp_path, "squad2", "train", tmp_path)
    (passage,) = passages(tmp_path, "squad2", tmp_path).values()
    assert (passage.title, passage.text) == ("Ancient Rome", "Its river is the Tiber.")
    assert (first.golden_answers, second.golden_answers) == (("Tiber",), ())
    assert first.gold_ids == second.gold_ids == (passage.id,)


def two_files(folder: Path, count: int = 1) -> list[Path]:
    return [
        write(folder / f"hotpot_{split}.json", *map(hotpotqa, numbers), form="array")
        for split, numbers in (("train", range(count)), ("dev", range(count, 2 * count)))
    ]


def test_a_sample_is_the_same_every_time_and_stays_in_order(tmp_path):
    files = two_files(tmp_path, 40)
    for folder in ("a", "b"):
        run("hotpotqa", tmp_path / folder, *files, max_questions=10)
    first, again = (
        questions_path(tmp_path / folder, "hotpotqa", "train").read_bytes() for folder in "ab"
    )
    assert first == again
    ids = [int(each.id[2:]) for each in questions(tmp_path / "a", "hotpotqa", "train", tmp_path)]
    assert len(ids) == 10
    assert ids == sorted(ids) != list(range(10))
    packed = [corpus_path(tmp_path / folder, "hotpotqa").read_bytes() for folder in "ab"]
    assert packed[0] == packed[1]


def test_what_is_left_out_is_counted(tmp_path, capsys):
    first, blank = hotpotqa(1), hotpotqa(2) | {"question": " "}
    first["context"].append(["Empty", [" "]])
    path = write(tmp_path / "train.json", first, hotpotqa(1), blank, form="array")
    run("hotpotqa", tmp_path, path, write(tmp_path / "dev.json", hotpotqa(3), form="array"))
    said = capsys.readouterr().out
    assert "hotpotqa: 1 train questions" in said
    assert "hotpotqa: 3 passages" in said
    assert "left out: train questions whose id came before: 1 (5a1)" in said
    assert "left out: train questions without text: 1 (5a2)" in said
    assert "left out: passages without text: 1 (hotpotqa-" in said


def test_nothing_is_replaced_unless_it_is_asked_for(tmp_path):
    files = two_files(tmp_path)
    run("hotpotqa", tmp_path / "d", *files)
    with pytest.raises(ConfigError, match=r"corpus/hotpotqa.jsonl.gz exists; add --overwrite"):
        run("hotpotqa", tmp_path / "d", *files)
    corpus_path(tmp_path / "d", "hotpotqa").unlink()
    with pytest.raises(ConfigError, match=r"questions/hotpotqa.train.jsonl exists"):
        run("hotpotqa", tmp_path / "d", *files)
    run("hotpotqa", tmp_path / "d", *two_files(tmp_path, 2), overwrite=True)
    assert len(questions(tmp_path / "d", "hotpotqa", "train", tmp_path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"_id": "a"},\n{"_id": }]', r"train.json:2: not JSON \(Expecting value\)"),
        ('[{"_id": "a",\n"b": 1},\n7]', r"train.json:3, record 2: 7 is not an object"),
        ('[{"_id": "a"} {}]', r"train.json:1: '\{' stands where ',' should"),
        ('[{"_id": "a"},\n', r"train.json:2: not JSON"),
        ('[{"_id": "a"}\n', r"train.json:2: the array does not end"),
        ('{"_id": "a"}\n{"_id"', r"train.json:2: not JSON"),
        ('{"_id": NaN}', r"train.json:1: not JSON \(NaN is not a JSON number\)"),
        ("[]", "the train files have no questions"),
        ("", "the train files have no questions"),
        (b'{"a": "\xff"}', r"train.json:1: what follows is not UTF-8"),
        (
            gzip.compress(b'{"_id": "a"}' * 99, mtime=0)[:-9],
            r"train.json:1: the file is damaged or trunc",
        ),
        (b"PK\x03\x04", "is a zip archive"),
    ],
)
def test_what_is_no_json_is_named_by_its_line(content, message, tmp_path, monkeypatch):
    monkeypatch.setitem(published.CONVERTERS, "hotpotqa", lambda *_: iter(()))
    _, dev_file = two_files(tmp_path)
    path = tmp_path / "train.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        run("hotpotqa", tmp_path / "d", path, dev_file)
    assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hotpotqa", {"answer": 3}, r"train.json:1, record 1: 'answer' is 3; expected a string"),
        ("hotpotqa", {"context": [["Rome"]]}, "'context' is .* expected a list of pairs"),
        ("hotpotqa", {"context": [["Rome", "text"]]}, "each with a list of sentences"),
        ("hotpotqa", {"context": [["Rome", ["\ud800"]]]}, "lone surrogate"),
        ("hotpotqa", {"type": "\ud800"}, "lone surrogate"),
        ("musique", {"paragraphs": "none"}, "'paragraphs' is 'none'; expected a list of objects"),
        ("nq", {"answers": "Tiber"}, "'answers' is 'Tiber'; expected a list of strings"),
        ("nq", {"positive_ctxs": [{"text": "x"}]}, "'positive_ctxs' entry 1: key 'title' is miss"),
        ("squad2", {"data": [{}]}, "train.json:1, record 1: key 'title' is missing"),
    ],
)
def test_a_malformed_record_is_named_by_its_line(name, change, message, tmp_path):
    record = {"hotpotqa": hotpotqa(1), "musique": musique(1), "nq": dpr(1), "squad2": squad2()}[
        name
    ]
    path = write(tmp_path / "train.json", record | change, form="array")
    with pytest.raises(DataError, match=message):
        run(name, tmp_path / "d", path, write(tmp_path / "dev.json", record))
    assert not list((tmp_path / "d").iterdir())


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("hotpotqaa", [], "unknown data set 'hotpotqaa'; did you mean 'hotpotqa'?"),
        ("zzz", [], "unknown data set 'zzz'; there are: nq, hotpotqa, "),
        ("nq", ["file.json"], "file.json: its name must contain either train or dev"),
        (
            "nq",
            ["train-or-dev.json"],
            "train-or-dev.json: its name must contain either train or dev",
        ),
        ("nq", ["constrained-dev.json"], "--from has no file of train questions"),
        ("nq", ["train.json"], "no file of dev questions, .* give biencoder-nq-train.json"),
        ("hotpotqa", ["psgs.tsv.gz"], "psgs.tsv.gz: only nq takes a TSV file of passages"),
    ],
)
def test_wrong_words_are_one_line(name, files, message, tmp_path):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        run(name, tmp_path, *(tmp_path / file for file in files))


def test_a_sample_of_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--max-questions is 0; give at least 1"):
        run("nq", tmp_path, max_questions=0)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train.json does not exist; check the path"):
        run("hotpotqa", tmp_path / "d", tmp_path / "train.json", tmp_path / "dev.json")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SetupError, match=r"cannot write hotpotqa to .*/file: Not a directory; free"
    ):
        run("hotpotqa", tmp_path / "file", *two_files(tmp_path))


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    files = two_files(tmp_path)
    run("hotpotqa", tmp_path / "d", *files)
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(published, "_write_line", full)
    with pytest.raises(SetupError, match="No space left on device; free space there"):
        run("hotpotqa", tmp_path / "d", *two_files(tmp_path, 2), overwrite=True)
    after = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}
    assert after == before


class Hub:
    """Stands in for the hub: the rows of each split, and what was asked for."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, *asked: Any) -> tuple[str, Any]:
        self.asked.append(asked)
        rows = self.splits[asked[2]]
        return "fingerprint", ((f"hub:{number}", row) for number, row in enumerate(rows))


def test_a_data_set_comes_from_the_hub(tmp_path):
    hub = Hub({"train": [hotpotqa_row(1)], "validation": [hotpotqa_row(2)]})
    words = ["hotpotqa", "--output", str(tmp_path / "d"), "--cache-dir", str(tmp_path / "c")]
    data.main(words, hub)
    assert hub.asked == [
        ("hotpotqa/hotpot_qa", "distractor", split, tmp_path / "c" / "hub", None)
        for split in ("train", "validation")
    ]
    (found,) = questions(tmp_path / "d", "hotpotqa", "dev", tmp_path)
    assert found.id == "5a2"


@pytest.mark.parametrize("kind", [DataError, SetupError])
def test_without_the_hub_the_message_names_the_files(kind, tmp_path):
    def broken(*_: Any) -> Any:
        raise kind("hub:hotpotqa/hotpot_qa cannot be loaded")

    with pytest.raises(kind, match=r"cannot be loaded; or give --from hotpot_train_v1.1.json and"):
        data.main(["hotpotqa", "--output", str(tmp_path)], broken)


def test_every_set_of_the_folder_has_a_converter():
    assert set(PUBLISHED) == set(published.CONVERTERS)


def test_a_recipe_runs_on_what_was_written(tmp_path, monkeypatch, capsys):
    counts = {"train": 40, "dev": 5}
    files = [
        write(tmp_path / f"biencoder-nq-{split}.json", *map(dpr, range(count)), form="array")
        for split, count in counts.items()
    ]
    run("nq", tmp_path / "d", *files)
    monkeypatch.setenv("RLRAG_DATA_DIR", str(tmp_path / "d"))
    flags = [
        "--run-dir",
        str(tmp_path / "run"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--dry-run",
    ]
    flags += ["--data.num-validation-questions", "5", "--environment.num-selected", "1"]
    train.main(["nq", *flags])
    said = capsys.readouterr()
    assert "35" in said.out


@pytest.mark.parametrize("made", [False, True])
def test_a_recipe_without_its_data_names_the_command(made, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RLRAG_DATA_DIR", raising=False)
    folder = tmp_path / "my data"
    if made:
        monkeypatch.setenv("RLRAG_DATA_DIR", str(folder))
    shown = f"'{folder}'" if made else "DIR"
    command = f"rlrag data nq --output {shown}"
    for spec in (RECIPES["nq"]().data.corpus, RECIPES["nq"]().data.eval_questions):
        with pytest.raises(DataError, match=rf"does not exist; .*: {re.escape(command)}$"):
            load_questions(spec, tmp_path)
    words = ["nq", "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    train.main([*words, "--dry-run"])
    assert f"may have fewer questions; this makes it: {command}\n" in capsys.readouterr().out


def test_other_files_of_the_folder_have_no_command(tmp_path, monkeypatch):
    monkeypatch.setenv("RLRAG_DATA_DIR", str(tmp_path))
    for name in ("questions/mine.train.jsonl", "questions/nq.other.jsonl", "nq.jsonl.gz"):
        with pytest.raises(DataError, match=r"does not exist; check the path$"):
            list(read_json_objects(tmp_path / name))
