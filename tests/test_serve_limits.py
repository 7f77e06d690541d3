"""Keys; names; bounded bodies; clients that leave; a service without room."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn
from serve_stand_ins import Served
from starlette.types import Message

from rlrag.errors import ConfigError
from rlrag.serving.http.limits import Keys, read_keys

ADMIN = {"Authorization": "Bearer admin-key"}


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n alpha \nbeta\n")
    monkeypatch.setenv("SERVICE_KEYS", "gamma delta")
    keys = read_keys(str(file), "SERVICE_KEYS")
    assert keys is not None
    assert [keys.fit(key) for key in ("alpha", "beta", "gamma", "delta")] == [True] * 4
    assert not any(keys.fit(key) for key in ("", "# ours", " alpha ", "alpha beta", "gamma delta"))
    assert read_keys(None, None) is None


def test_a_key_is_revoked_and_added_while_the_service_runs(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alpha\nbeta\n")

    async def run() -> None:
        served = Served(access__keys_file=str(file))

        async def statuses() -> list[int]:
            found = []
            for key in ("alpha", "beta", "gamma"):
                reply = await served.client.get("/v1/versions", headers={"X-API-Key": key})
                found.append(reply.status_code)
            return found

        assert await statuses() == [200, 200, 401]
        file.write_text("beta\ngamma-is-new\ngamma\n")
        assert await statuses() == [401, 200, 200]
        file.unlink()
        assert await statuses() == [401, 401, 401]
        file.write_text("alpha\n")
        assert await statuses() == [200, 401, 401]

    asyncio.run(run())


def test_a_question_without_room_is_refused_before_its_body_is_read() -> None:
    async def run() -> None:
        served = Served(limits__max_in_flight=1, limits__max_waiting=0)
        served.pipeline.gate.clear()
        first = asyncio.ensure_future(served.ask())
        async with asyncio.timeout(5):
            while not served.pipeline.open_engines:
                await asyncio.sleep(0)
        pieces: list[Message] = [{"type": "http.request", "body": b"{", "more_body": True}]
        sent = await exchange(served, pieces)
        assert sent[0]["status"] == 503
        assert len(pieces) == 1
        assert (await served.client.get("/readyz")).status_code == 200
        served.pipeline.gate.set()
        assert (await first).status_code == 200
        text = (await served.client.get("/metrics")).text
        assert 'rlrag_requests_total{route="/v1/answer",status="503"} 1.0' in text
        assert "rlrag_rejected_total 1.0" in text

    asyncio.run(run())


def test_a_body_of_too_many_values_is_refused_before_they_are_objects() -> None:
    async def run() -> None:
        served = Served()
        many = b'{"question": "q", "filters": {"ids": [' + b"1," * 300_000 + b"1]}}"
        for body in (many, b"[" * 100_000, b'{"question": [' + b'"a",' * 300_000 + b"1]}"):
            sent = await exchange(served, [{"type": "http.request", "body": body}])
            assert sent[0]["status"] == 413
            assert b"more than 14160 values" in sent[1]["body"]
        texts = json.dumps({"queries": ['a, b, \\"c", [d {e' * 40] * 2560, "topk": 1}).encode()
        sent = await exchange(served, [{"type": "http.request", "body": texts}], "/retrieve")
        assert sent[0]["status"] == 200, sent[1]

    asyncio.run(run())


def test_settings_that_name_keys_but_give_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="contains no key"):
        read_keys(str(file), None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "missing"), None)
    monkeypatch.delenv("SERVICE_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"variable SERVICE_KEYS.* is not set"):
        read_keys(None, "SERVICE_KEYS")
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(file), None)


def test_equal_keys_count_once_and_odd_ones_do_not_break() -> None:
    keys = Keys(["a", "a", "ключ"])
    assert keys.fit("ключ")
    assert not keys.fit("\ud800")


def closed(tmp_path: Path, **arguments: object) -> Served:
    user, admin = tmp_path / "keys", tmp_path / "admin_keys"
    user.write_text("user-key\n")
    admin.write_text("admin-key\n")
    return Served(access__keys_file=str(user), access__admin_keys_file=str(admin), **arguments)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer guess"}, 401),
        ({"Authorization": "Basic user-key"}, 401),
        ({"Authorization": "Bearer user-key"}, 200),
        ({"Authorization": "bearer  user-key"}, 200),
        ({"X-API-Key": "user-key"}, 200),
        (ADMIN, 401),
    ],
)
def test_questions_need_a_key(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async def run() -> None:
        served = closed(tmp_path)
        reply = await served.client.post("/v1/answer", json={"question": "q"}, headers=headers)
        assert reply.status_code == status
        assert ("www-authenticate" in reply.headers) == (status == 401)
        assert bool(served.pipeline.calls) == (status == 200)

    asyncio.run(run())


def test_open_paths_need_no_key_and_unknown_ones_do(tmp_path: Path) -> None:
    async def run() -> None:
        served = closed(tmp_path)
        for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
            assert (await served.client.get(path)).status_code == 200
        for path in ("/v1/recent", "/v1/versions", "/v1/models", "/nothing", "/pages"):
            assert (await served.client.get(path)).status_code == 401
        assert (await served.client.get("/v1/recent", headers={"X-API-Key": "user-key"})).is_success

    asyncio.run(run())


def test_admin_takes_admin_keys_alone_and_is_closed_without_them(tmp_path: Path) -> None:
    async def run() -> None:
        served = closed(tmp_path)
        path = "/admin/versions"
        assert (await served.client.get(path)).status_code == 401
        reply = await served.client.get(path, headers={"Authorization": "Bearer user-key"})
        assert reply.status_code == 401
        assert (await served.client.get(path, headers=ADMIN)).status_code == 200
        reply = await Served().client.get(path, headers=ADMIN)
        assert reply.status_code == 403
        assert "without admin keys" in reply.json()["detail"]

    asyncio.run(run())


def test_keys_are_checked_below_the_place_where_the_service_is_mounted(tmp_path: Path) -> None:
    async def run() -> None:
        sent = await exchange(
            closed(tmp_path), [{"type": "http.request"}], path="/rag/admin/versions", root="/rag"
        )
        assert sent[0]["status"] == 401

    asyncio.run(run())


def test_a_name_that_is_not_the_services_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        served = Served(access__hosts=("rag.example.org",))
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("rag.example.org", 200),
            ("rebound.example:8000", 421),
            ("localhost.rebound.example", 421),
            ("", 421),
        ):
            for path in ("/healthz", "/v1/recent", "/"):
                reply = await served.client.get(path, headers={"Host": host})
                assert reply.status_code == status, (host, path)
        assert "access.hosts" in reply.json()["detail"]
        anyone = Served(access__hosts=("*",)).client
        assert (await anyone.get("/healthz", headers={"Host": "a.example"})).status_code == 200

    asyncio.run(run())


def test_other_origins_are_let_in_only_by_the_settings() -> None:
    async def run() -> None:
        asked = {
            "Origin": "https://a.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        }
        off, on = Served(), Served(access__cors_origins=("https://a.example",))
        assert (await off.client.options("/v1/answer", headers=asked)).status_code == 405
        reply = await on.client.options("/v1/answer", headers=asked)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        other = await on.client.options("/v1/answer", headers=asked | {"Origin": "https://b"})
        assert "access-control-allow-origin" not in other.headers
        plain = await off.client.get("/healthz", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in plain.headers

    asyncio.run(run())


async def exchange(
    served: Served,
    messages: list[Message],
    path: str = "/v1/answer",
    root: str = "",
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),),
    leave: asyncio.Event | None = None,
) -> list[Message]:
    """What the application sends; the client stays until `leave`, and `messages` loses those read.

    Each of `messages` is read as the server would hand it on.
    """
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": root,
        "query_string": b"",
        "headers": list(headers),
    }
    await served.app(scope, receive, send)
    return sent


def test_a_body_is_read_only_up_to_its_bound() -> None:
    async def run() -> None:
        served = Served(limits__max_body_bytes=1024)
        pieces: list[Message] = [
            {"type": "http.request", "body": b"x" * 600, "more_body": True} for _ in range(9)
        ]
        sent = await exchange(served, pieces)
        assert sent[0]["status"] == 413
        assert len(pieces) == 7
        announced = ((b"content-type", b"application/json"), (b"content-length", b"1025"))
        sent = await exchange(served, pieces, headers=announced)
        assert sent[0]["status"] == 413
        assert len(pieces) == 7

    asyncio.run(run())


def test_a_body_that_never_arrives_is_given_up() -> None:
    async def run() -> None:
        sent = await exchange(Served(limits__timeout_s=0.05), [])
        assert sent[0]["status"] == 408

    asyncio.run(run())


def test_a_client_that_leaves_before_its_body_is_complete_gets_nothing() -> None:
    async def run() -> None:
        served, leave = Served(), asyncio.Event()
        leave.set()
        part: Message = {"type": "http.request", "body": b"{", "more_body": True}
        assert await exchange(served, [part], leave=leave) == []
        assert not served.pipeline.calls

    asyncio.run(run())


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_leaves_frees_its_slot(stream: str) -> None:
    async def run() -> None:
        served, leave = Served(limits__max_in_flight=1), asyncio.Event()
        served.pipeline.gate.clear()
        body = f'{{"question": "who?", "stream": {stream}}}'.encode()
        work = asyncio.ensure_future(
            exchange(served, [{"type": "http.request", "body": body}], leave=leave)
        )
        async with asyncio.timeout(5):
            while not served.pipeline.open_engines:
                await asyncio.sleep(0)
        assert served.desk.in_flight["v1"] == 1
        leave.set()
        await asyncio.wait_for(work, 5)
        assert served.pipeline.open_engines == 0
        assert served.desk.in_flight["v1"] == 0
        served.pipeline.gate.set()
        assert (await served.ask("next?")).status_code == 200
        # A stream had begun with status 200 when its client left.
        status = "200" if stream == "true" else "499"
        recent = (await served.client.get("/v1/recent")).json()["requests"]
        assert str(recent[-1]["status"]) == status

    asyncio.run(run())


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_closed_connection_frees_its_slot_on_a_real_server(stream: str) -> None:
    async def run() -> None:
        served = Served()
        served.pipeline.gate.clear()
        server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None))
        serving = asyncio.ensure_future(server.serve())
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.01)
            [socket] = server.servers[0].sockets
            _, writer = await asyncio.open_connection(*socket.getsockname())
            body = f'{{"question": "who?", "stream": {stream}}}'
            writer.write(
                f"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            while not served.pipeline.open_engines:
                await asyncio.sleep(0.01)
            writer.close()
            await served.settled()
            server.should_exit = True
            await serving

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_cancels_the_task_frees_the_slot_too(stream: bool) -> None:
    async def run() -> None:
        served = Served()
        served.pipeline.gate.clear()
        work = asyncio.ensure_future(served.ask(stream=stream))
        async with asyncio.timeout(5):
            while not served.pipeline.open_engines:
                await asyncio.sleep(0)
        work.cancel()
        await asyncio.wait((work,), timeout=5)
        assert work.cancelled()
        await served.settled()

    asyncio.run(run())


def test_a_full_service_refuses_and_recovers() -> None:
    async def run() -> None:
        served = Served(
            limits__max_in_flight=2, limits__max_waiting=3, limits__retry_after_s=7,
            caches__answers=0, caches__candidates=0,
        )  # fmt: skip
        served.pipeline.gate.clear()
        asked = [asyncio.ensure_future(served.ask(f"number {n}?")) for n in range(20)]
        async with asyncio.timeout(5):
            while sum(one.done() for one in asked) < 15:
                await asyncio.sleep(0.001)
        text = (await served.client.get("/metrics")).text
        assert "rlrag_in_flight 2.0" in text
        assert "rlrag_waiting 3.0" in text
        assert "rlrag_rejected_total 15.0" in text
        served.pipeline.gate.set()
        replies = await asyncio.gather(*asked)
        assert sorted(reply.status_code for reply in replies) == [200] * 5 + [503] * 15
        refused = next(reply for reply in replies if reply.status_code == 503)
        assert refused.headers["retry-after"] == "7"
        assert refused.headers["content-type"] == "application/problem+json"
        assert served.pipeline.most_engines == 2
        assert (await served.ask()).status_code == 200

    asyncio.run(run())


def test_large_uploads_in_pieces_are_put_together() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"ques', b'tion": "wh', b'y?"}'):
            yield piece

    async def run() -> None:
        served = Served()
        reply = await served.client.post(
            "/v1/answer", content=pieces(), headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 200

    asyncio.run(run())
