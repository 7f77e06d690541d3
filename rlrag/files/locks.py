"""Locks that let only one process at a time write to a directory, also on network storage.

A lock is a directory with one file, which names the process that holds it. The directory is made
elsewhere and renamed to its place, which fails where another lies there with a file in it: that
needs neither `flock`, which network storage may lack, nor hard links. The file's time is renewed
every few seconds. Where the process that it names is no more, the lock is taken over:

    same machine     at once, as its processes can be looked at
    another machine  after a minute in which the file's time stays; clocks are not compared

A file has a name of its own, so that of two who take over one lock only one removes it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rlrag.errors import InUseError
from rlrag.files.text import delete_rubbish, hidden_beside

RENEW_S = 5.0
SILENCE_S = 60.0
_LOOK_S = 0.5
_MAX_ATTEMPTS = 100
_COMMAND_LENGTH = 200


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: Name of its machine.
        boot: The machine's present run, which no other machine shares; None where it has no id.
        pid_namespace: In which its number means it; containers of one machine have one each.
        pid: Its number.
        started: When it started, in clock ticks of that run: numbers are used again.
        command: What it was called with.
        since: When it took the lock, in UTC.
    """

    host: str
    boot: str | None
    pid_namespace: str | None
    pid: int
    started: int | None
    command: str
    since: str

    def describe(self) -> str:
        """For people."""
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})"

    def can_be_looked_at(self, here: Holder) -> bool:
        """Whether its number means the same process here."""
        return self.boot is not None and (self.boot, self.pid_namespace) == (
            here.boot,
            here.pid_namespace,
        )

    def lives(self) -> bool:
        """Whether it still runs, where it can be looked at."""
        return self.started is not None and _start_of(self.pid) == self.started


def this_process() -> Holder:
    """The calling process."""
    return Holder(
        host=socket.gethostname(),
        boot=_read(Path("/proc/sys/kernel/random/boot_id")),
        pid_namespace=_link(Path("/proc/self/ns/pid")),
        pid=os.getpid(),
        started=_start_of(os.getpid()),
        command=shlex.join(sys.argv)[:_COMMAND_LENGTH],
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@contextmanager
def held(
    lock: Path,
    place: str,
    say: Callable[[str], None],
    renew_s: float = RENEW_S,
    silence_s: float = SILENCE_S,
) -> Iterator[None]:
    """Hold a lock during the block.

    A process that another machine took for dead, because it stood still for long, ends at once when
    it goes on: the place is another's then.

    Args:
        lock: Where the lock lies; the directory above it must exist.
        place: What it guards, for people.
        say: Tells people what was taken over from whom, and what is waited for.
        renew_s: Seconds between signs of life.
        silence_s: Seconds without one after which a process of another machine counts as dead.

    Raises:
        InUseError: when another process holds it.
        OSError: when it cannot be written.
    """
    mine = _take(lock, place, say, silence_s)
    ending = threading.Event()
    renewing = threading.Thread(
        target=_renew, args=(mine, place, ending, renew_s), name="lock", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ending.set()
        renewing.join()
        mine.unlink(missing_ok=True)
        with suppress(OSError):  # somebody was quick and holds it already
            lock.rmdir()


def _take(lock: Path, place: str, say: Callable[[str], None], silence_s: float) -> Path:
    here = this_process()
    for _ in range(_MAX_ATTEMPTS):
        name = uuid.uuid4().hex
        staging = hidden_beside(lock)
        try:
            staging.mkdir()
            (staging / name).write_text(json.dumps(asdict(here)) + "\n")
            staging.rename(lock)
        except OSError:
            if not lock.is_dir():
                raise
        else:
            # Somebody who is just making a lock of his own finds it gone, and tries again.
            delete_rubbish(lock.parent, re.compile(re.escape(lock.name)))
            return lock / name
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _make_room(lock, place, here, say, silence_s)
    raise InUseError(f"{place} is being locked by many processes at once; start only one of them")


def _make_room(
    lock: Path, place: str, here: Holder, say: Callable[[str], None], silence_s: float
) -> None:
    """Remove the file of a process that is no more; others have been quicker where it is gone."""
    with suppress(FileNotFoundError):
        entries = list(lock.iterdir())
        if not entries:
            with suppress(OSError):  # it has a file by now
                lock.rmdir()
            return
        entry = entries[0]
        holder = _holder(entry)
        who = holder.describe() if holder else "an unknown process"
        if holder and holder.can_be_looked_at(here):
            alive, reason = holder.lives(), "which is no more"
        else:
            say(f"{place} is in use by {who}; waiting {silence_s:.0f} s for a sign of life")
            alive, reason = _shows_life(entry, silence_s), f"silent for {silence_s:.0f} s"
        if alive:
            raise InUseError(
                f"{place} is in use by {who}; wait until it has ended, end it, or choose another "
                f"place. If that process no longer exists, delete {lock}"
            )
        entry.unlink()
        say(f"taking over {place} from {who}, {reason}")


def _shows_life(entry: Path, silence_s: float) -> bool:
    """Whether the time of a file changes within so many seconds.

    Raises:
        FileNotFoundError: when the lock is given up meanwhile.
    """
    first, end = _time_of(entry), time.monotonic() + silence_s
    while time.monotonic() < end:
        time.sleep(min(_LOOK_S, silence_s / 10))
        if _time_of(entry) != first:
            return True
    return False


def _time_of(entry: Path) -> int:
    with entry.open("rb") as stream:  # opening asks network storage for what holds now
        return os.fstat(stream.fileno()).st_mtime_ns


def _renew(mine: Path, place: str, ending: threading.Event, renew_s: float) -> None:
    while not ending.wait(renew_s):
        try:
            os.utime(mine)
        except OSError:
            # Only another's file says that it is lost; storage may fail for a while.
            with suppress(OSError):
                if any(other.name != mine.name for other in mine.parent.iterdir()):
                    os.write(2, f"error: {place} was taken over by another process\n".encode())
                    os._exit(4)


def _holder(entry: Path) -> Holder | None:
    try:
        return Holder(**json.loads(entry.read_text()))
    except (ValueError, TypeError, RecursionError):
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine's start; None where it has ended."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    if stat is None:
        return None
    fields = stat.rpartition(")")[2].split()  # its name, which comes before, may hold spaces
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
