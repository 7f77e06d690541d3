"""Readers of passages and questions in the supported file formats.

Formats: FlashRAG JSONL, BEIR folders and data sets of the `datasets` library. A bad line raises
DataError; a passage or question without text is skipped and counted in the tally.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlrag.data.checks import Tally
from rlrag.data.lines import (
    check_exists,
    read_lines,
    read_objects,
    take_id,
    take_metadata,
    take_text,
    take_texts,
)
from rlrag.errors import DataError, SetupError
from rlrag.records import Passage, Question

ID_KEYS = ("id", "_id")
QUESTION_KEYS = ("question", "text")
PlacedRecords = Iterable[tuple[str, dict[str, Any]]]


def split_contents(contents: str) -> tuple[str, str]:
    r"""Title and text of FlashRAG's `contents`: the first line is the title, if there are more.

    A title within double quotes loses them; doubled quotes inside become single ones.

    Example:
        >>> split_contents('"Rome"\nA city.')
        ('Rome', 'A city.')
        >>> split_contents("No title here.")
        ('', 'No title here.')
    """
    title, newline, text = contents.partition("\n")
    if not newline:
        return "", contents.strip()
    return _unquoted(title), text.strip()


def _unquoted(title: str) -> str:
    title = title.strip()
    if len(title) >= 2 and title[0] == title[-1] == '"':
        title = title[1:-1].replace('""', '"').strip()
    return title


def _titled(title: str, contents: str) -> tuple[str, str]:
    r"""Title and text where both are given: `contents` may begin with the title, or be the text.

    Example:
        >>> _titled("Rome", '"Rome"\nA city.'), _titled("Rome", "A city.\nIts river is the Tiber.")
        (('Rome', 'A city.'), ('Rome', 'A city.\nIts river is the Tiber.'))
    """
    title = _unquoted(title)
    first, text = split_contents(contents)
    if not title or (text and first.casefold() == title.casefold()):
        return first, text
    return title, contents.strip()


def parse_passages(records: PlacedRecords, tally: Tally) -> Iterator[Passage]:
    """Passages of records with `id` and `contents`, or with `id` (`_id`), `title` and `text`.

    Where a record has a title beside its contents, that is the title.

    Args:
        records: Pairs (place for messages, record).
        tally: Counts records and passages without text, which are skipped.

    Raises:
        DataError: for a record without these keys or with values of another type.
    """
    for place, record in records:
        tally.num_read += 1
        passage_id = take_id(record, ID_KEYS, place)
        has_title = record.get("title") is not None
        title = take_text(record, ("title",), place).strip() if has_title else ""
        if "contents" in record or "text" not in record:
            title, text = _titled(title, take_text(record, ("contents",), place))
        else:
            text = take_text(record, ("text",), place).strip()
        if text:
            yield Passage(id=passage_id, title=title, text=text)
        else:
            tally.empty.add(passage_id)


def parse_questions(records: PlacedRecords, tally: Tally) -> Iterator[Question]:
    """Questions of records with `id`, `question`, `golden_answers` and perhaps `metadata`.

    BEIR's queries have `_id` and `text` instead; their answers, if any, stand in the metadata.
    Duplicate ids and questions without text are skipped and counted; the first is kept.

    Raises:
        DataError: for a record without these keys or with values of another type.
    """
    seen: set[str] = set()
    for place, record in records:
        tally.num_read += 1
        question_id = take_id(record, ID_KEYS, place)
        text = take_text(record, QUESTION_KEYS, place).strip()
        metadata = take_metadata(record, place)
        if "question" in record or "golden_answers" in record:
            answers = take_texts(record, "golden_answers", place, required=True)
        else:
            answers = take_texts(metadata, "golden_answers", f"{place}: metadata")
        if not text:
            tally.empty.add(question_id)
        elif question_id in seen:
            tally.duplicates.add(question_id)
        else:
            seen.add(question_id)
            yield Question(question_id, text, answers, metadata)


def read_passages(path: Path, tally: Tally) -> Iterator[Passage]:
    """Passages of a FlashRAG JSONL file or of a BEIR folder, in the order of the file."""
    if path.is_dir():
        path = _beir_file(path, "corpus")
    return parse_passages(read_objects(path), tally)


def read_questions(path: Path, tally: Tally) -> Iterator[Question]:
    """Questions of a FlashRAG JSONL file, in the order of the file."""
    return parse_questions(read_objects(path), tally)


def read_beir_questions(folder: Path, split: str | None, tally: Tally) -> Iterator[Question]:
    """Queries of a BEIR folder that `qrels/SPLIT.tsv` judges, with their relevant passages.

    Passages with a positive score become `metadata["gold_ids"]`. A folder without `qrels` gives
    all its queries; one with a single relevance file needs no `split`.

    Raises:
        DataError: for malformed lines, or when the split is missing or has to be named.
    """
    qrels = _qrels_file(folder, split)
    gold = None if qrels is None else _read_qrels(qrels)
    for question in read_questions(_beir_file(folder, "queries"), tally):
        if gold is None:
            yield question
        elif question.id in gold:
            metadata = {**question.metadata, "gold_ids": gold.pop(question.id)}
            yield Question(question.id, question.question, question.golden_answers, metadata)
    for question_id in gold or ():
        tally.unknown_questions.add(question_id)


def _beir_file(folder: Path, stem: str) -> Path:
    check_exists(folder)
    for name in (f"{stem}.jsonl", f"{stem}.jsonl.gz"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; give a BEIR folder, or a file"
    )


def _qrels_file(folder: Path, split: str | None) -> Path | None:
    found = sorted((folder / "qrels").glob("*.tsv"))
    if split is None and len(found) < 2:
        return found[0] if found else None
    for path in found:
        if path.stem == split:
            return path
    names = ", ".join(path.stem for path in found) or "none"
    raise DataError(
        f"{folder} has relevance splits {names} and not {split}; choose one with FOLDER:SPLIT"
    )


def _read_qrels(path: Path) -> dict[str, list[str]]:
    """Relevant passage ids by query id, from lines `query-id TAB corpus-id TAB score`."""
    gold: dict[str, list[str]] = {}
    expected = "expected query id, passage id and an integer score, separated by tabs"
    for place, line in read_lines(path):
        columns = line.rstrip("\r\n").split("\t")
        if place == f"{path}:1" and columns[0] == "query-id":
            continue
        if len(columns) != 3 or not columns[0] or not columns[1]:
            raise DataError(f"{place}: {len(columns)} columns; {expected}")
        try:
            score = int(columns[2])
        except ValueError as error:
            raise DataError(f"{place}: score {columns[2]!r}; {expected}") from error
        relevant = gold.setdefault(columns[0], [])
        if score > 0 and columns[1] not in relevant:
            relevant.append(columns[1])
    if not gold:
        raise DataError(f"{path} has no lines; {expected}")
    return gold


def read_hub(
    dataset_id: str,
    subset: str | None,
    split: str | None,
    cache_dir: Path,
    data_files: Mapping[str, str] | None = None,
) -> tuple[str, PlacedRecords]:
    """A data set of the `datasets` library: its fingerprint, and its records as they stream by.

    Args:
        dataset_id: Id on the hub, or a local folder that the library can load.
        subset: Name of a configuration of the data set.
        split: Name of a split; needed where the data set has several.
        cache_dir: Where the library keeps what it downloads.
        data_files: Files by split, where `dataset_id` is the name of their format.

    Raises:
        SetupError: when the library is not installed.
        DataError: when the data set cannot be loaded or the split is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise SetupError(
            f"hub:{dataset_id} needs the package datasets; install it with the extra 'hub': "
            "pip install -e '.[hub]'"
        ) from error
    name = ":".join(part for part in ("hub", dataset_id, subset, split) if part)
    try:
        loaded = datasets.load_dataset(
            dataset_id, subset, data_files=data_files, cache_dir=str(cache_dir)
        )
    except Exception as error:  # StopIteration for an empty file, for one
        reason = error.__cause__ or error
        raise DataError(
            f"{name} cannot be loaded ({type(reason).__name__}: {reason}); check the id, the "
            "subset, its files and the network"
        ) from error
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        raise DataError(
            f"{name} has splits {', '.join(loaded)}; choose one with hub:ID:SUBSET:SPLIT"
        )
    dataset = loaded[split]
    records = (
        (f"{name}:{number}", _without_nulls(row)) for number, row in enumerate(dataset, start=1)
    )
    return str(dataset._fingerprint), records


def _without_nulls(value: Any) -> Any:
    # The library fills every column of every row; what a row lacks is null there.
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value
