"""Stores a judge's verdicts on disk, so that none is requested twice.

One SQLite file. A verdict's key hashes all that decides it: the judge's address and model, the
prompt, the question, its golden answers and the judged answer. Every verdict is a transaction of
its own: a process that is killed loses what was being asked, and nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlrag.errors import ConfigError, DataError, SetupError
from rlrag.files.sqlite import KeyedTable


class VerdictStore:
    """Verdicts by key; safe for many processes at once."""

    def __init__(self, path: Path) -> None:
        """Create the file when it is missing.

        Raises:
            ConfigError: when its folder does not exist.
            SetupError: when it cannot be used, as on a full disk.
            DataError: when it is no SQLite file.
        """
        self._path = path.expanduser()
        if not self._path.parent.is_dir():
            raise ConfigError(
                f"the cache {self._path}: the directory {self._path.parent} does not exist"
            )
        with self._explained():
            self._table = KeyedTable(self._path, "verdicts", {"verdict": "TEXT"})

    def get(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The stored verdicts among `keys`."""
        with self._explained():
            return {key: verdict for key, (verdict,) in self._table.get(keys).items()}

    def put(self, key: bytes, verdict: str) -> None:
        """Store one verdict; a key that is there already keeps its own."""
        with self._explained():
            self._table.put([(key, (verdict,))])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise SetupError(
                f"the cache {self._path} cannot be used: {error}; free space on its disk, or use "
                "another file"
            ) from error
        except sqlite3.Error as error:
            raise DataError(
                f"the cache {self._path} cannot be used: {error}; delete it, or use another file"
            ) from error
