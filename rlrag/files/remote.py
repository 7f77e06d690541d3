"""Files and directories in remote storage, through pyarrow.

S3, Google Cloud Storage and mounted file systems. A directory is whole when its `manifest.json` has
the hashes of its files, as in `rlrag.files.directories`: an upload takes the old manifest
away first and writes the new one last, and a download compares what it got.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from rlrag.errors import CheckpointError, SetupError
from rlrag.files.directories import (
    MANIFEST,
    leads_outside,
    listed_files,
    parse_manifest,
    whole_directory,
)

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_CHUNK_BYTES = 8 * 2**20
_CONNECT_TIMEOUT_S = 10.0


class RemoteDirectory:
    """A directory of one writer. Names of files and directories are relative to it, with slashes.

    Every method raises a `SetupError` that names the address when the storage does not do what it
    is asked, or when the time of `until` is over.
    """

    def __init__(self, filesystem: FileSystem, path: str, uri: str) -> None:
        self.uri = uri
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        self._deadline: float | None = None

    @contextmanager
    def until(self, wait_s: float) -> Iterator[None]:
        """Let transfers within the block end in an error once so many seconds are over."""
        self._deadline = time.monotonic() + wait_s
        try:
            yield
        finally:
            self._deadline = None

    def files(self) -> set[str]:
        """Names of all files, at any depth."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path, allow_not_found=True, recursive=True)
        with self._complaints("list it"):
            found = self._filesystem.get_file_info(selector)
        prefix = f"{self._path}/"
        return {
            info.path.removeprefix(prefix)
            for info in found
            if info.type == FileType.File and info.path.startswith(prefix)
        }

    def read(self, name: str) -> bytes | None:
        """A small file; None when it is not there."""
        with self._complaints(f"read {name}"):
            try:
                stream = self._filesystem.open_input_file(self._place(name))
            except FileNotFoundError:
                return None
            with stream:
                found: bytes = stream.read(stream.size())
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, so that a reader finds the old one or the new one."""
        with self._complaints(f"write {name}"), self._new_file(name) as stream:
            stream.write(content)

    def upload(self, name: str, source: Path) -> str:
        """Copy a file there, so that a reader finds the old one or the new one.

        Returns:
            The SHA-256 of what was copied.
        """
        digest = hashlib.sha256()
        with (
            self._complaints(f"write {name}"),
            source.open("rb") as local,
            self._new_file(name) as stream,
        ):
            while chunk := local.read(_CHUNK_BYTES):
                digest.update(chunk)
                stream.write(chunk)
        return digest.hexdigest()

    def download(self, name: str, target: Path) -> str:
        """Copy a file here; `target` is the old one or the whole new one at every moment.

        Returns:
            The SHA-256 of what was copied.

        Raises:
            CheckpointError: when it is not there.
        """
        digest = hashlib.sha256()
        staging = target.with_name(f".{target.name}.new")
        with self._complaints(f"fetch {name}"):
            try:
                source = self._filesystem.open_input_file(self._place(name))
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{self.uri}/{name} is missing; upload its directory again"
                ) from error
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with source as stream, staging.open("wb") as local:
                    while chunk := stream.read(_CHUNK_BYTES):
                        self._check_time(name)
                        digest.update(chunk)
                        local.write(chunk)
                    local.flush()
                    os.fsync(local.fileno())
                staging.replace(target)
            finally:
                staging.unlink(missing_ok=True)
        return digest.hexdigest()

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error."""
        with self._complaints(f"delete {name}"), suppress(FileNotFoundError):
            self._filesystem.delete_file(self._place(name))

    def upload_whole(self, name: str, source: Path) -> None:
        """Copy a whole directory there; until it is all there, it has no manifest.

        Raises:
            CheckpointError: when `source` is not whole.
        """
        listed = listed_files(source)
        self.delete(f"{name}/{MANIFEST}")
        for file, expected in listed.items():
            if self.upload(f"{name}/{file}", source / file) != expected:
                raise CheckpointError(
                    f"{source / file} is truncated or altered since it was written; it is not "
                    f"uploaded to {self.uri}"
                )
        self.write(f"{name}/{MANIFEST}", (source / MANIFEST).read_bytes())

    def download_whole(self, name: str, target: Path) -> None:
        """Copy a whole directory here, in the place of what is there.

        Raises:
            CheckpointError: when it is not whole there, or cannot be written here.
        """
        listed = self._listed(name)
        with whole_directory(target) as staging:
            for file, expected in listed.items():
                if self.download(f"{name}/{file}", staging / file) != expected:
                    raise CheckpointError(
                        f"{self.uri}/{name}/{file} is truncated or altered since it was "
                        "uploaded; upload the directory again"
                    )

    def delete_whole(self, name: str) -> None:
        """Delete a directory, its manifest first; one that is not there is no error."""
        self.delete(f"{name}/{MANIFEST}")
        with self._complaints(f"delete {name}"), suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._place(name))

    def _listed(self, name: str) -> dict[str, str]:
        """Hashes by file name; a manifest from elsewhere may name anything."""
        place = f"{self.uri}/{name}/{MANIFEST}"
        content = self.read(f"{name}/{MANIFEST}")
        if content is None:
            raise CheckpointError(
                f"{place} is missing; the upload of the directory was not completed"
            )
        listed = parse_manifest(content, place)
        for file in listed:
            if leads_outside(file) or file.startswith(".") or file == MANIFEST:
                raise CheckpointError(
                    f"{place} lists {file!r}, which is not a file of that directory; do not use it"
                )
        return listed

    def _place(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextmanager
    def _new_file(self, name: str) -> Iterator[Any]:
        """A stream to a file that appears as a whole.

        Object stores show an object once it is closed, also when the block fails: it is deleted
        then. A file system shows what is written, so there it is written beside its place.
        """
        place = self._place(name)
        is_local = self._filesystem.type_name == "local"
        staging = f"{place}.new" if is_local else place
        if is_local:
            self._filesystem.create_dir(place.rpartition("/")[0], recursive=True)
        stream = self._filesystem.open_output_stream(staging)
        try:
            with stream:
                yield stream
        except BaseException:
            with suppress(OSError):
                self._filesystem.delete_file(staging)
            raise
        if is_local:
            with Path(staging).open("rb") as written:
                os.fsync(written.fileno())
            self._filesystem.move(staging, place)

    def _check_time(self, name: str) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeoutError(f"the time limit for transfers ended before {name} was copied")

    @contextmanager
    def _complaints(self, asked: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            reason = " ".join(str(error).split())
            raise SetupError(
                f"cannot {asked} in {self.uri}: {reason}; check the address, the credentials and "
                "the network"
            ) from error


def open_remote(uri: str, timeout_s: float) -> RemoteDirectory:
    """A directory by an address that `mirror.uri` may be.

    Nothing is asked of the storage yet.

    Args:
        uri: As in the configuration.
        timeout_s: Longest silence of the storage within one request.

    Raises:
        SetupError: when pyarrow is missing, or lacks what the address needs.
    """
    try:
        from pyarrow import fs
    except ImportError as error:
        raise SetupError(
            f"mirror.uri {uri} needs pyarrow; install the extra 'mirror', or unset it"
        ) from error
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return RemoteDirectory(fs.LocalFileSystem(), unquote(parts.path), uri)
    path = f"{parts.netloc}{unquote(parts.path)}"
    try:
        if parts.scheme == "gs":
            limit = timedelta(seconds=timeout_s)
            return RemoteDirectory(fs.GcsFileSystem(retry_time_limit=limit), path, uri)
        options = dict(parse_qsl(parts.query))
        endpoint = options.pop("endpoint_override", None) or _endpoint_of_environment()
        if endpoint is not None:
            options["endpoint_override"] = endpoint
        connect_s = min(timeout_s, _CONNECT_TIMEOUT_S)
        filesystem = fs.S3FileSystem(
            request_timeout=timeout_s, connect_timeout=connect_s, **options
        )
    except (ImportError, OSError, ValueError) as error:
        raise SetupError(f"mirror.uri {uri} cannot be used: {error}; correct it") from error
    return RemoteDirectory(filesystem, path, uri.partition("?")[0])


def _endpoint_of_environment() -> str | None:
    """The variables of the AWS tools, which pyarrow 26 reads only where it parses an address."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
