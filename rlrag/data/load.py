"""Loads a corpus or a set of questions from the name of its source.

Sources: `factbook` (questions: `factbook:train` and `factbook:test`, of two hops
`factbook-hops:train` and `factbook-hops:test`), a FlashRAG JSONL file, plain or gzip, a BEIR folder
(questions: `FOLDER:SPLIT` where it has several splits), and `hub:ID[:SUBSET[:SPLIT]]` for
data sets of the `datasets` library.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrag.config import BUILTIN_CORPUS, RunConfig
from rlrag.data.checks import DataReport, Tally
from rlrag.data.corpus import DISK_FORMAT, NO_CORPUS, Corpus, DiskCorpus
from rlrag.data.corpus_writer import write_disk_corpus
from rlrag.data.factbook.passages import factbook_fingerprint, factbook_passages
from rlrag.data.factbook.questions import factbook_questions
from rlrag.data.factbook.two_hops import two_hop_questions
from rlrag.data.lines import check_exists
from rlrag.data.questions import QuestionSet
from rlrag.data.readers import (
    parse_passages,
    parse_questions,
    read_beir_questions,
    read_hub,
    read_passages,
    read_questions,
)
from rlrag.errors import DataError, SetupError
from rlrag.files.text import hidden_beside
from rlrag.records import Passage, Question

__all__ = ["QuestionSet", "corpus_of", "corpus_stamp", "cut_words", "load_corpus", "load_questions"]

_HUB_PREFIX = "hub:"
BUILTIN_QUESTIONS = {BUILTIN_CORPUS: factbook_questions, "factbook-hops": two_hop_questions}
_READING = 3
"""Counts the changes of what is read from equal files, so that older copies are made again."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PassageSource:
    """What tells one version of a source from another, and how to read it."""

    fingerprint: dict[str, Any]
    read: Callable[[Tally], Iterable[Passage]]


def load_corpus(spec: str, cache_dir: Path, passage_words: int) -> Corpus:
    """Read a corpus, or open the copy that an earlier call left in `cache_dir/corpora`.

    Args:
        spec: The source, as the module docstring lists them.
        cache_dir: Where the copy lies; it is made again when the source has changed.
        passage_words: Words of a passage's text that are kept; the title does not count.

    Raises:
        DataError: for a missing, malformed or empty source.
        SetupError: when a package is missing or the cache cannot be written.
    """
    source = _passage_source(spec, cache_dir)
    wanted = {
        "spec": spec,
        "passage_words": passage_words,
        "format": DISK_FORMAT,
        "reading": _READING,
        "fingerprint": source.fingerprint,
    }
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    directory = cache_dir / "corpora" / key
    corpus = _open_cached(directory, wanted)
    if corpus is None:
        tally = Tally()
        passages = cut_passages(source.read(tally), passage_words, tally)
        corpus = write_disk_corpus(passages, directory, source=wanted, tally=tally)
    _log_report(corpus.report)
    return corpus


def corpus_of(config: RunConfig) -> Corpus:
    """The corpus of a run; `NO_CORPUS` where `data.corpus` is unset.

    Raises:
        DataError: for a missing, malformed or empty source.
        SetupError: when a package is missing or the cache cannot be written.
    """
    data = config.data
    if data.corpus is None:
        return NO_CORPUS
    return load_corpus(data.corpus, config.cache_path, data.passage_words)


def corpus_stamp(spec: str | None) -> str | None:
    """Sizes and times of change of a corpus's files, as text; None where it is no file or folder.

    Raises:
        DataError: when it is missing.
    """
    if spec is None or spec == BUILTIN_CORPUS or spec.startswith(_HUB_PREFIX):
        return None
    path = _path_of(spec)
    check_exists(path)
    return json.dumps(_file_fingerprint(path), sort_keys=True)


def first_passages(spec: str) -> Iterator[Passage]:
    """The passages of a corpus on this machine, one at a time as they are read; no copy is made.

    Raises:
        DataError: for a missing or malformed source.
        SetupError: when the package of the built-in corpus is missing.
    """
    if spec == BUILTIN_CORPUS:
        return iter(factbook_passages())
    path = _path_of(spec)
    check_exists(path)
    return read_passages(path, Tally())


def load_questions(spec: str, cache_dir: Path, corpus: Corpus | None = None) -> QuestionSet:
    """Read and check a set of questions.

    Args:
        spec: The source, as the module docstring lists them.
        cache_dir: Where downloads are kept.
        corpus: When given and not empty, gold ids that it lacks are counted in the report.

    Raises:
        DataError: for a missing, malformed or empty source.
        SetupError: when a package is missing.
    """
    tally = Tally()
    questions = tuple(_questions_of(spec, cache_dir, tally))
    if not questions:
        raise DataError(f"{spec} has no questions with text; check that it is the right file")
    if corpus:
        for question in questions:
            for gold_id in question.gold_ids:
                if corpus.row_of(gold_id) is None:
                    tally.unknown_gold.add(gold_id)
    report = tally.report(spec, len(questions))
    _log_report(report)
    return QuestionSet.of(questions, report)


def cut_words(text: str, num_words: int) -> str:
    """The text up to the end of its word number `num_words`, spacing as it was.

    Example:
        >>> cut_words("one  two three", 2)
        'one  two'
    """
    match = re.match(rf"\s*+(?:\S++\s++){{{num_words - 1}}}\S++", text)
    return match.group() if match else text


def cut_passages(passages: Iterable[Passage], num_words: int, tally: Tally) -> Iterator[Passage]:
    """The passages with the first words of their texts; what is cut is counted."""
    for passage in passages:
        num_found = len(passage.text.split())
        tally.num_words += num_found
        if num_found > num_words:
            tally.num_cut_words += num_found - num_words
            tally.cut.add(passage.id)
        yield Passage(passage.id, passage.title, cut_words(passage.text, num_words))


def _log_report(report: DataReport) -> None:
    level = logging.INFO if report.is_clean else logging.WARNING
    _logger.log(level, "%s", report.summary())


def _open_cached(directory: Path, wanted: dict[str, Any]) -> DiskCorpus | None:
    if not os.path.exists(directory):  # where it cannot be looked into, writing it says why
        return None
    try:
        corpus = DiskCorpus(directory)
        if corpus.source == wanted:
            return corpus
        reason = "it was made from another source"
    except DataError as error:
        reason = str(error)
    _logger.warning("rebuilding the corpus in %s: %s", directory, reason)
    # It loses its name first, as other processes may find the same damage now.
    doomed = hidden_beside(directory)
    try:
        directory.rename(doomed)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SetupError(
            f"cannot replace the corpus in {directory}: {error.strerror}; delete it, or choose "
            "another cache_dir"
        ) from error
    shutil.rmtree(doomed, ignore_errors=True)
    return None


def _passage_source(spec: str, cache_dir: Path) -> _PassageSource:
    if spec == BUILTIN_CORPUS:
        fingerprint = {"kind": BUILTIN_CORPUS, "hash": factbook_fingerprint()}

        def read_factbook(tally: Tally) -> Iterator[Passage]:
            for passage in factbook_passages():
                tally.num_read += 1
                yield passage

        return _PassageSource(fingerprint, read_factbook)
    if spec.startswith(_HUB_PREFIX):
        version, records = read_hub(*_hub_parts(spec), cache_dir / "hub")
        return _PassageSource(
            {"kind": "hub", "hash": version}, lambda tally: parse_passages(records, tally)
        )
    path = _path_of(spec)
    check_exists(path)
    return _PassageSource(_file_fingerprint(path), lambda tally: read_passages(path, tally))


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Path, size and time of change of a file, or of all corpus files of a folder."""
    files = sorted(path.glob("corpus.jsonl*")) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return {
        "kind": "beir" if path.is_dir() else "jsonl",
        "path": str(path.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _questions_of(spec: str, cache_dir: Path, tally: Tally) -> Iterable[Question]:
    source, _, name = spec.partition(":")
    if source in BUILTIN_QUESTIONS:
        questions = BUILTIN_QUESTIONS[source](name)
        tally.num_read = len(questions)
        return questions
    if spec.startswith(_HUB_PREFIX):
        _, records = read_hub(*_hub_parts(spec), cache_dir / "hub")
        return parse_questions(records, tally)
    path, split = _path_of(spec), None
    if not os.path.exists(path) and ":" in spec:
        folder, _, name = spec.rpartition(":")
        if os.path.isdir(_path_of(folder)):
            path, split = _path_of(folder), name
    check_exists(path)
    if path.is_dir():
        return read_beir_questions(path, split, tally)
    return read_questions(path, tally)


def _path_of(spec: str) -> Path:
    # Unlike Path.expanduser, this leaves the `~` of an unknown user where it is.
    return Path(os.path.expanduser(spec))


def _hub_parts(spec: str) -> tuple[str, str | None, str | None]:
    parts = spec.removeprefix(_HUB_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(
            f"{spec!r} is not the name of a data set; write hub:ID, hub:ID:SUBSET or "
            "hub:ID:SUBSET:SPLIT"
        )
    named = [part or None for part in parts] + [None, None]
    return parts[0], named[1], named[2]
