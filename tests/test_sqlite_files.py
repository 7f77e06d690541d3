"""Tables that many processes share, on local disks and on network file systems."""

from __future__ import annotations

import multiprocessing
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rlrag.files.sqlite import Journal, KeyedTable, on_network

NUM_WRITERS, NUM_ROWS = 3, 20


@pytest.fixture
def mounted(monkeypatch):
    """Says what is mounted where."""

    def mount(at: dict[str, str]) -> None:
        mounts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in at.items()]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)

    return mount


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ext4", False),
        ("xfs", False),
        ("tmpfs", False),
        ("overlay", False),
        ("nfs", True),
        ("nfs4", True),
        ("lustre", True),
        ("fuse.gcsfuse", True),
        ("9p", True),
        ("", False),
    ],
)
def test_the_innermost_mount_decides(mounted, tmp_path, kind, expected):
    mounted(at={"/": "nfs4", str(tmp_path): kind, str(tmp_path / "other"): "nfs4"})
    assert on_network(tmp_path / "cache" / "new.sqlite") is expected


def test_links_are_followed_to_where_the_file_lies(mounted, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    mounted(at={"/": "ext4", str(tmp_path / "far"): "nfs4"})
    assert on_network(tmp_path / "near" / "new.sqlite")


def _put(path: Path, writer: int) -> None:
    for row in range(NUM_ROWS):
        KeyedTable(path, "found", {"number": "INTEGER"}).put([(bytes([writer, row]), (row,))])


@pytest.mark.parametrize(("kind", "journal"), [("ext4", "wal"), ("nfs4", "delete")])
def test_processes_share_a_table_under_either_journal(mounted, tmp_path, kind, journal):
    mounted(at={"/": kind})
    path = tmp_path / "found.sqlite"
    context = multiprocessing.get_context("fork")  # what is mounted is known to the children
    writers = [context.Process(target=_put, args=(path, n)) for n in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * NUM_WRITERS
    keys = [bytes([n, row]) for n in range(NUM_WRITERS) for row in range(NUM_ROWS)]
    assert len(KeyedTable(path, "found", {"number": "INTEGER"}).get(keys)) == len(keys)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == (journal,)


def test_a_file_that_was_moved_to_a_network_leaves_its_write_ahead_log(mounted, tmp_path):
    path = tmp_path / "found.sqlite"
    mounted(at={"/": "ext4"})
    KeyedTable(path, "found", {"number": "INTEGER"}).put([(b"a", (1,))])
    mounted(at={"/": "nfs4"})
    assert KeyedTable(path, "found", {"number": "INTEGER"}).get([b"a"]) == {b"a": (1,)}
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("kind", "number"), [("ext4", 1), ("nfs4", 2)])  # NORMAL, FULL
def test_every_connection_waits_for_the_disk_as_its_journal_needs(mounted, tmp_path, kind, number):
    mounted(at={"/": kind})
    with closing(sqlite3.connect(tmp_path / "found.sqlite")) as connection:
        Journal.of(tmp_path).enter(connection, 1.0)
        assert connection.execute("PRAGMA synchronous").fetchone() == (number,)
