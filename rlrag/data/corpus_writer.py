"""Streams passages into a corpus directory on disk.

Memory does not grow with the corpus: passages and ids go to files as they come, the id table is
sorted in place on its memory map, and equal ids are found as neighbours in that table.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlrag.data.checks import Tally
from rlrag.data.corpus import (
    DISK_FORMAT,
    ID_RECORD_TYPE,
    IDS_FILE,
    META_FILE,
    OFFSET_TYPE,
    OFFSETS_FILE,
    PASSAGES_FILE,
    DiskCorpus,
    decode_passage,
    encode_passage,
    hash_id,
    read_id_record,
)
from rlrag.errors import DataError, RlragError, SetupError
from rlrag.files.checksums import checksum
from rlrag.files.text import hidden_beside
from rlrag.records import Passage

SCAN_ROWS = 1024
"""Records looked at together when the id table is scanned."""
DROPPED_FILE = "dropped.bin"


def write_disk_corpus(
    passages: Iterable[Passage],
    directory: Path,
    *,
    source: Mapping[str, Any] | None = None,
    tally: Tally | None = None,
) -> DiskCorpus:
    """Write passages into `directory`, which must not exist yet, and open the result.

    Everything is written beside `directory` and renamed at the end, so a stop at any moment leaves
    no directory that looks like a corpus.

    Args:
        passages: Read once, in order.
        directory: Where the corpus will lie; its parent is made.
        source: Kept in `meta.json`; a reader compares it with what it wants.
        tally: Counts passages whose id came before; they are skipped. Without it they are refused.

    Raises:
        DataError: for an empty corpus, or a duplicate id without `tally`.
        SetupError: when the disk is full or the place cannot be written.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = hidden_beside(directory)
        staging.mkdir()
    except OSError as error:
        raise _write_error(directory, error) from error
    try:
        num_passages = _fill(staging, passages, source or {}, tally)
        if num_passages == 0:
            raise DataError(
                f"no passage with text was found in {(source or {}).get('spec', 'the source')}; "
                "check that it is the right file"
            )
        return _publish(staging, directory)
    except RlragError:
        raise
    except OSError as error:
        raise _write_error(directory, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_error(directory: Path, error: OSError) -> SetupError:
    return SetupError(
        f"cannot write the corpus to {directory}: {error.strerror or error}; free space there or "
        "choose another cache_dir"
    )


def _fill(
    staging: Path, passages: Iterable[Passage], source: Mapping[str, Any], tally: Tally | None
) -> int:
    digest, num_passages = _write_rows(staging, passages)
    if num_passages and _mark_duplicates(staging, num_passages, refuse=tally is None):
        assert tally is not None
        kept = staging / "kept"
        kept.mkdir()
        digest, num_passages = _write_rows(kept, _kept_passages(staging, num_passages, tally))
        _mark_duplicates(kept, num_passages, refuse=True)
        for name in (PASSAGES_FILE, OFFSETS_FILE, IDS_FILE):
            os.replace(kept / name, staging / name)
        kept.rmdir()
        (staging / DROPPED_FILE).unlink()
    report = (tally or Tally()).report(str(source.get("spec", "passages")), num_passages)
    meta = {
        "format": DISK_FORMAT,
        "content_hash": digest,
        "num_passages": num_passages,
        "files": {
            name: checksum(staging / name) for name in (PASSAGES_FILE, OFFSETS_FILE, IDS_FILE)
        },
        "source": dict(source),
        "checks": report.to_dict(),
    }
    with open(staging / META_FILE, "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        _flush_to_disk(file)
    return num_passages


def _write_rows(folder: Path, passages: Iterable[Passage]) -> tuple[str, int]:
    """Write passages, offsets and unsorted id records; return content hash and number."""
    digest = hashlib.sha256()
    row, offset = 0, 0
    with (
        open(folder / PASSAGES_FILE, "wb") as data,
        open(folder / OFFSETS_FILE, "wb") as offsets,
        open(folder / IDS_FILE, "wb") as ids,
    ):
        offsets.write(OFFSET_TYPE.type(0).tobytes())
        for row, passage in enumerate(passages, start=1):
            line = encode_passage(passage)
            digest.update(line)
            data.write(line)
            offset += len(line)
            offsets.write(OFFSET_TYPE.type(offset).tobytes())
            ids.write(hash_id(passage.id) + (row - 1).to_bytes(8, "big"))
        for file in (data, offsets, ids):
            _flush_to_disk(file)
    return digest.hexdigest(), row


def _flush_to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _mark_duplicates(folder: Path, num_passages: int, *, refuse: bool) -> bool:
    """Sort the id table; mark rows whose id came before. Returns whether there are any."""
    ids = np.memmap(folder / IDS_FILE, dtype=ID_RECORD_TYPE, mode="r+")
    ids.sort()
    ids.flush()
    dropped: np.memmap | None = None
    with open(folder / PASSAGES_FILE, "rb") as data:
        offsets = np.memmap(folder / OFFSETS_FILE, dtype=OFFSET_TYPE, mode="r")
        for first, row in _equal_ids(ids, data, offsets):
            if refuse:
                passage_id = _read_row(data, offsets, row).id
                raise DataError(
                    f"passage id {passage_id!r} is used in rows {first} and {row}; give each "
                    "passage a unique id"
                )
            if dropped is None:
                dropped = np.memmap(
                    folder / DROPPED_FILE, dtype=np.bool_, mode="w+", shape=(num_passages,)
                )
            dropped[row] = True
    return dropped is not None


def _equal_ids(ids: np.ndarray, data: IO[bytes], offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (row of the first passage with an id, later row with the same id)."""
    run_end = -1
    run: dict[str, int] = {}
    for position in _equal_hash_positions(ids):
        if position != run_end + 1:
            row = read_id_record(ids, position - 1)[1]
            run = {_read_row(data, offsets, row).id: row}
        run_end = position
        row = read_id_record(ids, position)[1]
        first = run.setdefault(_read_row(data, offsets, row).id, row)
        if first != row:
            yield first, row


def _equal_hash_positions(ids: np.ndarray) -> Iterator[int]:
    """Positions of the sorted id table whose hash equals that of the position before."""
    hashes = ids.view(">u8").reshape(-1, 2)[:, 0]
    for start in range(1, len(hashes), SCAN_ROWS):
        stop = min(start + SCAN_ROWS, len(hashes))
        equal = hashes[start:stop] == hashes[start - 1 : stop - 1]
        yield from (np.flatnonzero(equal) + start).tolist()


def _read_row(data: IO[bytes], offsets: np.ndarray, row: int) -> Passage:
    start = int(offsets[row])
    data.seek(start)
    return decode_passage(data.read(int(offsets[row + 1]) - start))


def _kept_passages(folder: Path, num_passages: int, tally: Tally) -> Iterator[Passage]:
    dropped = np.memmap(folder / DROPPED_FILE, dtype=np.bool_, mode="r")
    offsets = np.memmap(folder / OFFSETS_FILE, dtype=OFFSET_TYPE, mode="r")
    with open(folder / PASSAGES_FILE, "rb") as data:
        for row in range(num_passages):
            passage = _read_row(data, offsets, row)
            if dropped[row]:
                tally.duplicates.add(passage.id)
            else:
                yield passage


def _publish(staging: Path, directory: Path) -> DiskCorpus:
    finished = DiskCorpus(staging)
    try:
        os.rename(staging, directory)
    except OSError:
        # Another process finished the same corpus first; equal content makes its copy as good.
        if not (directory / META_FILE).is_file():
            raise
        existing = DiskCorpus(directory)
        if existing.content_hash != finished.content_hash:
            raise DataError(
                f"{directory} already holds another corpus; delete it or choose another directory"
            ) from None
        return existing
    return DiskCorpus(directory)
