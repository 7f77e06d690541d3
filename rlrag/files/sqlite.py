"""Key-value tables in SQLite files that several processes share.

`KeyedTable` is what caches stand on; `Journal` serves files of another shape too.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BUSY_TIMEOUT_S = 60.0
_KEYS_PER_QUERY = 500
# FUSE stands for object stores and sshfs; where it is local after all, writing is merely slower.
_NETWORK = re.compile(
    "9p|afp|afs|beegfs|ceph|cifs|fuse|gfs|gluster|gpfs|lustre|ncp|nfs|ocfs|orangefs|panfs|pvfs|smb|"
    "vboxsf|virtiofs|wekafs"
)


@dataclass(frozen=True)
class Journal:
    """How a file outlives a killed process, and a power cut without being damaged.

    With a write-ahead log many read while one writes, and a power cut can lose the last
    transactions at most. The log needs memory that all processes share, which those on two machines
    do not: on a network file system a rollback journal takes its place, which needs locks alone
    (https://www.sqlite.org/wal.html).
    """

    mode: str
    synchronous: str

    @classmethod
    def of(cls, path: Path) -> Journal:
        """What suits the file system on which `path` lies."""
        return cls("DELETE", "FULL") if on_network(path) else cls("WAL", "NORMAL")

    def enter(self, connection: sqlite3.Connection, timeout_s: float) -> None:
        """Of processes that do this to a new file at once, all but one are refused without a wait.

        Raises:
            sqlite3.OperationalError: when the file is still held after `timeout_s`.
        """
        ends = time.monotonic() + timeout_s
        while True:
            try:
                connection.execute(f"PRAGMA journal_mode={self.mode}")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                    raise
                time.sleep(0.05)
        self.rejoin(connection)

    def rejoin(self, connection: sqlite3.Connection) -> None:
        """Go on with a file that keeps this journal already."""
        connection.execute(f"PRAGMA synchronous={self.synchronous}")


def on_network(path: Path) -> bool:
    """Whether `path`, which need not be there, lies on a network file system."""
    place = path.absolute().resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[at] for at in (place, *place.parents) if at in mounts), "")
    return _NETWORK.match(kind.lower()) is not None


class KeyedTable:
    """Rows by key in one SQLite file; safe for many processes and threads at once.

    A connection lives for one call: it costs a fraction of a millisecond, and the object has no
    state that a fork or a pickle could break. Every method raises what `sqlite3` does.
    """

    def __init__(self, path: Path, name: str, columns: Mapping[str, str]) -> None:
        """Create file and table when they are missing; the folder must exist.

        Args:
            path: The file.
            name: Of the table.
            columns: Type in SQL by the name of each column besides the key.
        """
        self.path = path
        self._name = name
        self._columns = tuple(columns)
        self._journal = Journal.of(path)
        types = ", ".join(f"{column} {kind} NOT NULL" for column, kind in columns.items())
        with self._connection() as connection:
            self._journal.enter(connection, BUSY_TIMEOUT_S)
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {name} (key BLOB PRIMARY KEY, {types}) WITHOUT ROWID"
            )

    def get(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """The stored rows among `keys`, without their key."""
        found: dict[bytes, tuple[Any, ...]] = {}
        with self._connection() as connection:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                columns = ", ".join(("key", *self._columns))
                query = f"SELECT {columns} FROM {self._name} WHERE key IN ({marks})"
                for key, *row in connection.execute(query, part):
                    found[bytes(key)] = tuple(row)
        return found

    def put(self, rows: Sequence[tuple[bytes, tuple[Any, ...]]]) -> None:
        """Store all rows in one transaction; a key that is there already keeps its row."""
        marks = ", ".join("?" * (1 + len(self._columns)))
        with self._connection() as connection, connection:
            connection.executemany(
                f"INSERT OR IGNORE INTO {self._name} VALUES ({marks})",
                [(key, *row) for key, row in rows],
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
        try:
            self._journal.rejoin(connection)
            yield connection
        finally:
            connection.close()
