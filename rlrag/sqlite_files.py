"""An open SQLite connection in; the same in write-ahead mode, whoever else opens the file, out."""

from __future__ import annotations

import sqlite3
import time


def use_write_ahead_log(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Of processes that do this to a new file at once, all but one are refused without a wait.

    Raises:
        sqlite3.OperationalError: when the file is still held after `timeout_s`.
    """
    ends = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
            time.sleep(0.05)
