"""The same against a real S3 server: whole directories, a lost run, a server that goes away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mirrored_runs import Run, content, mirrored_config
from s3_server import S3Server, s3_server

import rlrag.runs.mirror as mirror_module
from rlrag.errors import CheckpointError, SetupError
from rlrag.files.directories import check_whole, whole_directory
from rlrag.files.remote import open_remote
from rlrag.runs.mirror import mirrored


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture(autouse=True)
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an operator sets it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(mirror_module, "_POLL_S", 0.01)
    monkeypatch.setattr(mirror_module, "_FIRST_RETRY_S", 0.01)


def write(target: Path, text: str) -> Path:
    with whole_directory(target) as directory:
        (directory / "a.txt").write_text(text)
        (directory / "inner").mkdir()
        (directory / "inner" / "b.bin").write_bytes(bytes(range(256)) * 45_000)  # several parts
    return target


def test_a_directory_comes_back_is_replaced_and_deleted(tmp_path):
    remote = open_remote("s3://bucket/runs/one?region=us-east-1", 10)
    assert remote.files() == set()
    assert remote.read("config.json") is None
    for text in ("first", "second"):
        remote.upload_whole("step-1", write(tmp_path / text, text))
        assert remote.files() == {"step-1/a.txt", "step-1/inner/b.bin", "step-1/manifest.json"}
        remote.download_whole("step-1", tmp_path / "back")
        check_whole(tmp_path / "back")
        assert content(tmp_path / "back") == content(tmp_path / text)
    open_remote("s3://bucket/runs", 10).write("one/step-1/a.txt", b"torn")
    with pytest.raises(CheckpointError, match=r"runs/one/step-1/a\.txt is truncated or altered"):
        remote.download_whole("step-1", tmp_path / "back")
    remote.delete("step-1/manifest.json")
    with pytest.raises(CheckpointError, match="was not completed"):
        remote.download_whole("step-1", tmp_path / "back")
    remote.delete_whole("step-1")
    remote.delete_whole("step-1")
    assert remote.files() == set()


def test_a_lost_run_comes_back_and_only_what_is_kept_stays_there(tmp_path):
    config = mirrored_config("s3://bucket/runs/two")
    run = Run(tmp_path / "run", config)
    for last in (3, 6, 9):
        with mirrored(config, run.steps_to(last).dir, print):
            pass
    expected = content(run.dir.path)
    assert open_remote("s3://bucket/runs/two", 10).files() == expected.keys()
    shutil.rmtree(run.dir.path)
    said: list[str] = []
    again = Run(tmp_path / "run", config)
    with mirrored(config, again.dir, said.append):
        assert again.store.steps() == [0, 6, 9] or said
    assert said == ["fetched checkpoint 9 from s3://bucket/runs/two/"]
    needed = {n: c for n, c in expected.items() if "step-000006" not in n}  # neither best nor last
    assert content(run.dir.path) == needed
    again.steps_to(12)
    with mirrored(config, again.dir, print):
        pass
    assert open_remote("s3://bucket/runs/two", 10).files() >= content(again.dir.path).keys()


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(SetupError, match=r"cannot write a in s3://absent/run: .*NO_SUCH_BUCKET"):
        open_remote("s3://absent/run", 10).write("a", b"")


def test_a_server_that_goes_away_ends_no_run_but_is_reported(tmp_path, server):
    """The last of these tests, as it ends the server."""
    config = mirrored_config("s3://bucket/runs/three")
    run = Run(tmp_path / "run", config)

    def train() -> None:
        with mirrored(config, run.dir, print):
            server.end()
            run.steps_to(0).steps_to(3)

    with pytest.raises(SetupError) as caught:
        train()
    assert run.store.steps() == [0, 3]
    assert "not in s3://bucket/runs/three, after" in str(caught.value)
    assert "run the same command to try again" in str(caught.value)
    with pytest.raises(SetupError, match="cannot list it in s3://bucket/runs/three"):
        train()
