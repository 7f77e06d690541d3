"""The arguments of `serve run` and the files in deploy/ describe services that can be built."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from serve_bundles import make_bundle
from serve_load import stop

from rlrag.errors import CheckpointError, ConfigError, SetupError
from rlrag.serving.app import NotServableError, build
from rlrag.serving.http.listening import check_free, url_of_running
from rlrag.serving.http.proxy import PROXY_VARIABLES
from rlrag.serving.settings import parse_settings

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture(scope="module")
def bundle(openrag_files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    return make_bundle(folder / "bundle", openrag_files, folder / "cache", seed=1)


@pytest.fixture(autouse=True)
def variables(monkeypatch) -> None:
    """None of the proxy's variables is set, and none stays."""
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_bundle_is_all_that_a_service_needs(bundle, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
    assert isinstance(build({"bundle": str(bundle)}), Application)
    assert os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] == "300"
    assert {name for name in PROXY_VARIABLES if name in os.environ} == set(PROXY_VARIABLES)


def test_a_missing_bundle_is_told_before_anything_starts(tmp_path):
    with pytest.raises(NotServableError, match="does not exist") as caught:
        build({"bundle": str(tmp_path / "nowhere")})
    assert isinstance(caught.value.__cause__, CheckpointError)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "'bundle'"),
        ({"bundle": "b", "limits.timeout": "5"}, r"'limits\.timeout'"),
        ({"bundle": "b", "limits.timeout_s": "soon"}, r"'limits\.timeout_s'"),
        ({"bundle": "b", "generator_backend": "llama"}, "'generator_backend'"),
        ({"bundle": "b", "feedback.explore_share": "2"}, r"'feedback\.explore_share'"),
    ],
)
def test_a_wrong_setting_is_named(arguments, named):
    with pytest.raises(NotServableError, match=f"service setting {named}") as caught:
        build(arguments)
    assert isinstance(caught.value.__cause__, ConfigError)


def test_the_command_line_says_what_is_wrong_and_no_more(tmp_path):
    from ray.serve.scripts import cli

    words = ["run", "serve.app:build", f"bundle={tmp_path / 'nowhere'}"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    *_, last = result.stderr.splitlines()
    assert last.startswith(f"error: bundle {tmp_path / 'nowhere'} does not exist")
    assert "Traceback" not in result.output
    again = pickle.loads(pickle.dumps(NotServableError("no")))
    assert str(again) == "no"


def test_a_key_file_that_cannot_be_read_is_told(bundle, tmp_path):
    with pytest.raises(NotServableError, match=r"key file .* cannot be read"):
        build({"bundle": str(bundle), "access.keys_file": str(tmp_path / "keys")})


@pytest.mark.parametrize("name", ["serve-cpu.yaml", "serve-gpu.yaml"])
def test_files_for_serve_deploy_are_valid(name):
    found = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / name).read_text()))
    (application,) = found.applications
    assert application.import_path == "serve.app:build"
    assert parse_settings(application.args).bundle == "/bundles/current"
    assert found.http_options.host == "127.0.0.1"


@contextmanager
def listener() -> Iterator[int]:
    """A port on which a program listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen()
        yield found.getsockname()[1]


def test_an_address_that_is_taken_is_refused_with_another_one():
    said = r"cannot listen on 127\.0\.0\.1:\d+: another program .*, such as port=\d+$"
    with listener() as port, pytest.raises(SetupError, match=said):
        check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1:8000: Cannot assign"):
        check_free("192.0.2.1", 8000)


def test_ray_serve_that_listens_elsewhere_is_named():
    running = HTTPOptions(host="127.0.0.1", port=8000)
    for host, port in ((None, None), ("127.0.0.1", None), (None, 8000)):
        assert url_of_running(running, host, port) == "http://127.0.0.1:8000"
    for host, port, asked in ((None, 8001, "127.0.0.1:8001"), ("0.0.0.0", None, "0.0.0.0:8000")):
        said = rf"listens on 127\.0\.0\.1:8000, not on {asked}; leave .* `serve shutdown`"
        with pytest.raises(SetupError, match=said):
            url_of_running(running, host, port)


def test_an_address_is_for_a_service_that_is_started_by_hand(bundle):
    with pytest.raises(
        NotServableError, match=r"host=::1 port=8001 works only with `rlrag serve` "
    ):
        build({"bundle": str(bundle), "host": "::1", "port": "8001"})
    with pytest.raises(NotServableError, match="service setting 'port'"):
        build({"bundle": str(bundle), "port": "80000"})


def command(*words: str, address: str = "local") -> dict[str, Any]:
    """How `subprocess` runs Ray Serve's or this project's command line, on that Ray cluster."""
    start = "from rlrag.cli import main; main()"
    if words[0] == "run":
        start = "from ray.serve.scripts import cli; cli()"
    paths = f"{Path(__file__).parent}:{DEPLOY.parent}"
    return {
        "args": [sys.executable, "-c", start, *words],
        "env": os.environ
        | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths},
        "stderr": subprocess.PIPE,
        "text": True,
    }


@pytest.mark.slow
def test_a_service_ends_where_another_program_listens(bundle):
    with listener() as port:
        ended = subprocess.run(**command("serve", str(bundle), f"port={port}"), timeout=300)
    assert ended.returncode == 2
    *_, last = ended.stderr.splitlines()
    assert last.startswith(f"error: cannot listen on 127.0.0.1:{port}: another program")


@pytest.mark.slow
def test_it_says_when_it_is_ready_where_it_was_told_to_listen():
    with listener() as port:
        pass
    url, other = f"http://127.0.0.1:{port}", port + 1 if port < 65_535 else port - 1
    with subprocess.Popen(**command("run", "listening_app:build", f"port={port}")) as service:
        try:
            said = []
            for line in service.stderr:
                said.append(line)
                if line.startswith("ready at "):
                    break
            assert said[-1].startswith(f"ready at {url} with the bundle none;"), "".join(said)
            address, asked = httpx.get(url).text.split()
            assert int(asked) == 3
            words = command("run", "listening_app:build", f"port={other}", address=address)
            second = subprocess.run(**words, timeout=300)
            assert second.returncode != 0, second.stderr
            where = f"listens on 127.0.0.1:{port}, not on 127.0.0.1:{other}; leave out host"
            assert where in second.stderr, second.stderr
            assert httpx.get(url).status_code == 200
        finally:
            stop(service)
