"""Reads plain or gzip text files line by line, with errors that name file and line.

Every error names the file and the line as `file:line: what is wrong; what was expected`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rlrag.data.folder import how_to_get
from rlrag.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_UNPACK = "unpack it, or pack it by gzip"
_WITH_PANDAS = (
    "convert it: python -c \"import pandas; pandas.read_{kind}('{path}')"
    ".to_json('{path}.jsonl', orient='records', lines=True)\""
)
_OTHER_FORMATS = {
    b"PAR1": ("a Parquet file", _WITH_PANDAS.replace("{kind}", "parquet")),
    b"ARROW1": ("an Arrow file", _WITH_PANDAS.replace("{kind}", "feather")),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack or export it"),
    b"BZh": ("packed by bzip2", _UNPACK),
    b"\xfd7zXZ": ("packed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", _UNPACK),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {path}"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {path}"),
}
"""What a file is that begins with these bytes, and how to make lines of JSON of it."""
_TABLE_HEADER = re.compile(r"""["']?[A-Za-z_][\w .-]*["']?(?:[,;\t]["']?[\w .-]+["']?)+""")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def check_exists(path: Path) -> None:
    """Raise DataError, with a way out, unless `path` is there and can be reached."""
    try:
        path.stat()
        return
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a null character
        message = f"{path} does not exist; {how_to_get(path)}"
    except OSError as error:
        raise _unreadable(path, error) from error
    raise DataError(message)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (`file:line`, text) for every line that is not blank.

    Gzip is known by its first bytes, not by the file's name.

    Raises:
        DataError: for a file that is missing, unreadable, truncated, not UTF-8 or has a line of
            more than `MAX_LINE_BYTES`.
    """
    number = 0
    with open_bytes(path) as file:
        while True:
            number += 1
            place = f"{path}:{number}"
            line = _next_line(file, place)
            if not line:
                return
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: byte {error.start} of the line is not UTF-8; expected UTF-8 text"
                ) from error
            if text.strip():
                yield place, text


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes of a file, unpacked where it is gzip.

    Raises:
        DataError: when it is missing, unreadable or of another format.
    """
    check_exists(path)
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise _unreadable(path, error) from error
    with raw:
        if raw.peek(2).startswith(_GZIP_MAGIC):
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
        else:
            _refuse_other_formats(path, raw.peek(8))
            yield raw


def _refuse_other_formats(path: Path, beginning: bytes) -> None:
    for magic, (found, advice) in _OTHER_FORMATS.items():
        if beginning.startswith(magic):
            raise DataError(
                f"{path} is {found}; expected UTF-8 text, plain or gzip: "
                f"{advice.replace('{path}', str(path))}"
            )


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}; expected a readable file")


def damaged(place: str, error: Exception) -> DataError:
    """What is said of a file that cannot be read to its end."""
    return DataError(
        f"{place}: the file is damaged or truncated ({error}); expected a complete gzip or text "
        "file; download it again"
    )


def _next_line(file: io.BufferedIOBase, place: str) -> bytes:
    try:
        line = file.readline(MAX_LINE_BYTES + 1)
    except (EOFError, zlib.error, OSError) as error:
        raise damaged(place, error) from error
    if len(line) > MAX_LINE_BYTES:
        raise DataError(
            f"{place}: the line is longer than {MAX_LINE_BYTES} bytes; expected one record per line"
        )
    return line


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, object) for every line of a JSONL file.

    Raises:
        DataError: as `read_lines`, and for a line that is not one JSON object.
    """
    is_first = True
    for place, text in read_lines(path):
        if is_first:
            _refuse_other_layouts(path, text.strip())
            is_first = False
        try:
            value = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place}: not JSON ({error}); expected one JSON object per line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{place}: {shown(value)} is not an object; expected one JSON object per line"
            )
        yield place, value


def _refuse_other_layouts(path: Path, line: str) -> None:
    """Name a JSON array, an object over several lines or a table by its first line."""
    if line.startswith("["):
        found, advice = "a JSON array", f"convert it: jq -c '.[]' {path} > {path}l"
    elif line == "{":
        found, advice = "JSON over several lines", f"convert it: jq -c . {path} > {path}l"
    elif _TABLE_HEADER.fullmatch(line):
        separator = ", sep='\\t'" if "\t" in line else ""
        found = "a table of columns (CSV or TSV)"
        advice = _WITH_PANDAS.replace("{kind}", "csv").replace(
            "{path}')", f"{path}'{separator})", 1
        )
        advice = advice.replace("{path}", str(path)) + ", with a list of strings in golden_answers"
    else:
        return
    raise DataError(f"{path} is {found}; expected one JSON object per line: {advice}")


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and infinities, which Python reads as JSON."""
    raise ValueError(f"{name} is not a JSON number")


def take_text(record: dict[str, Any], keys: tuple[str, ...], place: str) -> str:
    """The text under the first of `keys` that the record has.

    Raises:
        DataError: when no key is there, or its value is not Unicode text.
    """
    for key in keys:
        if key in record:
            value = record[key]
            if not isinstance(value, str):
                raise DataError(f"{place}: {key!r} is {shown(value)}; expected a string")
            return checked_text(value, f"{place}: {key!r}")
    raise _missing_key(record, keys, place)


def take_id(record: dict[str, Any], keys: tuple[str, ...], place: str) -> str:
    """The id under the first of `keys`: a string that is not blank, or an integer as a string.

    Raises:
        DataError: when it is missing, blank or of another type.
    """
    for key in keys:
        value = record.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    text = take_text(record, keys, place)
    if not text.strip():
        raise DataError(f"{place}: the id is blank; expected a string that names the record")
    return text


def take_texts(
    record: dict[str, Any], key: str, place: str, *, required: bool = False
) -> tuple[str, ...]:
    """The list of strings under `key`; without `required`, empty when the key is missing.

    Raises:
        DataError: when it is not a list of strings with text in them.
    """
    if required and key not in record:
        raise _missing_key(record, (key,), place)
    values = record.get(key, [])
    if not isinstance(values, list):
        raise DataError(f"{place}: {key!r} is {shown(values)}; expected a list of strings")
    for value in values:
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{place}: {key!r} contains {shown(value)}; expected strings that are not blank"
            )
        checked_text(value, f"{place}: {key!r}")
    return tuple(values)


def take_metadata(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The object under `metadata`, `gold_ids` as strings; empty when the key is missing or null.

    Raises:
        DataError: when it is no object, or its `gold_ids` are neither strings nor integers.
    """
    metadata = record.get("metadata")
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise DataError(f"{place}: 'metadata' is {shown(metadata)}; expected an object")
    gold_ids = metadata.get("gold_ids")
    if isinstance(gold_ids, list):  # ids of passages may be integers, see `take_id`
        is_integer = [isinstance(each, int) and not isinstance(each, bool) for each in gold_ids]
        texts = [str(i) if yes else i for i, yes in zip(gold_ids, is_integer, strict=True)]
        metadata = {**metadata, "gold_ids": texts}
    take_texts(metadata, "gold_ids", f"{place}: metadata")
    return metadata


def checked_text(text: str, place: str) -> str:
    """The same text, when it is Unicode text.

    Raises:
        DataError: when it holds half of a surrogate pair, which JSON can spell but no file store.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} contains the lone surrogate {text[error.start]!r}; expected Unicode text"
        ) from error
    return text


def _missing_key(record: dict[str, Any], keys: tuple[str, ...], place: str) -> DataError:
    wanted = " or ".join(repr(key) for key in keys)
    found = ", ".join(shown(key) for key in list(record)[:10]) or "no keys"
    return DataError(f"{place}: key {wanted} is missing; expected it next to {found}")


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
