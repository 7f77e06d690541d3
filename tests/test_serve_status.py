"""Ids, logs, recent requests, feedback, health, metrics, bundles and the page."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serve_stand_ins import Served

from rlrag.data.feedback import FeedbackStore
from rlrag.errors import CheckpointError
from rlrag.serving.records import Routing

QUESTION = "what?"  # the ranking begins with passage 5


def test_a_request_has_an_id_of_the_service_and_keeps_that_of_its_client(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def run() -> None:
        served = Served(store=FeedbackStore(tmp_path / "feedback.db"))
        caplog.set_level(logging.INFO, "rlrag.serve")
        reply = await served.client.post(
            "/v1/answer", json={"question": QUESTION}, headers={"X-Request-Id": "job-7.3_a"}
        )
        own = reply.headers["x-request-id"]
        assert own == reply.json()["request_id"] != "job-7.3_a"
        assert reply.headers["x-client-request-id"] == "job-7.3_a"
        line = caplog.records[-1].fields  # type: ignore[attr-defined]
        assert (line["request_id"], line["client_request_id"]) == (own, "job-7.3_a")
        assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/answer", 200)
        assert line["version"] == "v1"
        assert line["timings_ms"]["total"] > 0
        assert QUESTION not in caplog.text + str(line)
        again = await served.client.post(
            "/v1/answer", json={"question": "else?"}, headers={"X-Request-Id": "job-7.3_a"}
        )
        for asked in (own, again.json()["request_id"]):
            said = {"request_id": asked, "thumbs": "up"}
            assert (await served.client.post("/v1/feedback", json=said)).status_code == 202
        said = {"request_id": "job-7.3_a", "thumbs": "down"}
        assert (await served.client.post("/v1/feedback", json=said)).status_code == 404
        for insane in ("x" * 65, "a b", "a/b", ""):
            reply = await served.client.get("/healthz", headers={"X-Request-Id": insane})
            assert "x-client-request-id" not in reply.headers
            assert len(reply.headers["x-request-id"]) == 32

    asyncio.run(run())


def test_recent_requests_hold_questions_only_where_feedback_is_on(tmp_path: Path) -> None:
    async def run() -> None:
        store = FeedbackStore(tmp_path / "feedback.db")
        for served, question in ((Served(), None), (Served(store=store), QUESTION)):
            await served.ask(QUESTION)
            await served.client.post("/v1/answer", json={})
            await served.client.get("/healthz")
            newest = (await served.client.get("/v1/recent")).json()["requests"]
            assert [(one["route"], one["status"]) for one in newest] == [
                ("/v1/answer", 422),
                ("/v1/answer", 200),
            ]
            assert newest[1].get("question") == question
            assert newest[1]["version"] == "v1"
            assert set(newest[1]["timings_ms"]) == {
                "wait", "retrieve", "select", "generate", "total",
            }  # fmt: skip

    asyncio.run(run())


def test_recent_requests_are_shown_to_the_key_that_they_came_with(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")

    async def run() -> None:
        served = Served(store=FeedbackStore(tmp_path / "feedback.db"), access__keys_file=str(keys))
        for key in ("one", "two"):
            asked = {"question": f"asked by {key}? " + "x" * 50_000}
            await served.client.post("/v1/answer", json=asked, headers={"X-API-Key": key})
        for key in ("one", "two"):
            reply = await served.client.get("/v1/recent", headers={"X-API-Key": key})
            [shown] = reply.json()["requests"]
            assert shown["question"].startswith(f"asked by {key}?")
            assert len(shown["question"]) == 501

    asyncio.run(run())


def test_a_service_logs_requests_and_what_operators_do_as_lines_of_json(tmp_path: Path) -> None:
    """In a process that sets no level, as a replica does not."""
    program = """
import asyncio, sys
from pathlib import Path
from serve_stand_ins import Served
from rlrag.data.feedback import FeedbackStore
from rlrag.json_logs import log_to_stderr

async def run():
    log_to_stderr("serve", "ingress-a1")
    sys.stderr = sys.stdout  # as Ray Serve takes it over
    served = Served(store=FeedbackStore(Path("f.db")), access__admin_keys_file="keys")
    await served.ask("a secret?")
    operator = {"headers": {"X-API-Key": "k"}}
    await served.client.post("/admin/bundle", json={"path": "/b/new", "role": "canary"}, **operator)
    await served.client.delete("/admin/bundle/canary", **operator)
    await served.client.post("/admin/bundle", json={"path": "bad", "role": "active"}, **operator)

asyncio.run(run())
"""
    (tmp_path / "keys").write_text("k")
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stderr.splitlines()]
    asked = next(line for line in lines if line.get("route") == "/v1/answer")
    assert (asked["status"], asked["version"], asked["level"]) == (200, "v1", "INFO")
    assert (asked["run"], asked["actor"]) == ("serve", "ingress-a1")
    assert "secret" not in ran.stderr
    audit = [line["message"] for line in lines if line["logger"] == "rlrag.serve.admin"]
    assert [message.partition(": ")[2][:40] for message in audit] == [
        "loading /b/new as canary gave version 6e",
        "ended the canary",
        "loading bad as active failed: the bundle",
    ]
    assert {line["key"] for line in lines if line["logger"] == "rlrag.serve.admin"} == {"8254c329"}


def test_only_the_newest_two_hundred_requests_are_kept() -> None:
    async def run() -> None:
        served = Served()
        for _ in range(205):
            await served.client.post("/v1/answer", json={})
        newest = (await served.client.get("/v1/recent")).json()["requests"]
        assert len(newest) == 200

    asyncio.run(run())


def test_feedback_reaches_the_store(tmp_path: Path) -> None:
    async def run() -> None:
        served = Served(store=FeedbackStore(tmp_path / "feedback.db"))
        asked = (await served.ask()).json()["request_id"]
        for given in ({"thumbs": "up"}, {"reward": 0.25}, {"golden_answers": ["25"]}):
            reply = await served.client.post("/v1/feedback", json={"request_id": asked, **given})
            assert reply.status_code == 202
            assert reply.json() == {"request_id": asked}
        reply = await served.client.post(
            "/v1/feedback", json={"request_id": "nobody", "thumbs": "up"}
        )
        assert reply.status_code == 404
        assert reply.json()["type"] == "urn:rlrag:unknown-name"
        assert reply.json()["error"]["param"] == "request_id"
        reply = await served.client.post("/v1/feedback", json={"request_id": asked})
        assert reply.status_code == 422
        assert "exactly one" in reply.json()["detail"]
        text = (await served.client.get("/metrics")).text
        assert 'rlrag_feedback_total{kind="thumbs"} 1.0' in text

    asyncio.run(run())


def test_feedback_that_is_off_says_so() -> None:
    async def run() -> None:
        reply = await Served().client.post(
            "/v1/feedback", json={"request_id": "r1", "thumbs": "up"}
        )
        assert reply.status_code == 404
        assert reply.json()["type"] == "urn:rlrag:feedback-off"

    asyncio.run(run())


def test_a_service_is_ready_when_a_version_is_known() -> None:
    async def run() -> None:
        served = Served()
        served.desk.now = None
        assert (await served.client.get("/healthz")).status_code == 200
        assert (await served.client.get("/readyz")).status_code == 503
        assert (await served.ask()).status_code == 503
        assert "rlrag_version{" not in (await served.client.get("/metrics")).text
        served.desk.now = Routing("v1")
        assert (await served.client.get("/readyz")).json() == {"status": "ok"}
        served.desk.gone = ("selector", "generator")
        refused = await served.client.get("/readyz")
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith(
            "no selector and no generator has loaded version"
        )

    asyncio.run(run())


def test_metrics_count_what_happened() -> None:
    async def run() -> None:
        served = Served(Routing("v1", shadow="v2"))
        served.pipeline.num_cut_tokens = 7
        for _ in range(2):
            await served.ask(QUESTION)
        await served.ask("")
        await served.settled()
        text = (await served.client.get("/metrics")).text
        for line in (
            'rlrag_requests_total{route="/v1/answer",status="200"} 2.0',
            'rlrag_requests_total{route="/v1/answer",status="422"} 1.0',
            'rlrag_cache_lookups_total{cache="answers",result="hit"} 2.0',
            'rlrag_cache_lookups_total{cache="answers",result="miss"} 2.0',
            'rlrag_answers_total{version="v1"} 2.0',
            'rlrag_tokens_total{kind="answer"} 8.0',
            'rlrag_tokens_total{kind="prompt"} 50.0',
            "rlrag_cut_tokens_total 14.0",
            'rlrag_passages_total{prompt="shown"} 2.0',
            'rlrag_passages_total{prompt="dropped"} 2.0',
            'rlrag_stage_seconds_count{stage="generate"} 2.0',
            'rlrag_stage_seconds_count{stage="total"} 2.0',
            'rlrag_shadow_total{result="different"} 2.0',
            'rlrag_version{role="active",version="v1"} 1.0',
            'rlrag_version{role="shadow",version="v2"} 1.0',
            "rlrag_in_flight 0.0",
            "rlrag_waiting 0.0",
        ):
            assert line in text.splitlines()

    asyncio.run(run())


def test_operators_load_compare_and_drop_bundles(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")

    async def run() -> None:
        served = Served(access__admin_keys_file=str(keys))
        served.client.headers["X-API-Key"] = "k"
        client = served.client
        asked = {"path": "/bundles/b", "role": "shadow"}
        loaded = (await client.post("/admin/bundle", json=asked)).json()
        assert loaded == {"version": "62", "role": "shadow", "already_loaded": False}
        again = (await client.post("/admin/bundle", json=asked)).json()
        assert again == loaded | {"already_loaded": True}
        served.desk.changed = "/data/corpus.jsonl"
        again = (await client.post("/admin/bundle", json=asked)).json()
        assert "/data/corpus.jsonl has changed on disk since it was read" in again["note"]
        asked = {"path": "/bundles/c", "role": "canary", "share": 0.5}
        await client.post("/admin/bundle", json=asked)
        known = (await client.get("/admin/versions")).json()
        assert known["paths"] == {v: f"/bundles/{v}" for v in ("62", "63", "v1")}
        assert (await client.get("/v1/versions")).json() == {
            "active": "v1", "canary": "63", "canary_share": 0.5, "shadow": "62", "epoch": 4,
        }  # fmt: skip
        reply = await client.post("/admin/bundle", json={"path": "bad", "role": "active"})
        assert reply.status_code == 422
        assert "refused: bad: index.bin does not have its recorded hash" in reply.json()["detail"]
        assert (await client.get("/v1/versions")).json()["active"] == "v1"
        dropped = (await client.delete("/admin/bundle/canary")).json()
        assert (dropped["canary"], dropped["shadow"]) == (None, "62")
        assert (await client.delete("/admin/bundle/active")).status_code == 422
        await served.ask(QUESTION)
        await served.settled()
        report = (await client.get("/admin/compare")).json()
        assert (report["num_compared"], report["equal_selections"]) == (1, 1.0)
        assert report["differences"][0]["shadow_answer"].startswith("62 says")

    asyncio.run(run())


def test_an_operator_is_told_why_a_role_was_not_ended(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")

    async def full(role: str) -> None:
        raise CheckpointError("serving.json cannot be written")

    async def run() -> None:
        served = Served(access__admin_keys_file=str(keys))
        served.desk.drop = full
        reply = await served.client.delete("/admin/bundle/canary", headers={"X-API-Key": "k"})
        assert reply.status_code == 422
        assert "canary was not ended: serving.json cannot" in reply.json()["detail"]

    asyncio.run(run())


def test_loading_goes_on_when_the_client_leaves(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")

    async def run() -> None:
        served = Served(access__admin_keys_file=str(keys))
        gate, load = asyncio.Event(), served.desk.load

        async def slow_load(path: str, role: str, share: float) -> str:
            await gate.wait()
            return await load(path, role, share)

        served.desk.load = slow_load  # type: ignore[method-assign]
        asked = asyncio.ensure_future(
            served.client.post(
                "/admin/bundle", json={"path": "/b", "role": "active"}, headers={"X-API-Key": "k"}
            )
        )
        for _ in range(20):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait((asked,))
        gate.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert served.desk.routing().active == "62"

    asyncio.run(run())


def test_the_page_is_served_without_a_key_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")

    async def run() -> None:
        served = Served(access__keys_file=str(keys))
        reply = await served.client.get("/")
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/html")
        assert "default-src 'none'; script-src 'self'" in reply.headers["content-security-policy"]
        reply = await served.client.get("/page/page.js")
        assert reply.status_code == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert (await served.client.get("/docs")).status_code == 401

    asyncio.run(run())


def test_the_application_writes_what_waits_when_it_ends(tmp_path: Path) -> None:
    async def run() -> None:
        served = Served(store=FeedbackStore(tmp_path / "feedback.db"))
        async with served.app.router.lifespan_context(served.app):
            asked = (await served.ask()).json()["request_id"]
        assert FeedbackStore(tmp_path / "feedback.db").record_feedback(asked, thumbs="up")

    asyncio.run(run())
