"""Memory-mapped sparse matrix with top-k inner-product search.

One row a passage, in compressed sparse row form, in three files:

    row_ends.bin   int64, where the entries of each row end
    columns.bin    int32, the column of each entry
    values.bin     float32, the value of each entry; absent where every value is 1

A search multiplies a block of rows by a few questions at once, with SciPy's own routine, and keeps
the best rows. Each product is summed in the order of the entries, so that equal rows have equal
scores.

Shape letters: B questions, P passages, R rows of a block, V columns, K hits, N given rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from rlrag.retrieval.manifest import damaged
from rlrag.retrieval.protocol import Hits, best_rows, check_num_hits, in_order

ROW_ENDS_FILE, COLUMNS_FILE, VALUES_FILE = "row_ends.bin", "columns.bin", "values.bin"
_ROW_END, _COLUMN, _VALUE = np.dtype("<i8"), np.dtype("<i4"), np.dtype("<f4")

# A block's scores stay in the processor's cache, and its overhead is small beside its products.
_BLOCK_ROWS = 2**16
_BLOCK_QUESTIONS = 32
_CHECKED_ENTRIES = 2**22


class SparseRows:
    """Sparse rows that are searched by inner product.

    Args:
        row_ends_P: Where the entries of each row end.
        columns: Column of every entry, row by row.
        values: Value of every entry; None where all are 1.
        size: Number of columns (V).
    """

    def __init__(
        self, row_ends_P: np.ndarray, columns: np.ndarray, values: np.ndarray | None, size: int
    ) -> None:
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), row_ends_P])
        self._columns = columns
        self._values = values
        self._size = size
        block_starts = self._starts[::_BLOCK_ROWS]
        longest = int(np.diff(block_starts, append=self._starts[-1]).max())
        # All blocks share one array of ones.
        self._ones = np.ones(longest if values is None else 0, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def search_vectors(self, vectors: csr_array | np.ndarray, k: int) -> Hits:
        """The best `k` rows for each vector; vectors of shape (B, V)."""
        check_num_hits(k, len(self))
        num_vectors = vectors.shape[0]
        parts = [
            self._search(_columns_of(vectors[start : start + _BLOCK_QUESTIONS]), k)
            for start in range(0, num_vectors, _BLOCK_QUESTIONS)
        ]
        return Hits(
            np.concatenate([np.zeros((0, k), dtype=np.int64), *(hits.rows_BK for hits in parts)]),
            np.concatenate(
                [np.zeros((0, k), dtype=np.float32), *(hits.scores_BK for hits in parts)]
            ),
        )

    def scores(self, vectors: csr_array | np.ndarray, rows_BN: np.ndarray) -> np.ndarray:
        """The inner product of each given row with its vector, float32 of shape (B, N)."""
        scores_BN = np.zeros(rows_BN.shape, dtype=np.float32)
        for position, rows_N in enumerate(rows_BN):
            vector_V1 = _columns_of(vectors[position : position + 1])
            scores_BN[position] = (self._gathered(rows_N) @ vector_V1)[:, 0]
        return scores_BN

    def vectors(self, rows_N: np.ndarray) -> np.ndarray:
        """Given rows with all their columns, float32 of shape (N, V)."""
        return self._gathered(rows_N).toarray()

    def _search(self, vectors_VB: np.ndarray, k: int) -> Hits:
        num_vectors = vectors_VB.shape[1]
        found = Hits(np.zeros((num_vectors, 0), np.int64), np.zeros((num_vectors, 0), np.float32))
        for first, block in self._blocks():
            scores_BR = np.ascontiguousarray((block @ vectors_VB).T)
            num_hits = min(k, scores_BR.shape[1])
            rows_BK = np.stack([best_rows(scores_R, num_hits) for scores_R in scores_BR])
            scores_BK = np.take_along_axis(scores_BR, rows_BK, axis=1)
            found = in_order(
                np.concatenate([found.rows_BK, first + rows_BK], axis=1),
                np.concatenate([found.scores_BK, scores_BK], axis=1),
                k,
            )
        return found

    def _blocks(self) -> Iterator[tuple[int, csr_array]]:
        for first in range(0, len(self), _BLOCK_ROWS):
            starts_R = self._starts[first : first + _BLOCK_ROWS + 1]
            entries = slice(starts_R[0], starts_R[-1])
            columns = self._columns[entries]
            values = self._ones[: len(columns)] if self._values is None else self._values[entries]
            shape = (len(starts_R) - 1, self._size)
            yield first, csr_array((values, columns, _small(starts_R - starts_R[0])), shape=shape)

    def _gathered(self, rows_N: np.ndarray) -> csr_array:
        lengths_N = self._starts[rows_N + 1] - self._starts[rows_N]
        ends_N = np.cumsum(lengths_N)
        shifts_N = self._starts[rows_N] - (ends_N - lengths_N)
        places = np.arange(lengths_N.sum()) + shifts_N.repeat(lengths_N)
        values = (
            np.ones(len(places), dtype=np.float32) if self._values is None else self._values[places]
        )
        starts = _small(np.concatenate([[0], ends_N]))
        return csr_array((values, self._columns[places], starts), shape=(len(rows_N), self._size))


def _small(starts: np.ndarray) -> np.ndarray:
    """Starts in the number format of the columns; SciPy would copy columns into a larger one."""
    return starts.astype(_COLUMN)


def _columns_of(vectors: csr_array | np.ndarray) -> np.ndarray:
    """Vectors side by side, float32 of shape (V, B)."""
    if isinstance(vectors, np.ndarray):
        return np.ascontiguousarray(vectors.T, dtype=np.float32)
    vectors_VB = np.zeros(vectors.shape[::-1], dtype=np.float32)
    rows = np.arange(vectors.shape[0]).repeat(np.diff(vectors.indptr))
    vectors_VB[vectors.indices, rows] = vectors.data
    return vectors_VB


def write_rows(directory: Path, first_row: int, rows: csr_array, binary: bool) -> None:
    """Write a chunk of rows behind those before `first_row`, which are there already.

    A chunk that is written again, after a stop or by another process, lands on the same bytes.
    """
    first_entry = 0
    if first_row:
        ends_before = _mapped(directory / ROW_ENDS_FILE, _ROW_END, first_row)
        first_entry = int(ends_before[-1])
    ends = first_entry + rows.indptr[1:].astype(_ROW_END)
    _write_at(directory / ROW_ENDS_FILE, first_row * _ROW_END.itemsize, ends)
    _write_at(
        directory / COLUMNS_FILE, first_entry * _COLUMN.itemsize, rows.indices.astype(_COLUMN)
    )
    if not binary:
        _write_at(directory / VALUES_FILE, first_entry * _VALUE.itemsize, rows.data.astype(_VALUE))


def _write_at(path: Path, offset: int, array: np.ndarray) -> None:
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as stream:
        stream.seek(offset)
        stream.write(array.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(directory: Path, num_rows: int, size: int, binary: bool) -> SparseRows:
    """Map the rows that `write_rows` wrote into memory.

    Raises:
        IndexMismatchError: naming the file that is truncated or holds what no row has.
    """
    row_ends_P = np.array(_mapped(directory / ROW_ENDS_FILE, _ROW_END, num_rows))
    if row_ends_P[0] < 0 or np.any(np.diff(row_ends_P) < 0):
        raise damaged(directory / ROW_ENDS_FILE, "its rows overlap")
    num_entries = int(row_ends_P[-1])
    columns = _mapped(directory / COLUMNS_FILE, _COLUMN, num_entries)
    # SciPy's routine reads wherever a column says.
    for start in range(0, num_entries, _CHECKED_ENTRIES):
        checked = columns[start : start + _CHECKED_ENTRIES]
        if checked.min() < 0 or checked.max() >= size:
            raise damaged(directory / COLUMNS_FILE, f"it names columns outside 0 to {size - 1}")
    values = None if binary else _mapped(directory / VALUES_FILE, _VALUE, num_entries)
    return SparseRows(row_ends_P, columns, values, size)


def _mapped(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    actual = path.stat().st_size if path.is_file() else 0
    if actual < length * dtype.itemsize:
        raise damaged(path, f"it has {actual} bytes and not {length * dtype.itemsize}")
    if not length:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
