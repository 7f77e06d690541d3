"""Writes text files atomically."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_HIDDEN_NAME = re.compile(r"\.(.+)-[0-9a-f]{32}")


def hidden_beside(target: Path) -> Path:
    """A new name in the same folder, for what is not yet or no longer `target`.

    What is made under it has the user's usual permissions. `tempfile` would keep other users from
    reading what is then renamed, and caches and bundles are shared.
    """
    return target.with_name(f".{target.name}-{uuid.uuid4().hex}")


def delete_rubbish(directory: Path, names: re.Pattern[str]) -> None:
    """Delete what killed writers left half-built or half-deleted of the names that match whole.

    Only for the one who alone writes those names: what a writer at work is building looks the same.
    The old version of an unfinished replacement is no rubbish and stays.
    """
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        rubbish = _HIDDEN_NAME.fullmatch(path.name)
        if rubbish and names.fullmatch(rubbish[1]):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def apply_umask(directory: Path) -> None:
    """Give every file below a new directory the permissions that the directory was made with.

    Libraries that write beside a file's place keep other users out of it; safetensors 0.8 does. The
    umask of the process decides, and it cannot be read without changing it for all threads.
    """
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """What is written in the block takes the file's place when the block ends without an error.

    Where the path is a link, the file that it leads to is replaced. Of several writers at once the
    last one's is kept.

    Raises:
        OSError: when it cannot be written, as on a full disk; an older file stays as it was.
    """
    target = path.resolve()
    staging = hidden_beside(target)
    try:
        with staging.open("w", encoding="utf-8") as stream:
            yield stream
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text as `whole_file` does, and raise what it raises."""
    with whole_file(path) as stream:
        stream.write(text)
