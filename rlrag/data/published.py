"""Converts public data sets to the format of the recipes' data folder.

A converter turns a record into questions, each with the passages that its publishers gave with it.
The records are those of the published files, or the rows of the same set on the hub, which has some
lists of pairs as two columns.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import heapq
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rlrag.data.checks import Tally
from rlrag.data.folder import corpus_path, questions_path
from rlrag.data.lines import checked_text, read_lines, shown, take_id, take_text, take_texts
from rlrag.data.readers import PlacedRecords
from rlrag.errors import ConfigError, DataError, RlragError, SetupError
from rlrag.files.text import hidden_beside
from rlrag.records import Passage, Question

_PASSAGE_ID_KEYS = ("passage_id", "psg_id", "docid")
_TSV_COLUMNS = ["id", "text", "title"]


@dataclass(frozen=True)
class Asked:
    """A question, and the passages that came with it."""

    question: Question
    passages: tuple[Passage, ...]


@dataclass
class Written:
    """What a folder was given: questions by split, passages, and what was left out of each."""

    num_questions: dict[str, int] = field(default_factory=dict)
    num_passages: int = 0
    left_out: list[str] = field(default_factory=list)


def convert(
    name: str,
    splits: Mapping[str, PlacedRecords],
    folder: Path,
    *,
    passages: Iterable[Passage] = (),
    max_questions: int | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a data set as recipes read it: all its files, or none.

    Args:
        name: One of `CONVERTERS`.
        splits: The records of each split.
        folder: What `RLRAG_DATA_DIR` will name; it is made.
        passages: Passages beside those of the questions; their ids differ from each other.
        max_questions: Questions of a split that are kept, the same ones every time.
        overwrite: Whether to replace the files of an earlier call.

    Raises:
        ConfigError: when the folder has the data set already.
        DataError: for a malformed record, and where a split or the corpus would be empty.
        SetupError: when the folder cannot be written, as on a full disk.
    """
    corpus = corpus_path("", name)
    targets = [corpus, *(questions_path("", name, split) for split in splits)]
    for target in targets:
        if not overwrite and os.path.exists(folder / target):
            raise ConfigError(
                f"{folder / target} exists; add --overwrite to replace this data set, or give "
                "another --output"
            )
    written = Written()
    staging = hidden_beside(folder / name)
    try:
        for target in targets:
            (staging / target).parent.mkdir(parents=True, exist_ok=True)
        with _packed(staging / corpus) as corpus_file:
            seen: set[str] = set()
            tally = Tally()
            for split, records in splits.items():
                asked = _sampled(_asked(name, split, records), max_questions)
                with (staging / questions_path("", name, split)).open("w") as file:
                    _write_questions(asked, split, file, corpus_file, seen, tally, written)
            for passage in passages:
                if passage.id not in seen:
                    _write_passage(passage, corpus_file, tally)
        empty = tally.empty.finding()
        written.num_passages = tally.num_read - empty.count
        if not written.num_passages:
            raise DataError(f"{name} has no passages in these files; give a file of passages too")
        if empty:
            written.left_out.append(f"passages without text: {empty}")
        for target in targets:
            (folder / target).parent.mkdir(exist_ok=True)
            os.replace(staging / target, folder / target)
    except RlragError:  # some are an OSError too, and say themselves what is wrong
        raise
    except OSError as error:
        raise SetupError(
            f"cannot write {name} to {folder}: {error.strerror or error}; free space there or give "
            "another --output"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return written


def read_passages_tsv(path: Path) -> Iterator[Passage]:
    """Passages of a table as DPR's `psgs_w100.tsv`: id, text and title, separated by tabs.

    Raises:
        DataError: for a malformed line.
    """
    place = f"{path}:1"

    def lines() -> Iterator[str]:
        nonlocal place
        for place, line in read_lines(path):  # noqa: B007 - read outside
            yield line

    try:
        rows = csv.reader(lines(), delimiter="\t")
        for columns in rows:
            if len(columns) != len(_TSV_COLUMNS) or not columns[0]:
                raise DataError(
                    f"{place}: {len(columns)} columns; expected id, text and title, separated by "
                    "tabs"
                )
            if columns != _TSV_COLUMNS:
                yield Passage(columns[0], columns[2], columns[1])
    except csv.Error as error:
        raise DataError(f"{place}: {error}; expected id, text and title, separated by tabs") from (
            error
        )


def _nq(place: str, record: dict[str, Any], number_id: str) -> Iterator[Asked]:
    """Of DPR, of Tevatron's copy of it, or of NQ-open, which has no passages."""
    gold = _contexts(record, ("positive_ctxs", "positive_passages"), place)
    other = _contexts(record, ("hard_negative_ctxs", "negative_ctxs", "negative_passages"), place)
    yield _asked_one(
        "nq",
        number_id,
        take_text(record, ("question", "query"), place),
        take_texts(record, "answers" if "answers" in record else "answer", place, required=True),
        {"type": "single-hop", "gold_ids": _ids(gold)},
        (*gold, *other),
    )


def _hotpotqa(
    place: str, record: dict[str, Any], number_id: str, name: str = "hotpotqa"
) -> Iterator[Asked]:
    passages = []
    for title, sentences in _pairs(record, "context", "sentences", place):
        is_list = isinstance(sentences, list)
        if not is_list or not all(isinstance(text, str) for text in (title, *sentences)):
            raise DataError(
                f"{place}: 'context' contains {shown([title, sentences])}; expected titles, each "
                "with a list of sentences"
            )
        text = " ".join(filter(None, map(str.strip, sentences)))
        passages.append(_passage(name, title, checked_text(text, f"{place}: 'context'")))
    named = {title for title, _ in _pairs(record, "supporting_facts", "sent_id", place)}
    metadata: dict[str, Any] = {
        "type": record.get("type"),
        "gold_ids": _ids(passage for passage in passages if passage.title in named),
        "candidate_ids": _ids(passages),
    }
    if "evidences" in record:
        metadata["evidences"] = record["evidences"]
    yield _asked_one(
        name,
        take_id(record, ("_id", "id"), place),
        take_text(record, ("question",), place),
        (take_text(record, ("answer",), place),),
        metadata,
        passages,
    )


def _2wiki(place: str, record: dict[str, Any], number_id: str) -> Iterator[Asked]:
    return _hotpotqa(place, record, number_id, "2wiki")


def _musique(place: str, record: dict[str, Any], number_id: str) -> Iterator[Asked]:
    """Questions of the full set that its passages do not answer have no golden answer."""
    question_id = take_id(record, ("id",), place)
    passages, gold, id_of = [], [], {}
    for number, paragraph in enumerate(_objects(record, "paragraphs", place)):
        passage = _passage(
            "musique",
            take_text(paragraph, ("title",), place),
            take_text(paragraph, ("paragraph_text",), place),
        )
        passages.append(passage)
        id_of[paragraph.get("idx", number)] = passage.id
        if paragraph.get("is_supporting"):
            gold.append(passage)
    hops = [
        {
            "question": take_text(hop, ("question",), place),
            "answer": take_text(hop, ("answer",), place),
            "gold_id": id_of.get(hop.get("paragraph_support_idx")),
        }
        for hop in _objects(record, "question_decomposition", place)
    ]
    answers = (
        take_text(record, ("answer",), place),
        *take_texts(record, "answer_aliases", place),
    )
    yield _asked_one(
        "musique",
        question_id,
        take_text(record, ("question",), place),
        answers if record.get("answerable", True) else (),
        {
            "type": question_id.partition("__")[0],
            "gold_ids": _ids(gold),
            "candidate_ids": _ids(passages),
            "hops": hops,
        },
        passages,
    )


def _squad2(place: str, record: dict[str, Any], number_id: str) -> Iterator[Asked]:
    """Of the published file, which is one object, or of the hub, a row a question."""
    if "data" not in record:
        texts = record.get("answers")
        answers = take_texts(texts if isinstance(texts, dict) else {}, "text", place, required=True)
        yield _of_squad2(record, take_text(record, ("title",), place), record, answers, place)
        return
    for article in _objects(record, "data", place):
        title = take_text(article, ("title",), place)
        within = f"{place}, article {title!r}"
        for paragraph in _objects(article, "paragraphs", within):
            for asked in _objects(paragraph, "qas", within):
                found = [
                    take_text(each, ("text",), within)
                    for each in _objects(asked, "answers", within)
                ]
                yield _of_squad2(asked, title, paragraph, found, within)


def _of_squad2(
    asked: dict[str, Any],
    title: str,
    paragraph: dict[str, Any],
    answers: Iterable[str],
    place: str,
) -> Asked:
    title = title.replace("_", " ")  # as in Wikipedia's addresses
    passage = _passage("squad2", title, take_text(paragraph, ("context",), place))
    return _asked_one(
        "squad2",
        take_id(asked, ("id",), place),
        take_text(asked, ("question",), place),
        answers,
        {"type": "single-hop", "gold_ids": [passage.id]},
        [passage],
    )


CONVERTERS: Mapping[str, Callable[[str, dict[str, Any], str], Iterator[Asked]]] = {
    "nq": _nq,
    "hotpotqa": _hotpotqa,
    "musique": _musique,
    "squad2": _squad2,
    "2wiki": _2wiki,
}
"""Questions of a record, by data set; the last argument is an id for those that have none."""


def _asked(name: str, split: str, records: PlacedRecords) -> Iterator[Asked]:
    for number, (place, record) in enumerate(records):
        yield from CONVERTERS[name](place, record, f"{name}-{split}-{number}")


def _sampled(asked: Iterator[Asked], count: int | None) -> Iterable[Asked]:
    """So many in their order, by the hashes of their ids; no more than these are held."""
    if count is None:
        return asked
    kept = heapq.nsmallest(
        count,
        enumerate(asked),
        key=lambda one: hashlib.sha256(one[1].question.id.encode()).digest(),
    )
    return [each for _, each in sorted(kept, key=lambda one: one[0])]


def _write_questions(
    asked: Iterable[Asked],
    split: str,
    file: TextIO,
    corpus_file: TextIO,
    seen: set[str],
    passages: Tally,
    written: Written,
) -> None:
    """Write the questions of a split, and those of their passages that were not seen before."""
    ids: set[str] = set()
    tally = Tally()
    for each in asked:
        question = each.question
        if question.id in ids:
            tally.duplicates.add(question.id)
            continue
        if not question.question:
            tally.empty.add(question.id)
            continue
        ids.add(question.id)
        record = {
            "id": question.id,
            "question": question.question,
            "golden_answers": list(question.golden_answers),
            "metadata": question.metadata,
        }
        _write_line(record, file)
        for passage in each.passages:
            if passage.id not in seen:
                seen.add(passage.id)
                _write_passage(passage, corpus_file, passages)
    if not ids:
        raise DataError(f"the {split} files have no questions; check that they are the right ones")
    written.num_questions[split] = len(ids)
    for what, found in (
        (f"{split} questions whose id came before", tally.duplicates.finding()),
        (f"{split} questions without text", tally.empty.finding()),
    ):
        if found:
            written.left_out.append(f"{what}: {found}")


def _write_passage(passage: Passage, file: TextIO, tally: Tally) -> None:
    tally.num_read += 1
    if not passage.text.strip():
        tally.empty.add(passage.id)
        return
    title = " ".join(passage.title.split()).replace('"', '""')
    record = {"id": passage.id, "contents": f'"{title}"\n{passage.text.strip()}'}
    _write_line(record, file)


def _write_line(record: dict[str, Any], file: TextIO) -> None:
    line = json.dumps(record, ensure_ascii=False)
    file.write(checked_text(line, f"the record {record['id']!r}") + "\n")


@contextmanager
def _packed(path: Path) -> Iterator[TextIO]:
    """A new gzip file of text, equal for equal texts."""
    with (
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file,
    ):
        yield file


def _asked_one(
    name: str,
    question_id: str,
    question: str,
    answers: Iterable[str],
    metadata: dict[str, Any],
    passages: Iterable[Passage],
) -> Asked:
    golden = tuple(dict.fromkeys(answer.strip() for answer in answers))
    return Asked(
        Question(question_id, question.strip(), golden, {"dataset": name, **metadata}),
        tuple(passages),
    )


def _passage(name: str, title: str, text: str) -> Passage:
    """A passage without an id of its publishers; equal ones have the same."""
    digest = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()
    return Passage(f"{name}-{digest[:16]}", title, text)


def _ids(passages: Iterable[Passage]) -> list[str]:
    return list(dict.fromkeys(passage.id for passage in passages))


def _contexts(record: dict[str, Any], keys: Iterable[str], place: str) -> list[Passage]:
    """The passages in lists of a record, under the ids that DPR gave them where they have them."""
    found = []
    for key in keys:
        for number, context in enumerate(_objects(record, key, place), start=1):
            within = f"{place}: {key!r} entry {number}"
            passage = _passage(
                "nq",
                take_text(context, ("title",), within),
                take_text(context, ("text",), within),
            )
            if any(name in context for name in _PASSAGE_ID_KEYS):
                own = take_id(context, _PASSAGE_ID_KEYS, within)
                passage = Passage(own, passage.title, passage.text)
            found.append(passage)
    return found


def _objects(record: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """The list of objects under a key, empty when it is missing.

    Raises:
        DataError: when it is anything else.
    """
    values = record.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{place}: {key!r} is {shown(values)}; expected a list of objects")
    return values


def _pairs(record: dict[str, Any], key: str, column: str, place: str) -> list[tuple[Any, Any]]:
    """The list of pairs (title, value) under a key, on the hub two lists in an object.

    Raises:
        DataError: when it is missing or anything else.
    """
    values = record.get(key)
    if isinstance(values, dict):
        titles, others = values.get("title"), values.get(column)
        if isinstance(titles, list) and isinstance(others, list) and len(titles) == len(others):
            return list(zip(titles, others, strict=True))
    elif isinstance(values, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in values
    ):
        return [(title, value) for title, value in values]
    raise DataError(f"{place}: {key!r} is {shown(values)}; expected a list of pairs")
