"""A file holds the old text or the new one, never half of one."""

from __future__ import annotations

import pytest
from stand_ins import fill_disk

from rlrag.files.text import whole_file, write_whole


def test_a_text_replaces_the_file(tmp_path):
    place = tmp_path / "file.json"
    for text in ("first", "second: ä"):
        write_whole(place, text)
        assert place.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_what_fails_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    place = tmp_path / "file.json"
    place.write_text("old")
    with pytest.raises(UnicodeEncodeError), whole_file(place) as stream:
        stream.writelines(["new", "\udcff"])
    fill_disk(monkeypatch, place)
    with pytest.raises(OSError, match="No space left"):
        write_whole(place, "new")
    assert place.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_of_two_who_write_at_once_each_writes_a_whole_file(tmp_path):
    place = tmp_path / "file.json"
    with whole_file(place) as slow:
        slow.write("slow" * 10_000)
        write_whole(place, "quick")
        assert place.read_text() == "quick"
    assert place.read_text() == "slow" * 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
