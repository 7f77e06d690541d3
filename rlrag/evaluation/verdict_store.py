"""A judge's verdicts in, one by one; the same verdicts out, in this run or a later one.

One SQLite file. A verdict's key hashes all that decides it: the judge's address and model, the
prompt, the question, its golden answers and the judged answer. Every verdict is a transaction of
its own: a process that is killed loses what was being asked, and nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlrag.errors import ConfigError, DataError
from rlrag.sqlite_files import use_write_ahead_log

_BUSY_TIMEOUT_S = 60.0
_KEYS_PER_QUERY = 500


class VerdictStore:
    """Verdicts by key; safe for many processes at once. A connection lives for one call."""

    def __init__(self, path: Path) -> None:
        """Create the file when it is missing.

        Raises:
            ConfigError: when its folder does not exist.
            DataError: when it cannot be used, or is no SQLite file.
        """
        self._path = path.expanduser()
        if not self._path.parent.is_dir():
            raise ConfigError(
                f"the cache {self._path}: the directory {self._path.parent} does not exist"
            )
        with self._connection() as connection:
            use_write_ahead_log(connection, _BUSY_TIMEOUT_S)
            connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL) "
                "WITHOUT ROWID"
            )

    def get(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The stored verdicts among `keys`."""
        found: dict[bytes, str] = {}
        with self._connection() as connection:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, verdict FROM verdicts WHERE key IN ({marks})"
                found |= {bytes(key): verdict for key, verdict in connection.execute(query, part)}
        return found

    def put(self, key: bytes, verdict: str) -> None:
        """Store one verdict; a key that is there already keeps its own."""
        with self._connection() as connection, connection:
            connection.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (key, verdict))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S)
            try:
                connection.execute("PRAGMA synchronous=NORMAL")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise DataError(
                f"the cache {self._path} cannot be used: {error}; free space on its disk, or give "
                "another file by --cache"
            ) from error
