"""Opens and checks the SQLite file of selections and feedback.

The file says in its header that it is ours (`application_id`) and of which format (`user_version`),
so that no other file is ever written to. Columns that files of this format may lack are added when
one is opened to write.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rlrag.errors import DataError
from rlrag.files.sqlite import Journal
from rlrag.submitted_job import where_to_look

logger = logging.getLogger(__name__)

_FORMAT = 1
_APPLICATION = 0x726C7266  # "rlrf"
_BUSY_TIMEOUT_S = 10.0
_READ_VERSION_AT, _WITH_LOG = 18, b"\x02"
"""Byte of SQLite's header that says whether a write-ahead log belongs to the file."""

_SCHEMA = (
    "CREATE TABLE selections (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "request_id TEXT NOT NULL UNIQUE, time_s REAL NOT NULL, version TEXT NOT NULL, "
    "question TEXT NOT NULL, candidate_ids TEXT NOT NULL, positions TEXT NOT NULL, "
    "propensity_logp REAL NOT NULL, explored INTEGER NOT NULL, answer TEXT NOT NULL, "
    "answer_logp REAL, action_logps TEXT, num_selected INTEGER)",
    "CREATE INDEX selections_by_time ON selections (time_s)",
    "CREATE TABLE feedback (number INTEGER PRIMARY KEY AUTOINCREMENT, "
    "request_id TEXT NOT NULL, time_s REAL NOT NULL, reward REAL, golden_answers TEXT, "
    "thumbs TEXT)",
    "CREATE INDEX feedback_by_request ON feedback (request_id, number)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_FORMAT}",
)

LATER_COLUMNS = {"action_logps": "TEXT", "num_selected": "INTEGER"}
"""Columns of `selections` with their types that an older file lacks; they are null in its rows."""


class OpenFile(NamedTuple):
    """A connection, and which file it belongs to."""

    connection: sqlite3.Connection
    identity: tuple[int, int] | None


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that took its place."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def make_private(path: Path) -> None:
    """Create a file that its user alone can read, where it is missing; SQLite follows its mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def open_to_write(path: Path) -> OpenFile:
    """Open the file, which is created where it is missing, for its user alone: it has questions.

    Raises:
        sqlite3.Error, OSError: see `explaining`.
        DataError: when the file is of another format or holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    make_private(path)
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        _check_format(connection, path, may_be_empty=True)
        Journal.of(path).enter(connection, _BUSY_TIMEOUT_S)
        connection.execute("PRAGMA secure_delete=ON")
        _create_tables(connection, path)
    except BaseException:
        connection.close()
        raise
    return OpenFile(connection, identity(path))


def close_for_good(connection: sqlite3.Connection) -> None:
    """Close; where no other process has the file open, it then needs no log beside it."""
    with suppress(sqlite3.OperationalError):  # another has it open, or the disk is full: it stays
        connection.execute("PRAGMA busy_timeout=0")
        connection.execute("PRAGMA journal_mode=DELETE")
    connection.close()


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write; a file that was copied without its log is warned of.

    Raises:
        DataError: when the file is missing, damaged, of another format or holds something else.
    """
    path = path.expanduser()
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; "
            + where_to_look(path, "give the file that a service's feedback.path names")
        )
    with explaining(path):
        _warn_of_missing_log(path.resolve())
    place = f"{path.absolute().as_uri()}?mode=ro"
    with (
        explaining(path),
        closing(sqlite3.connect(place, timeout=_BUSY_TIMEOUT_S, uri=True)) as connection,
    ):
        _check_format(connection, path, may_be_empty=False)
        yield connection


def _warn_of_missing_log(path: Path) -> None:
    log = path.with_name(f"{path.name}-wal")
    with path.open("rb") as file:
        file.seek(_READ_VERSION_AT)
        needs_log = file.read(1) == _WITH_LOG
    # A log without a byte is what an earlier reader leaves where there was none.
    if needs_log and not (log.is_file() and log.stat().st_size):
        logger.warning(
            "%s was copied while in use without %s, which contains the newest rows: selections "
            "may be missing; copy both files, or create the copy with: sqlite3 %s '.backup COPY'",
            path,
            log.name,
            path.name,
        )


@contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what SQLite and the operating system say into a `DataError` that says what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise DataError(
            f"the feedback file {path} cannot be used: {error}; {_way_out(str(error))}"
        ) from error


def _check_format(connection: sqlite3.Connection, path: Path, may_be_empty: bool) -> None:
    # In this order: another process may create the tables meanwhile, all of them at once.
    [(num_tables,)] = connection.execute("SELECT COUNT(*) FROM sqlite_master")
    [(application,)] = connection.execute("PRAGMA application_id")
    [(version,)] = connection.execute("PRAGMA user_version")
    if may_be_empty and not num_tables and not application:
        return
    if application != _APPLICATION:
        raise DataError(f"{path} is a SQLite file but not a feedback log; give another file")
    if version != _FORMAT:
        raise DataError(
            f"{path} is a feedback log of format {version}, and this version reads {_FORMAT}; "
            "use the version that wrote it, or start a new file"
        )


def _create_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Of processes that open a file at once, the first creates the tables and columns it lacks."""
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        if connection.execute("PRAGMA application_id").fetchone() == (0,):
            for statement in _SCHEMA:
                connection.execute(statement)
        for name in missing_columns(connection):
            kind = LATER_COLUMNS[name]
            connection.execute(f"ALTER TABLE selections ADD COLUMN {name} {kind}")
    _check_format(connection, path, may_be_empty=False)


def missing_columns(connection: sqlite3.Connection) -> list[str]:
    """Those of `LATER_COLUMNS` that the file lacks."""
    known = {row[1] for row in connection.execute("PRAGMA table_info(selections)")}
    return [name for name in LATER_COLUMNS if known and name not in known]


def _way_out(message: str) -> str:
    if any(sign in message for sign in ("full", "No space", "disk I/O")):
        return "free space on its disk: what is stored stays"
    if "locked" in message:
        return f"another process locked it for more than {_BUSY_TIMEOUT_S:.0f} s; try again"
    if "not a database" in message or "malformed" in message:
        return "it is damaged or no SQLite file; move it away, and a new one is begun"
    return "check that its folder exists and can be written"
