"""One process at a time holds a lock, and one that is no more holds none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlrag.errors import InUseError
from rlrag.files.locks import held, this_process

_HOLD = """
import sys, time
from pathlib import Path
from rlrag.files.locks import held

with held(Path(sys.argv[1]), "the place", print, 0.05):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock until its input ends."""
    command = [sys.executable, "-c", _HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def said_by(attempt: Callable[[Callable[[str], None]], None]) -> list[str]:
    said: list[str] = []
    attempt(said.append)
    return said


def take(lock: Path, say: Callable[[str], None] = lambda text: None, silence_s: float = 1) -> None:
    with held(lock, "the place", say, 0.05, silence_s):
        assert len(list(lock.iterdir())) == 1


def test_a_lock_is_there_during_the_block_alone(tmp_path):
    for _ in range(2):
        assert said_by(lambda say: take(tmp_path / "lock", say)) == []
        assert list(tmp_path.iterdir()) == []


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path, holder):
    lock = tmp_path / "lock"
    with pytest.raises(InUseError, match=rf"the place is in use by process {holder.pid} on ") as e:
        take(lock)
    assert str(lock) in str(e.value)
    assert this_process().host in str(e.value)
    assert len(list(lock.iterdir())) == 1
    with (
        held(tmp_path / "other", "it", print),
        pytest.raises(InUseError, match=f"process {os.getpid()} "),
    ):
        take(tmp_path / "other")


def test_the_lock_of_a_killed_process_is_taken_over_with_an_explanation(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)  # it stays a zombie, as nobody asks for its end
    while this_process_is_running(holder.pid):
        pass
    (said,) = said_by(lambda say: take(tmp_path / "lock", say))
    assert said.startswith(f"taking over the place from process {holder.pid} on ")
    assert said.endswith("which is no more")
    assert list(tmp_path.iterdir()) == []


def this_process_is_running(pid: int) -> bool:
    return ") Z " not in Path(f"/proc/{pid}/stat").read_text()


def changed(lock: Path, **fields: object) -> None:
    """Let the lock name another process."""
    (entry,) = lock.iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | fields))


@pytest.mark.parametrize("fields", [{"started": 1}, {"pid": 2**22 + 1}])
def test_a_number_that_is_used_again_or_by_nobody_is_not_the_holder(tmp_path, holder, fields):
    changed(tmp_path / "lock", **fields)
    (said,) = said_by(lambda say: take(tmp_path / "lock", say))
    assert "which is no more" in said


@pytest.mark.parametrize("fields", [{"boot": "other"}, {"pid_namespace": "other"}, {"boot": None}])
def test_a_process_of_another_machine_is_believed_while_it_shows_life(tmp_path, holder, fields):
    lock = tmp_path / "lock"
    changed(lock, host="node-7", pid=2**22 + 1, **fields)
    said: list[str] = []
    with pytest.raises(InUseError, match="on node-7"):
        take(lock, said.append, silence_s=30)
    assert said == [said[0]]
    assert "waiting 30 s" in said[0]
    holder.send_signal(signal.SIGSTOP)
    waiting, taking = said_by(lambda say: take(lock, say, silence_s=0.3))
    assert "waiting 0 s" in waiting
    assert "taking over" in taking
    assert "on node-7" in taking


def test_a_process_that_was_taken_for_dead_ends_when_it_goes_on(tmp_path, holder):
    lock = tmp_path / "lock"
    changed(lock, boot="other")
    holder.send_signal(signal.SIGSTOP)
    with held(lock, "the place", print, 0.05, 0.3):
        (mine,) = lock.iterdir()
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(30) == 4
        assert holder.stderr.read() == "error: the place was taken over by another process\n"
        assert list(lock.iterdir()) == [mine]


def test_a_lock_that_nobody_can_read_is_one_of_another_machine(tmp_path):
    lock = tmp_path / "lock"
    lock.mkdir()
    (lock / "x").write_text("{")
    waiting, taking = said_by(lambda say: take(lock, say, silence_s=0.1))
    assert "an unknown process" in waiting
    assert "an unknown process" in taking


def test_what_killed_processes_left_is_cleared(tmp_path):
    (tmp_path / "lock").mkdir()  # killed while it took over, or gave up
    (tmp_path / f".lock-{'0' * 32}").mkdir()  # killed while it made its own
    (tmp_path / ".lock-mine").mkdir()
    assert said_by(lambda say: take(tmp_path / "lock", say)) == []
    assert [path.name for path in tmp_path.iterdir()] == [".lock-mine"]


# Twelve processes find the lock of a dead one and want it at once.
_RACE = """
import os, sys, time
from pathlib import Path
from rlrag.errors import InUseError
from rlrag.files.locks import held

folder = Path(sys.argv[1])
children = []
for number in range(12):
    child = os.fork()
    if not child:
        while not (folder / "go").exists():
            pass
        try:
            with held(folder / "lock", "it", lambda text: None):
                (folder / "inside").mkdir()  # fails where two are
                time.sleep(0.02)
                (folder / "inside").rmdir()
                (folder / f"done-{number}").touch()
        except InUseError:
            pass
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
(folder / "go").touch()
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_of_many_who_take_over_at_once_one_is_in_at_a_time(tmp_path, holder):
    holder.kill()
    holder.wait()
    done = subprocess.run(
        [sys.executable, "-c", _RACE, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert any(path.name.startswith("done-") for path in tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir() if "lock" in path.name} == set()
