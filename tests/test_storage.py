"""A directory is whole or it is refused by the name of the file that is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlrag.errors import CheckpointError
from rlrag.files.directories import (
    check_whole,
    contiguous,
    delete,
    find_whole,
    load_weights,
    names_in,
    save_weights,
    whole_directory,
)
from rlrag.files.text import delete_rubbish


def write(target: Path, text: str = "first") -> Path:
    with whole_directory(target) as directory:
        (directory / "a.txt").write_text(text)
        (directory / "inner").mkdir()
        (directory / "inner" / "b.txt").write_text("b" * 1000)
    return target


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_directory_appears_whole_with_a_manifest_of_every_file(tmp_path):
    target = write(tmp_path / "below" / "target")
    files = json.loads((target / "manifest.json").read_text())["files"]
    assert sorted(files) == ["a.txt", "inner/b.txt"]
    # printf first | sha256sum
    assert files["a.txt"] == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"
    check_whole(target)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_new_version_replaces_the_old_one_as_a_whole(tmp_path):
    target = write(tmp_path / "target")
    with whole_directory(target) as directory:
        (directory / "c.txt").write_text("second")
        assert (target / "a.txt").read_text() == "first"
    assert sorted(content(target)) == ["c.txt", "manifest.json"]
    check_whole(target)


def test_other_users_may_read_it_as_the_umask_allows(tmp_path):
    target = write(tmp_path / "target")
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


class Interrupted(Exception):
    """Stands for anything that goes wrong while a directory is written."""


def test_an_interrupted_write_leaves_the_old_directory_and_no_remains(tmp_path):
    target = write(tmp_path / "target")
    before = content(target)

    def run() -> None:
        with whole_directory(target) as directory:
            (directory / "a.txt").write_text("half of")
            raise Interrupted

    with pytest.raises(Interrupted):
        run()
    assert content(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


# Python announces every operation on files before it happens: the nth kills the process, for each n
# until one comes to its end. Forked, as importing PyTorch for each would take minutes.
_KILLED_AT_EACH_OPERATION = """
import os, signal, sys
from pathlib import Path
from rlrag.files.directories import whole_directory

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"}

def write(target, text):
    with whole_directory(target) as directory:
        (directory / "a.txt").write_text(text)

def die_at(number):
    left = number
    def count(event, arguments):
        nonlocal left
        if event in OPERATIONS:  # os.kill is announced too
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

number, status = 0, None
while status != 0:
    number += 1
    target = Path(sys.argv[1]) / str(number) / "target"
    if sys.argv[2] == "replaced":
        write(target, "first")
    child = os.fork()
    if not child:
        die_at(number)
        write(target, "second")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
"""


@pytest.mark.parametrize("before", ["replaced", "new"])
def test_a_kill_at_any_moment_leaves_a_whole_version_that_readers_find(tmp_path, before):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EACH_OPERATION, str(tmp_path), before],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found, aside = [], 0
    for number in range(1, len(list(tmp_path.iterdir())) + 1):
        target = tmp_path / str(number) / "target"
        place = find_whole(target)
        aside += place != target
        if place.exists():
            check_whole(place)
            assert names_in(target.parent) == {"target"}
            found.append((place / "a.txt").read_text())
        else:
            assert names_in(target.parent) == set()
            found.append("nothing")
        write(target, "third")
        assert find_whole(target) == target
        assert (target / "a.txt").read_text() == "third"
        delete_rubbish(target.parent, re.compile("target"))
        assert [path.name for path in target.parent.iterdir()] == ["target"]
    old = "first" if before == "replaced" else "nothing"
    turn = found.index("second")
    assert found == [old] * turn + ["second"] * (len(found) - turn)
    # Killed before the second rename, the old version alone is there, beside its place.
    assert aside == (before == "replaced")
    assert turn > 5


def leave_aside(target: Path) -> Path:
    """What a writer leaves that was killed between its two renames."""
    return write(target).rename(target.with_name(f".{target.name}.replaced"))


def test_the_next_writer_puts_the_old_version_back_before_it_builds_its_own(tmp_path):
    target = tmp_path / "target"
    leave_aside(target)

    def run() -> None:
        with whole_directory(target):
            raise Interrupted

    with pytest.raises(Interrupted):
        run()
    assert (target / "a.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_readers_take_the_version_in_place_when_there_are_two(tmp_path):
    target = tmp_path / "target"
    leave_aside(target)
    (tmp_path / "new").mkdir()
    (tmp_path / "new").rename(target)
    assert find_whole(target) == target
    write(target, "third")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_deleted_directory_does_not_come_back(tmp_path):
    target = tmp_path / "target"
    leave_aside(target)
    (tmp_path / "new").mkdir()
    (tmp_path / "new").rename(target)
    delete(target)
    assert list(tmp_path.iterdir()) == []
    delete(target)
    assert names_in(tmp_path / "absent") == set()


def test_only_rubbish_of_the_names_that_are_asked_for_is_deleted(tmp_path):
    rubbish = f"step-1-{'0a' * 16}"
    kept = [
        f".bundle-{'0a' * 16}",
        f".step-2-{'0a' * 15}",
        f".step-x-{'0a' * 16}",
        ".step-3.replaced",
        f"step-4-{'0a' * 16}",
        "step-5",
        ".step-6",
    ]
    for name in [f".{rubbish}", *kept]:
        (tmp_path / name / "inner").mkdir(parents=True)
    delete_rubbish(tmp_path, re.compile(r"step-\d+"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    delete_rubbish(tmp_path / "absent", re.compile(".*"))


# A limit on the size of files stands for the full disk: the operating system refuses the write in
# the same place, with another reason. It needs a process of its own, as it cannot be taken back.
_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from rlrag.errors import CheckpointError
from rlrag.files.directories import save_weights, whole_directory

resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
for kind in ("text", "weights"):
    try:
        with whole_directory(Path(sys.argv[1])) as directory:
            if kind == "text":
                (directory / "a.txt").write_text("x" * 100_000)
            else:
                save_weights(torch.nn.Linear(100, 100), directory / "w.safetensors")
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_directory_and_says_what_to_do(tmp_path):
    target = write(tmp_path / "target")
    before = content(target)
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(target)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for said in (lines := done.stdout.splitlines()):
        assert said.startswith(f"cannot write {target}: ")
        assert "File too large" in said
        assert "free space or choose another directory" in said
    assert len(lines) == 2
    assert content(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*file/target: "),
        whole_directory(tmp_path / "file" / "target"),
    ):
        raise AssertionError("the block must not start")


@pytest.mark.parametrize("name", ["a.txt", "inner/b.txt"])
@pytest.mark.parametrize("harm", ["truncated", "altered", "missing"])
def test_a_damaged_file_is_named(tmp_path, name, harm):
    target = write(tmp_path / "target")
    path = target / name
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if harm == "truncated" else whole[:-1] + b"?")
    with pytest.raises(CheckpointError, match=rf"target/{name} is missing, truncated or altered"):
        check_whole(target)


@pytest.mark.parametrize("manifest", [None, "", '{"files": {"a.txt"', "{}"])
def test_a_directory_without_a_readable_manifest_is_not_whole(tmp_path, manifest):
    target = write(tmp_path / "target")
    (target / "manifest.json").unlink()
    if manifest is not None:
        (target / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest.json is missing or unreadable.*delete it"):
        check_whole(target)


def test_weights_come_back_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    written, read = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    with torch.no_grad():
        written.weight[0, :3] = torch.tensor([3e38, -0.0, 1e-45])
    save_weights(written, tmp_path / "w.safetensors")
    load_weights(read, tmp_path / "w.safetensors")
    for name, tensor in written.state_dict().items():
        found = read.state_dict()[name]
        assert torch.equal(tensor.view(torch.int32), found.view(torch.int32)), name


def test_weights_that_share_memory_or_are_transposed_are_written_apart(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    found = contiguous({"whole": base, "turned": base.T, "part": base[0]})
    assert found["turned"].is_contiguous()
    assert found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert len({tensor.data_ptr() for tensor in found.values()}) == 3
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "tied.safetensors")
    load_weights(tied, tmp_path / "tied.safetensors")


def test_weights_of_another_shape_name_or_format_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(torch.nn.Linear(5, 3), path)
    for other in (torch.nn.Linear(4, 3), torch.nn.Linear(5, 3, bias=False), torch.nn.GRU(5, 3)):
        with pytest.raises(CheckpointError, match="does not fit the configuration"):
            load_weights(other, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_weights(torch.nn.Linear(5, 3), path)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors; check the path"):
        load_weights(torch.nn.Linear(5, 3), tmp_path / "absent.safetensors")
