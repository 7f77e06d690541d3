"""A file with other bytes than were written is told; a large one is read if it was written to."""

from __future__ import annotations

import os

import pytest

from rlrag.files import checksums
from rlrag.files.checksums import checksum, difference


@pytest.fixture
def listed(tmp_path):
    path, listing = tmp_path / "array.bin", tmp_path / "list.json"
    path.write_bytes(b"0123456789")
    listing.write_text("")
    return path, checksum(path), listing


def test_the_checksum_is_the_size_and_the_sha256(listed):
    # printf 0123456789 | sha256sum
    sha256 = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert listed[1] == {"bytes": 10, "sha256": sha256}
    assert difference(*listed) == ""


def test_other_bytes_are_told_whatever_the_clock_says(listed):
    path = listed[0]
    path.write_bytes(b"0123456780")
    os.utime(path, (0, 0))
    assert difference(*listed) == "its bytes are others than were written"
    path.write_bytes(b"012345678")
    assert difference(*listed) == "it has 9 bytes and not 10"
    path.unlink()
    assert difference(*listed) == "it has 0 bytes and not 10"


def test_a_large_file_is_read_again_where_it_was_written_to_after_the_list(listed, monkeypatch):
    monkeypatch.setattr(checksums, "ALWAYS_READ_BYTES", 9)
    path, _, listing = listed
    path.write_bytes(b"0123456780")
    time = listing.stat().st_mtime_ns
    os.utime(path, ns=(time, time))
    assert difference(*listed) == ""
    os.utime(path, ns=(time + 1, time + 1))
    assert difference(*listed) == "its bytes are others than were written"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(time + 1, time + 1))
    assert difference(*listed) == ""
