"""What is uploaded comes back bit by bit, and half of a directory is never taken for one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rlrag.errors import CheckpointError, SetupError
from rlrag.files.directories import check_whole, whole_directory
from rlrag.files.remote import RemoteDirectory, open_remote


@pytest.fixture
def remote(tmp_path: Path) -> RemoteDirectory:
    return open_remote(f"file://{tmp_path}/far%20away/run", timeout_s=5)


def there(tmp_path: Path) -> Path:
    return tmp_path / "far away" / "run"


def write(target: Path, text: str = "first") -> Path:
    with whole_directory(target) as directory:
        (directory / "a.txt").write_text(text)
        (directory / "inner").mkdir()
        (directory / "inner" / "b.bin").write_bytes(b"b" * 9_000_000)  # more than a chunk
    return target


def test_a_directory_comes_back_with_the_same_manifest(tmp_path, remote):
    source = write(tmp_path / "here")
    assert remote.files() == set()
    remote.upload_whole("step-1", source)
    assert remote.files() == {"step-1/a.txt", "step-1/inner/b.bin", "step-1/manifest.json"}
    remote.download_whole("step-1", tmp_path / "back")
    check_whole(tmp_path / "back")
    for name in ("a.txt", "inner/b.bin", "manifest.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_single_files_are_replaced_as_a_whole_and_may_be_absent(tmp_path, remote):
    assert remote.read("config.json") is None
    remote.write("config.json", b"{}")
    remote.write("config.json", b"[]")
    assert remote.read("config.json") == b"[]"
    (tmp_path / "m.jsonl").write_text("lines\n")
    # printf 'lines\n' | sha256sum
    digest = "58975ca22b214d1bf824a46d50b4cdec9b721839e7331d60fc68803c54e531ac"
    assert remote.upload("metrics.jsonl", tmp_path / "m.jsonl") == digest
    remote.download("metrics.jsonl", tmp_path / "new" / "m.jsonl")
    assert (tmp_path / "new" / "m.jsonl").read_text() == "lines\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.jsonl"]
    remote.delete("config.json")
    remote.delete("config.json")
    assert remote.files() == {"metrics.jsonl"}


class Unplugged(RemoteDirectory):
    """Storage that stops to answer after one file."""

    def __init__(self, path: Path) -> None:
        from pyarrow.fs import LocalFileSystem

        super().__init__(LocalFileSystem(), str(path), str(path))
        self.left = 1

    def upload(self, name: str, source: Path) -> str:
        if not self.left:
            raise SetupError("the cable is out")
        self.left -= 1
        return super().upload(name, source)


def test_an_upload_that_stops_half_way_leaves_nothing_that_is_taken_for_whole(tmp_path, remote):
    """Neither the first time nor where an older version was whole."""
    source = write(tmp_path / "here")
    for _ in range(2):
        with pytest.raises(SetupError, match="the cable is out"):
            Unplugged(there(tmp_path)).upload_whole("step-1", source)
        with pytest.raises(CheckpointError, match="was not completed"):
            remote.download_whole("step-1", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        remote.upload_whole("step-1", source)
        remote.download_whole("step-1", tmp_path / "again")


@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
def test_what_is_damaged_there_is_refused_and_what_is_here_stays(tmp_path, remote, harm):
    remote.upload_whole("step-1", write(tmp_path / "here", "second"))
    back = write(tmp_path / "back")
    path = there(tmp_path) / "step-1" / "a.txt"
    if harm == "missing":
        path.unlink()
    else:
        path.write_text("secon" if harm == "truncated" else "secone")
    with pytest.raises(CheckpointError, match=r"a\.txt is "):
        remote.download_whole("step-1", back)
    check_whole(back)
    assert (back / "a.txt").read_text() == "first"


def test_what_is_damaged_here_does_not_become_whole_there(tmp_path, remote):
    source = write(tmp_path / "here")
    (source / "a.txt").write_text("fir")
    with pytest.raises(CheckpointError, match=r"a\.txt is truncated or altered"):
        remote.upload_whole("step-1", source)
    assert "step-1/manifest.json" not in remote.files()


@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/a.txt", "inner/../../a.txt", ".a", "manifest.json"]
)
def test_a_manifest_from_elsewhere_writes_nothing_outside_its_directory(tmp_path, remote, name):
    remote.write("step-1/manifest.json", json.dumps({"files": {name: "0" * 64}}).encode())
    with pytest.raises(CheckpointError, match="which is not a file of that directory"):
        remote.download_whole("step-1", tmp_path / "back")


@pytest.mark.parametrize("manifest", [b"", b"\xff", b"[]", b'{"files": 1}', b'{"files": {"a": 1}}'])
def test_an_unreadable_manifest_is_named(tmp_path, remote, manifest):
    remote.write("step-1/manifest.json", manifest)
    with pytest.raises(CheckpointError, match=r"step-1/manifest\.json is missing or unreadable"):
        remote.download_whole("step-1", tmp_path / "back")


def test_a_deleted_directory_is_gone_whole_or_not(tmp_path, remote):
    remote.upload_whole("step-1", write(tmp_path / "here"))
    remote.write("step-2/a.txt", b"half")
    for name in ("step-1", "step-2", "step-3"):
        remote.delete_whole(name)
    assert remote.files() == set()


def test_transfers_end_when_their_time_is_over(tmp_path, remote):
    remote.upload_whole("step-1", write(tmp_path / "here"))
    with remote.until(1e-6):
        time.sleep(1e-3)
        with pytest.raises(SetupError, match="the time limit for transfers ended"):
            remote.download_whole("step-1", tmp_path / "back")
    remote.download_whole("step-1", tmp_path / "back")


def test_storage_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    remote = open_remote(f"file://{tmp_path}/file", 5)
    with pytest.raises(SetupError, match=r"cannot write a in file://.*/file: .*check the address"):
        remote.write("a", b"")
