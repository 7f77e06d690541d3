"""A corpus: passages by row with a content hash, in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlrag.data.checks import DataReport
from rlrag.errors import DataError, SetupError
from rlrag.files.checksums import difference
from rlrag.records import Passage

DISK_FORMAT = 2
PASSAGES_FILE = "passages.jsonl"
OFFSETS_FILE = "offsets.bin"
IDS_FILE = "ids.bin"
META_FILE = "meta.json"
_FILES = (PASSAGES_FILE, OFFSETS_FILE, IDS_FILE)

OFFSET_TYPE = np.dtype("<u8")
# 8 bytes of id hash, then 8 bytes of row, both big-endian: sorting the bytes sorts by hash, then
# by row, in place on a memory map. NumPy sorts a byte string without a second copy of the array.
ID_RECORD_TYPE = np.dtype("S16")


class Corpus(Protocol):
    """Passages numbered from 0, in the order of their source."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, titles and texts in order, as 64 hex digits."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Passage: ...

    def __iter__(self) -> Iterator[Passage]: ...

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, or None where the corpus lacks it."""
        ...


def encode_passage(passage: Passage) -> bytes:
    r"""One line of canonical JSON: what a content hash covers and what a disk corpus stores.

    Example:
        >>> encode_passage(Passage("p1", "Rome", "A city."))
        b'["p1","Rome","A city."]\n'

    Raises:
        DataError: when a text holds half of a surrogate pair, which no encoding can store.
    """
    parts = [passage.id, passage.title, passage.text]
    try:
        return (json.dumps(parts, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"passage {passage.id!r} contains the lone surrogate {error.object[error.start]!r}, "
            "which is not Unicode text; repair the source"
        ) from error


def decode_passage(line: bytes) -> Passage:
    """Read back what `encode_passage` wrote."""
    return Passage(*json.loads(line))


def hash_id(passage_id: str) -> bytes:
    """Eight bytes that an id is looked up by; two ids may share them."""
    return hashlib.blake2b(passage_id.encode(), digest_size=8).digest()


def _check_row(row: int, num_passages: int) -> int:
    # A search that finds too little reports row -1; it must not become the last passage.
    if not 0 <= row < num_passages:
        raise IndexError(f"row {row} is outside the corpus of {num_passages} passages")
    return int(row)


class MemoryCorpus:
    """A corpus held in a tuple: for built-in texts and tests.

    Example:
        >>> corpus = MemoryCorpus([Passage("p1", "Rome", "A city."), Passage("p2", "", "Text.")])
        >>> len(corpus), corpus[1].text, corpus.row_of("p2"), corpus.row_of("p3")
        (2, 'Text.', 1, None)
    """

    def __init__(self, passages: Iterable[Passage]) -> None:
        self._passages = tuple(passages)
        if not self._passages:
            raise DataError("the corpus has no passages; give at least one")
        self._rows: dict[str, int] = {}
        digest = hashlib.sha256()
        for row, passage in enumerate(self._passages):
            first = self._rows.setdefault(passage.id, row)
            if first != row:
                raise DataError(
                    f"passage id {passage.id!r} is used in rows {first} and {row}; give each "
                    "passage a unique id"
                )
            digest.update(encode_passage(passage))
        self._content_hash = digest.hexdigest()

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, titles and texts in order, as 64 hex digits."""
        return self._content_hash

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: int) -> Passage:
        return self._passages[_check_row(row, len(self))]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, or None where the corpus lacks it."""
        return self._rows.get(passage_id)


class _NoCorpus:
    """Not a single passage."""

    content_hash = hashlib.sha256().hexdigest()

    def __len__(self) -> int:
        return 0

    def __getitem__(self, row: int) -> Passage:
        _check_row(row, 0)
        raise AssertionError  # no row is inside

    def __iter__(self) -> Iterator[Passage]:
        return iter(())

    def row_of(self, passage_id: str) -> int | None:
        return None


NO_CORPUS: Corpus = _NoCorpus()
"""What a run has whose retriever brings all passages with their texts."""


class ExtendedCorpus:
    """A corpus with the passages that a search brought behind its own.

    Those that were brought for different questions may share an id: each text has a row.

    Example:
        >>> brought = (Passage("p3", "", "New."),)
        >>> corpus = ExtendedCorpus(MemoryCorpus([Passage("p1", "Rome", "A city.")]), brought)
        >>> len(corpus), corpus[1].text, corpus.row_of("p3")
        (2, 'New.', 1)
    """

    def __init__(self, corpus: Corpus, brought: Sequence[Passage]) -> None:
        self._corpus = corpus
        self._brought = tuple(brought)
        self._rows: dict[str, int] = {}
        for row, passage in enumerate(self._brought, start=len(corpus)):
            self._rows.setdefault(passage.id, row)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the corpus's own hash and of all that was brought, as 64 hex digits."""
        digest = hashlib.sha256(self._corpus.content_hash.encode())
        for passage in self._brought:
            digest.update(encode_passage(passage))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._corpus) + len(self._brought)

    def __getitem__(self, row: int) -> Passage:
        row = _check_row(row, len(self))
        num_own = len(self._corpus)
        return self._corpus[row] if row < num_own else self._brought[row - num_own]

    def __iter__(self) -> Iterator[Passage]:
        yield from self._corpus
        yield from self._brought

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, the first of several; None where nobody has it."""
        row = self._corpus.row_of(passage_id)
        return self._rows.get(passage_id) if row is None else row


class DiskCorpus:
    """A corpus in a directory, read through memory maps, so that it takes almost no memory.

    The directory holds the encoded passages one after another, the offset of each, a table of
    (id hash, row) sorted by hash, and `meta.json` with their checksums. Copies for other processes
    carry the path only.

    Raises:
        DataError: when the directory is not a complete corpus of this format.
        SetupError: when it cannot be read.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        meta = self._read_meta()
        try:
            self._content_hash: str = meta["content_hash"]
            self._num_passages: int = meta["num_passages"]
            self._source: Mapping[str, Any] = meta["source"]
            self._report = DataReport.from_dict(meta["checks"])
            files = {name: dict(meta["files"][name]) for name in _FILES}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self._directory / META_FILE} is damaged ({type(error).__name__}: {error}); "
                f"delete {self._directory} and load the corpus again"
            ) from error
        for name, expected in files.items():
            path = self._directory / name
            reason = difference(path, expected, self._directory / META_FILE)
            if reason:
                raise DataError(
                    f"{path} is damaged: {reason}; delete {self._directory} and load the corpus "
                    "again"
                )
        with open(self._directory / PASSAGES_FILE, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = np.memmap(self._directory / OFFSETS_FILE, dtype=OFFSET_TYPE, mode="r")
        self._ids = np.memmap(self._directory / IDS_FILE, dtype=ID_RECORD_TYPE, mode="r")

    def _read_meta(self) -> dict[str, Any]:
        path = self._directory / META_FILE
        try:
            meta = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError) as error:
            raise DataError(
                f"{self._directory} is not a corpus on disk: {path.name} cannot be read ({error}); "
                "load the corpus again from its source"
            ) from error
        except OSError as error:  # which does not say that anything is wrong with the corpus
            raise SetupError(
                f"{path} cannot be read: {error.strerror}; give this user permission to read it, "
                "or choose another cache_dir"
            ) from error
        if not isinstance(meta, dict) or meta.get("format") != DISK_FORMAT:
            raise DataError(
                f"{path} is not of corpus format {DISK_FORMAT}; delete {self._directory} and load "
                "the corpus again from its source"
            )
        return meta

    def __reduce__(self) -> tuple[type[DiskCorpus], tuple[Path]]:
        return DiskCorpus, (self._directory,)

    @property
    def directory(self) -> Path:
        """Where the corpus lies."""
        return self._directory

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, titles and texts in order, as 64 hex digits."""
        return self._content_hash

    @property
    def source(self) -> Mapping[str, Any]:
        """What the corpus was made from, as its writer was told."""
        return self._source

    @property
    def report(self) -> DataReport:
        """What was found while the source was read."""
        return self._report

    def __len__(self) -> int:
        return self._num_passages

    def __getitem__(self, row: int) -> Passage:
        row = _check_row(row, self._num_passages)
        return decode_passage(self._data[int(self._offsets[row]) : int(self._offsets[row + 1])])

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(self._num_passages))

    def row_of(self, passage_id: str) -> int | None:
        """Row of a passage id, or None where the corpus lacks it."""
        wanted = hash_id(passage_id)
        position = int(np.searchsorted(self._ids, np.array(wanted, dtype=ID_RECORD_TYPE)))
        while position < self._num_passages:
            found, row = read_id_record(self._ids, position)
            if found != wanted:
                return None
            if self[row].id == passage_id:
                return row
            position += 1
        return None


def read_id_record(ids: np.ndarray, position: int) -> tuple[bytes, int]:
    """The id hash and the row of one record of the id table."""
    record = ids[position : position + 1].tobytes()
    return record[:8], int.from_bytes(record[8:], "big")
