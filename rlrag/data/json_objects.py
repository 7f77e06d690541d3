"""Streams JSON objects from files of any size, one per line or in one array."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlrag.data.lines import MAX_LINE_BYTES, damaged, open_bytes, refuse_constant, shown
from rlrag.errors import DataError

_CHUNK = 2**20
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def read_json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, object) for every object; in an array its number stands there too.

    Raises:
        DataError: for a file that is missing, unreadable, truncated, not UTF-8, or holds anything
            else or an object of more than `MAX_LINE_BYTES` characters.
    """
    with open_bytes(path) as file:
        yield from _Objects(path, io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


class _Objects:
    """The part of a file that is looked at: `text` from `start` on, which is in line `line`."""

    def __init__(self, path: Path, file: io.TextIOWrapper) -> None:
        self._path, self._file = path, file
        self._text, self._start, self._line = "", 0, 1

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        number = 0
        is_array = self._next() == "["
        if is_array:
            self._skip(1)
        while (character := self._next()) and not (is_array and character == "]"):
            if is_array and number:
                if character != ",":
                    raise self._malformed(self._start, f"{character!r} stands where ',' should")
                self._skip(1)
                self._next()
            number += 1
            place = f"{self._path}:{self._line}" + (f", record {number}" if is_array else "")
            yield place, self._decode(place)
        if is_array and not character:
            raise self._malformed(self._start, "the array does not end")

    def _next(self) -> str:
        """The next character that is no space, '' at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._start)
            self._skip(found.end() - self._start if found else 0)
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._read():
                return ""

    def _skip(self, count: int) -> None:
        end = self._start + count
        self._line += self._text.count("\n", self._start, end)
        self._start = end

    def _read(self) -> bool:
        """Look at more of the file, twice as much where an object goes on; whether there is any."""
        left = self._text[self._start :]
        try:
            more = self._file.read(max(_CHUNK, len(left)))
        except UnicodeDecodeError as error:
            raise self._malformed(self._start, f"what follows is not UTF-8 ({error})") from error
        except (EOFError, zlib.error, OSError) as error:
            raise damaged(f"{self._path}:{self._line}", error) from error
        self._text, self._start = left + more, 0
        return bool(more)

    def _decode(self, place: str) -> dict[str, Any]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._start)
                break
            except (ValueError, RecursionError) as error:
                # What is not JSON may be the beginning of an object.
                if len(self._text) - self._start > MAX_LINE_BYTES or not self._read():
                    reason = getattr(error, "msg", str(error))
                    at = getattr(error, "pos", self._start)
                    raise self._malformed(at, f"not JSON ({reason})") from error
        if not isinstance(value, dict):
            raise DataError(f"{place}: {shown(value)} is not an object; expected JSON objects")
        self._skip(end - self._start)
        return value

    def _malformed(self, at: int, what: str) -> DataError:
        line = self._line + self._text.count("\n", self._start, at)
        return DataError(
            f"{self._path}:{line}: {what}; expected JSON objects, one per line or in an array"
        )
