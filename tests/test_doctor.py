"""`jobs.doctor` in broken environments: the right sentence and exit code each time, and no hang.

Each is really broken: a bound port, an empty PATH, a malformed file.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from rlrag.cli.command_line import exit_code
from rlrag.cli.doctor import machine
from rlrag.cli.doctor.checks import ok, run_check
from rlrag.cli.doctor.files import check_corpus, check_model
from rlrag.cli.doctor.packages import check_python, extras_of
from rlrag.cli.doctor.program import main
from rlrag.cli.doctor.ray_cluster import check_cluster
from rlrag.config import (
    BETTER_GENERATOR,
    DataConfig,
    GeneratorConfig,
    RetrievalConfig,
    RunConfig,
    TrainingConfig,
)
from rlrag.errors import ConfigError, RlragError, SetupError
from rlrag.runs.directory import RunDirectory
from rlrag.training.needs import Needs

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Seen:
    """How the program ended: its code, its findings by name, what it printed."""

    code: int
    findings: dict[str, dict[str, str]]
    lines: list[str]

    def failed(self) -> set[str]:
        return {name for name, found in self.findings.items() if found["status"] == "failed"}


@pytest.fixture
def examine(tmp_path, model_dir, capsys, monkeypatch):
    """Run the program on small files; flags replace those of a run that would work."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    passages = [{"id": f"p{i}", "contents": f"Title {i}\nthe value is v{i}"} for i in range(5)]
    questions = [
        {"id": f"q{i}", "question": f"what is value {i}?", "golden_answers": [f"v{i}"]}
        for i in range(5)
    ]
    others = [
        {**question, "id": f"e{n}", "question": f"{n}?"} for n, question in enumerate(questions)
    ]
    for name, records in (("corpus", passages), ("questions", questions), ("others", others)):
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    usual: dict[str, object] = {
        "run-dir": tmp_path / "run",
        "cache-dir": tmp_path / "cache",
        "data.corpus": tmp_path / "corpus.jsonl",
        "data.train-questions": tmp_path / "questions.jsonl",
        "data.eval-questions": tmp_path / "others.jsonl",
        "data.num-validation-questions": 2,
        "training.batch-size": 2,
        "retrieval.kind": "bm25",
        "retrieval.encoder": None,
        "generator.model": model_dir,
        "training.launcher": "local",
        "json": tmp_path / "checks.json",
    }

    def run(recipe: str = "factbook", without: tuple[str, ...] = (), **flags: object) -> Seen:
        given = {name.replace("__", ".").replace("_", "-"): value for name, value in flags.items()}
        values = {name: value for name, value in usual.items() if name not in without} | given
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        code, said = 0, ""
        try:
            main([recipe, *words])
        except RlragError as error:
            code, said = exit_code(error), str(error)
        assert bool(code) == ("their lines above say what to do" in said)
        record = json.loads((tmp_path / "checks.json").read_text())
        findings = {found["name"]: found for found in record["checks"]}
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(findings)
        return Seen(code, findings, lines)

    return run


@pytest.mark.parametrize(("num_words", "status"), [(100, "ok"), (110, "ok"), (300, "warning")])
def test_passages_that_loading_would_cut_are_warned_of_over_one_percent(
    num_words, status, tmp_path
):
    """Of eleven passages, ten of 100 words."""
    path = tmp_path / "corpus.jsonl"
    lengths = [*[100] * 10, num_words]
    lines = [{"id": str(n), "contents": f"T\n{'word ' * of}"} for n, of in enumerate(lengths)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = check_corpus(str(path), passage_words=100)
    assert answer.status == status
    assert ("cuts 1 of them" in answer.found) == (num_words > 100)
    assert ("raise data.passage_words" in answer.advice) == (status == "warning")


def test_a_run_that_can_work_has_nothing_to_complain_of(examine, tmp_path):
    seen = examine()
    assert seen.code == 0
    assert seen.failed() == set()
    found = {name: finding["found"] for name, finding in seen.findings.items()}
    assert found["corpus"] == f"{tmp_path / 'corpus.jsonl'}: the first 5 passages are well-formed"
    assert found["train questions"].endswith("all 5 questions are well-formed")
    assert found["split"] == "3 of 5 questions are used for training"
    assert found["run directory"] == f"{tmp_path / 'run'}: free for a run"
    assert found["compiler"] == "not needed: no vLLM engine on a CPU"
    assert {"python", "packages", "memory", "disk", "gpu", "generator model"} <= found.keys()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def empty_path(tmp_path, monkeypatch) -> Path:
    """A folder that is the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_no_compiler(examine, empty_path):
    seen = examine(training__launcher="ray", generator__num_actors=1)
    assert seen.code == 4
    assert seen.findings["compiler"]["found"] == (
        "vLLM compiles its sampler and needs a C++ compiler, but c++ , g++ , clang++ is not on the "
        "PATH"
    )
    assert "apt-get install g++" in seen.findings["compiler"]["advice"]
    assert seen.lines[-1].startswith("failed   compiler         vLLM compiles")


def test_a_compiler_without_its_library(empty_path):
    compiler = empty_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: vector: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    answer = machine.check_compiler(RunConfig())
    assert answer.found == "c++ cannot compile: fatal error: vector: No such file"
    assert "standard library's headers" in answer.advice


def test_a_package_of_a_wrong_version(examine, tmp_path, monkeypatch):
    information = tmp_path / "older" / "tyro-0.1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tyro\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(information.parent)
    seen = examine()
    assert seen.code == 4
    assert seen.failed() == {"packages"}
    assert seen.findings["packages"]["found"] == "tyro is 0.1, wanted <2,>=1.0"
    assert "make setup" in seen.findings["packages"]["advice"]


def test_a_python_that_is_too_old():
    assert check_python("3.12.1").status == "ok"
    answer = check_python("3.9.2")
    assert answer.status == "failed"
    assert answer.found.startswith("this is Python 3.9.2, but the project needs ")
    assert ">=3.11" in answer.found


def test_a_taken_port(examine, unused_port):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", unused_port))
        listener.listen()
        seen = examine(ports=unused_port)
    assert seen.code == 4
    assert seen.failed() == {"ports"}
    assert seen.findings["ports"]["found"] == f"port {unused_port} is taken"
    assert machine.check_ports((unused_port,)).status == "ok"


def test_a_cluster_that_nobody_runs(examine, unused_port, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused_port}")
    seen = examine(training__launcher="ray", generator__backend="transformers")
    assert seen.code == 4
    assert seen.failed() == {"ray"}
    assert seen.findings["ray"]["found"] == (
        f"cannot reach a Ray cluster at 127.0.0.1:{unused_port}: [Errno 111] Connection refused"
    )
    assert "correct RAY_ADDRESS" in seen.findings["ray"]["advice"]
    assert seen.findings["memory"]["found"].startswith("not checked: the run uses the cluster")


def test_something_mute_where_a_cluster_should_be(examine, monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        seen = examine(
            training__launcher="ray", generator__backend="transformers", check_timeout_s=6
        )
    assert seen.findings["ray"]["found"] == (
        f"{address} accepts connections but did not answer as a Ray cluster within 3 s"
    )


class Token(grpc.GenericRpcHandler):
    """A cluster that takes no call, as one does whose token is missing or wrong."""

    def service(self, handler_call_details):
        def refuse(request, context):
            missing = "InvalidAuthToken: Authentication token is missing or incorrect"
            context.abort(grpc.StatusCode.UNAUTHENTICATED, missing)

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture
def wants_a_token(monkeypatch) -> Iterator[str]:
    """Not at 127.0.0.1, which Ray replaces by the address that others see."""
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Token(),))
    address = f"127.0.0.2:{server.add_insecure_port('127.0.0.2:0')}"
    server.start()
    monkeypatch.setenv("RAY_ADDRESS", address)
    yield address
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("mode", "token", "reason"),
    [
        (None, "a" * 64, "RAY_AUTH_MODE is not set, so none was sent"),
        ("token", "a" * 64, "the one that was sent is another"),
        ("token", None, "RAY_AUTH_MODE is 'token', and there is none on this machine"),
    ],
)
def test_a_cluster_whose_token_is_missing_or_wrong(
    examine, wants_a_token, monkeypatch, tmp_path, mode, token, reason
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    seen = examine(training__launcher="ray", generator__backend="transformers")
    assert seen.code == 4
    assert seen.failed() == {"ray"}
    assert seen.findings["ray"]["found"] == (
        f"the Ray cluster at {wants_a_token} cannot be joined without its token: {reason}"
    )
    assert seen.findings["ray"]["advice"].startswith("set RAY_AUTH_MODE=token, and have the same")


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
@pytest.mark.parametrize("asks_for_token", [True, False])
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_that_takes_anyone_is_warned_of(monkeypatch, mode, asks_for_token, address):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)

    def ask(where, variables):
        assert where == address
        if asks_for_token and {"RAY_AUTH_MODE": mode, **variables}["RAY_AUTH_MODE"] != "token":
            raise SetupError("without its token; set it")
        return {"CPU": 64, "node:10.0.0.1": 1}

    config = RunConfig(training=TrainingConfig(launcher="ray"))
    needs = Needs(0, 0, 0, 0, cpus=0.5, gpus=0, nodes=1, unknown=())
    if address and asks_for_token and mode != "token":
        with pytest.raises(SetupError, match="without its token"):
            check_cluster(config, needs, 1, ask)
        return
    answer = check_cluster(config, needs, 1, ask)
    # A run starts its own cluster with a token, unless it is told not to.
    takes_anyone = not asks_for_token if address else mode == "disabled"
    assert answer.status == ("warning" if takes_anyone else "ok")
    assert ("asks for no token" in answer.found) == takes_anyone
    assert ("RAY_AUTH_MODE=token" in answer.advice) == takes_anyone


def test_more_reserved_than_this_machine_has(examine):
    seen = examine(
        training__launcher="ray", generator__backend="transformers", generator__num_actors=4000
    )
    assert "ray" in seen.failed()
    assert (
        "the run reserves 2000.5 CPU and 0 GPU, but this machine has"
        in (seen.findings["ray"]["found"])
    )


def test_more_nodes_than_one_machine_is(examine):
    seen = examine(
        training__launcher="ray",
        training__worker_placement="strict_spread",
        training__num_workers=2,
        generator__backend="transformers",
    )
    assert "ray" in seen.failed()
    assert seen.findings["ray"]["found"] == "the run needs 2 nodes, but this machine has 1"
    assert "--training.worker-placement" in seen.findings["ray"]["advice"]


def test_a_missing_data_folder(examine, monkeypatch):
    monkeypatch.delenv("RLRAG_DATA_DIR", raising=False)
    data = ("data.corpus", "data.train-questions", "data.eval-questions")
    seen = examine("nq", without=data)
    assert seen.code == 3
    assert seen.failed() == {"corpus", "train questions", "eval questions"}
    assert "$RLRAG_DATA_DIR/corpus/nq.jsonl.gz does not exist" in seen.findings["corpus"]["found"]
    assert "RLRAG_DATA_DIR" in seen.findings["corpus"]["advice"]


def test_a_malformed_question_file(examine, tmp_path):
    path = tmp_path / "broken.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "q1", "question": "who?", "golden_answers": "me"}\n'))
    seen = examine(data__train_questions=path)
    assert seen.code == 3
    assert seen.failed() == {"train questions"}
    found = seen.findings["train questions"]
    assert f"{path}:1" in found["found"]
    assert "golden_answers" in found["found"]
    assert found["kind"] == "data"


def test_questions_without_golden_answers_and_those_asked_twice(examine, tmp_path):
    path = tmp_path / "questions.jsonl"
    text = path.read_text()
    path.write_text(text.replace('["v0"]', "[]").replace('["v1"]', "[]"))
    seen = examine(data__num_validation_questions=1, data__eval_questions=path)
    assert (seen.code, seen.findings["split"]["status"]) == (0, "warning")
    assert "2 of 5 questions of" in seen.findings["split"]["found"]
    assert "3 of 5 evaluation questions are training" in seen.findings["split"]["found"]
    path.write_text(re.sub(r'\["v.?"\]', "[]", text))
    seen = examine()
    assert (seen.code, seen.failed()) == (3, {"split"})
    assert "none of the 5 questions of" in seen.findings["split"]["found"]


def test_a_file_that_is_not_there(examine, tmp_path):
    missing = tmp_path / "feedback.sqlite"
    seen = examine(algorithm__name="feedback", algorithm__log=missing)
    assert seen.code == 3
    assert seen.findings["other files"]["found"] == f"{missing} does not exist"
    seen = examine(selector__weights=missing)
    assert seen.code == 3
    assert seen.findings["other files"]["found"] == (
        f"selector.weights is {str(missing)!r}, which is not a file"
    )


def test_a_missing_model(examine, tmp_path):
    seen = examine(generator__model="/no/such/model")
    assert seen.code == 4
    assert seen.failed() == {"generator model"}
    assert seen.findings["generator model"]["found"] == (
        "model directory '/no/such/model' does not exist"
    )
    (tmp_path / "half").mkdir()
    seen = examine(generator__model=tmp_path / "half")
    assert seen.findings["generator model"]["found"] == (
        f"{tmp_path / 'half'} lacks config.json or .safetensors weights"
    )


def test_a_run_directory_of_another_configuration(examine, tmp_path):
    RunDirectory(tmp_path / "run").claim(RunConfig())
    before = {path.name for path in (tmp_path / "run").iterdir()}
    seen = examine()
    assert seen.code == 2
    assert seen.failed() == {"run directory"}
    found = seen.findings["run directory"]
    assert "recipe: 'custom' there, 'factbook' given" in found["found"]
    assert found["advice"].startswith("choose another --run-dir")
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_check_that_hangs_is_left_behind():
    found = run_check("storage", lambda: ok(str(threading.Event().wait())), timeout_s=0.05)
    assert (found.status, found.found) == ("failed", "no answer within 0.05 s")
    assert "--check-timeout-s" in found.advice


def test_a_check_that_breaks_is_an_answer():
    def breaks():
        raise ZeroDivisionError("by nothing")

    found = run_check("storage", breaks, timeout_s=10)
    assert found.line() == (
        "failed   storage          could not be checked: ZeroDivisionError: by nothing; fix "
        "the cause that the error names"
    )


@pytest.mark.parametrize("words", [["zzz"], ["--check-timeout-s", "0"], ["nq", "--seed", "-1"]])
def test_what_is_wrong_on_the_command_line_is_code_2(words):
    with pytest.raises(ConfigError) as caught:
        main(words)
    assert exit_code(caught.value) == 2


_PROGRAM = """
import sys
from rlrag.cli.command_line import run_program
from rlrag.cli.doctor.program import main
try:
    run_program(main)
finally:
    print({"ray", "vllm"} & set(sys.modules))
"""


def test_as_a_program_it_needs_neither_ray_nor_vllm_nor_a_hub(tmp_path, unused_port):
    """A model that only a hub has, and no hub."""
    words = ["--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words, "--generator.model", "someone/no-such-model"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "HF_ENDPOINT": f"http://127.0.0.1:{unused_port}",
            "HF_HOME": str(tmp_path / "hub"),
        },
        timeout=300,
    )
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("error: ")
    lines = done.stdout.splitlines()
    assert lines[-1] == "set()"
    assert lines[-2].startswith(
        "failed   generator model  model 'someone/no-such-model' is not on this machine"
    )


def test_each_built_in_model_asks_for_the_extra_that_brings_it(tmp_path):
    """The better generator is under terms of its own, so that nobody else is told to install it."""
    usual = RunConfig()
    better = RunConfig(generator=GeneratorConfig(model=BETTER_GENERATOR))
    assert "gemma" not in extras_of(usual)
    assert {"demo", "gemma"} <= set(extras_of(better))
    assert "extra 'gemma'" in check_model(BETTER_GENERATOR, tmp_path).found


def test_a_built_in_model_that_the_run_does_not_open_asks_for_nothing():
    of_files = RunConfig(
        data=DataConfig(corpus="c.jsonl", train_questions="t.jsonl", eval_questions="e.jsonl"),
        retrieval=RetrievalConfig(kind="bm25", encoder=None),
        generator=GeneratorConfig(model="./mine"),
    )
    assert "demo" not in extras_of(of_files)
