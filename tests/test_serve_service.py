"""The whole service on a local Ray cluster: what it answers is what evaluation finds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_bundles import bundle_config, make_bundle

from rlrag.bundle import load_bundle
from rlrag.bundle_files import read_bundle
from rlrag.evaluation.systems import greedy_picks
from rlrag.generation.build import open_generator
from rlrag.pipeline import open_evaluation_data, open_library, open_reward
from rlrag.rewards.answering import AnsweringReward

pytestmark = pytest.mark.slow

ADMIN_KEY = "a-key-of-the-operator"
PATIENCE = {
    # Ray Serve kills an HTTP proxy that takes longer, as on a busy machine it may.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


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

    from serve.app import build

    folder = tmp_path_factory.mktemp("state")
    keys = folder / "admin-keys"
    keys.write_text(ADMIN_KEY + "\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8
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
        picks = greedy_picks(load_bundle(bundle).policy, table)
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
        headers={"Authorization": f"Bearer {ADMIN_KEY}"},
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
    answered: list[dict] = []
    failed: list[str] = []
    stop = threading.Event()

    def ask(client_number: int) -> None:
        with httpx.Client(base_url=service.base_url, timeout=60) as client:
            for turn in range(100_000):
                if stop.is_set():
                    return
                question = questions[(turn + client_number) % len(questions)]
                response = client.post("/v1/answer", json={"question": question, "temperature": 0})
                if response.status_code == 200:
                    answered.append({"question": question, **response.json()})
                else:
                    failed.append(response.text)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for client in clients:
        client.start()
    try:
        for change in range(20):
            bundle = bundles[(change + 1) % 2]
            response = load(service, bundle, role="active")
            assert response.status_code == 200, response.text
            assert service.get("/v1/versions").json()["active"] == read_bundle(bundle).version
    finally:
        stop.set()
        for client in clients:
            client.join(60)
    assert not failed
    assert {one["bundle_version"] for one in answered} == set(expected)
    for one in answered:
        check_equal(one, expected[one["bundle_version"]][one["question"]])
