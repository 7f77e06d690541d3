"""The arguments of `serve run` and the files in deploy/ describe services that can be built."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from serve_bundles import make_bundle

from rlrag.errors import CheckpointError, ConfigError
from rlrag.serving.app import NotServableError, build
from rlrag.serving.proxy import PROXY_VARIABLES
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
