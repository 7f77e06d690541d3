"""The whole service on a local Ray cluster: what it answers is what evaluation finds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import episodes
import httpx
import pytest
from serve_bundles import bundle_config, make_bundle
from serve_load import Load, processes_of, wait_for

from rlrag.bundle import load_bundle
from rlrag.bundle_files import read_bundle
from rlrag.generation.build import open_generator
from rlrag.pipeline import open_evaluation_data, open_library, open_reward
from rlrag.rewards.answering import AnsweringReward

pytestmark = pytest.mark.slow

ADMIN_KEY = "a-key-of-the-operator"
AS_OPERATOR = {"Authorization": f"Bearer {ADMIN_KEY}"}
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "serving.md"


@pytest.fixture(scope="module")
def bundles(openrag_files, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("served")
    return tuple(
        make_bundle(folder / name, openrag_files, folder / "cache", seed)
        for seed, name in enumerate(("first", "second"), 1)
    )


@pytest.fixture(scope="module")
def service(bundles, tmp_path_factory) -> Iterator[httpx.Client]:
    """A service with a replica of each part; its cluster ends with the module."""
    import socket

    import ray
    from ray import serve as ray_serve

    from rlrag.serving.app import build
    from rlrag.serving.http.proxy import PROXY_VARIABLES

    folder = tmp_path_factory.mktemp("state")
    keys = folder / "admin-keys"
    keys.write_text(ADMIN_KEY + "\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PROXY_VARIABLES.items():
            patch.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=10**8,
        )
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = {
            "bundle": str(bundles[0]),
            "state_dir": str(folder / "state"),
            "generator_backend": "transformers",
            "generator.num_cpus": "0.2",
            "access.admin_keys_file": str(keys),
        }
        ray_serve.run(build(settings), name="rlrag", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client)
            yield client
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def wait_until_ready(client: httpx.Client) -> None:
    end = time.monotonic() + 120
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < end, "the service did not become ready"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def evaluated(openrag_files, bundles) -> dict[Path, list[dict]]:
    """For each bundle the picks and answers of evaluation."""
    found = {}
    for bundle in bundles:
        config = bundle_config(openrag_files, bundle.parent / "cache")
        generator, prompts = open_generator(config.generator, "local", config.cache_path)
        table = open_evaluation_data(config, open_library(config))[0]
        picks = episodes.picks(load_bundle(bundle).policy, table)
        selections = [
            [table.passages(row)[position] for position in pick] for row, pick in enumerate(picks)
        ]
        reward = open_reward(config, generator, prompts)
        assert isinstance(reward, AnsweringReward)
        answers = reward.answer(table.questions, selections)
        generator.close()
        found[bundle] = [
            {
                "question": question.question,
                "answer": answer.text,
                "logp": answer.logp,
                "ids": [passage.id for passage in selection],
            }
            for question, answer, selection in zip(
                table.questions, answers, selections, strict=True
            )
        ]
    return found


def check_equal(answered: dict, expected: dict) -> None:
    assert answered["answer"] == expected["answer"]
    assert [passage["id"] for passage in answered["passages"]] == expected["ids"]
    assert answered["answer_logp"] == pytest.approx(expected["logp"], abs=1e-3)


def load(service: httpx.Client, bundle: Path, **fields) -> httpx.Response:
    return service.post(
        "/admin/bundle",
        json={"path": str(bundle), **fields},
        headers=AS_OPERATOR,
        timeout=120,
    )


def test_served_answers_are_those_of_evaluation(service, bundles, evaluated):
    version = read_bundle(bundles[0]).version
    for expected in evaluated[bundles[0]]:
        response = service.post("/v1/answer", json={"question": expected["question"]})
        assert response.status_code == 200, response.text
        answered = response.json()
        check_equal(answered, expected)
        assert answered["bundle_version"] == version
        assert all(0 < passage["selection_prob"] <= 1 for passage in answered["passages"])
        assert {"retrieve", "select", "generate", "total"} <= set(answered["timings_ms"])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_commands_of_the_page_work(service, bundles):
    ask, change = [line for line in page_blocks("") if line.startswith("curl ")]
    said = run_in_shell(ask, service)
    assert said["passages"]
    assert {"answer", "answer_logp", "bundle_version", "timings_ms"} <= said.keys()
    version = read_bundle(bundles[1]).version
    try:
        said = run_in_shell(change.replace("/bundles/new", str(bundles[1])), service)
        assert said == {"version": version, "role": "canary", "already_loaded": False}
        assert service.get("/v1/versions").json()["canary"] == version
    finally:
        service.delete("/admin/bundle/canary", headers=AS_OPERATOR)


def test_the_openai_client_of_the_page_works(service, capsys):
    code = "\n".join(page_blocks("python"))
    question = "What is the capital of Mongolia?"
    assert question in code
    exec(compile(code.replace("localhost:8000", service.base_url.netloc.decode()), PAGE, "exec"))
    answered = service.post("/v1/answer", json={"question": question}).json()
    assert capsys.readouterr().out == answered["answer"] + "\n"


def test_a_client_of_search_r1_finds_what_retrieval_finds(service, evaluated, bundles):
    """A rollout of Search-R1 posts a batch of queries and shows documents to its policy so."""
    queries = [one["question"] for one in evaluated[bundles[0]]][:2]
    sent = {"queries": queries, "topk": 3, "return_scores": True}
    found = httpx.post(service.base_url.join("/retrieve"), json=sent, timeout=60).json()["result"]
    assert len(found) == len(queries)
    for query, hits in zip(queries, found, strict=True):
        shown = []
        for rank, hit in enumerate(hits, start=1):
            title, *text = hit["document"]["contents"].split("\n")
            shown.append(f"Doc {rank}(Title: {title}) {' '.join(text)}")
        expected = service.post("/v1/retrieve", json={"question": query, "num_candidates": 3})
        passages = expected.json()["passages"]
        assert len(passages) == 3
        assert shown == [
            f"Doc {rank}(Title: {passage['title']}) {passage['text']}"
            for rank, passage in enumerate(passages, start=1)
        ]
        assert [hit["document"]["id"] for hit in hits] == [passage["id"] for passage in passages]
        assert [hit["score"] for hit in hits] == [p["retriever_score"] for p in passages]


def page_blocks(language: str) -> list[str]:
    """Commands, or lines of code, of the page about serving."""
    fences = re.findall(r"^```(.*?)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [block for name, block in fences if name.partition(" ")[0] == language]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def run_in_shell(command: str, service: httpx.Client) -> dict:
    command = command.replace("localhost:8000", service.base_url.netloc.decode())
    environment = {**os.environ, "ADMIN_KEY": ADMIN_KEY}
    done = subprocess.run(
        command, shell=True, check=True, capture_output=True, timeout=120, env=environment
    )
    return json.loads(done.stdout)


def test_a_damaged_bundle_is_refused_and_the_old_one_stays(service, bundles, tmp_path):
    response = load(service, tmp_path / "nowhere", role="active")
    assert response.status_code == 422, response.text
    assert "does not exist" in response.json()["detail"]
    versions = service.get("/v1/versions").json()
    assert versions["active"] == read_bundle(bundles[0]).version


def test_bundles_change_under_load_without_a_failed_or_mixed_answer(service, bundles, evaluated):
    """Each answer is wholly that of the version that it names, and none fails."""
    expected = {
        read_bundle(bundle).version: {one["question"]: one for one in evaluated[bundle]}
        for bundle in bundles
    }
    questions = [one["question"] for one in evaluated[bundles[0]]]
    with Load(service.base_url, lambda turn: questions[turn % len(questions)]) as asked:
        for change in range(20):
            bundle = bundles[(change + 1) % 2]
            response = load(service, bundle, role="active")
            assert response.status_code == 200, response.text
            assert service.get("/v1/versions").json()["active"] == read_bundle(bundle).version
    assert {reply.status for reply in asked.replies} == {200}
    answered = [(reply.question, reply.body) for reply in asked.replies]
    assert {body["bundle_version"] for _, body in answered} == set(expected)
    for question, body in answered:
        check_equal(body, expected[body["bundle_version"]][question])


@pytest.mark.parametrize(
    "process", ["Retriever", "Selector", "Generator", "EngineProcess", "Registry", "Ingress"]
)
def test_a_process_that_dies_costs_no_more_than_503_until_it_is_replaced(
    service, evaluated, bundles, process, record_property
):
    """Every request is answered or refused; once there is another process, all are answered."""
    questions = [one["question"] for one in evaluated[bundles[0]]]

    def never_asked_before(turn: int) -> str:
        return f"{questions[turn % len(questions)]} {process} {turn}"

    with Load(service.base_url, never_asked_before) as asked:
        asked.wait_for_answers(since=time.monotonic())
        [old] = processes_of(process)
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: [pid for pid in processes_of(process) if pid != old])
        asked.wait_for_answers(since=time.monotonic())
    replies = asked.since(killed)
    assert {reply.status for reply in asked.replies} <= {200, 503}, asked.replies
    for reply in replies:
        if reply.status == 503:
            assert reply.content_type == "application/problem+json"
            assert reply.retry_after is not None
    counts = Counter(reply.status for reply in replies)
    recovered = max(
        [reply.ended for reply in replies if reply.status == 503]
        + [min(reply.ended for reply in replies if reply.status == 200 and reply.began > killed)]
    )
    record_property("recovery_s", round(recovered - killed, 1))
    print(f"{process}: normal after {recovered - killed:.1f} s; {dict(counts)}")
