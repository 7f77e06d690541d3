"""What Ray Serve's proxy says by itself reaches clients as problem documents, all else as it is."""

from __future__ import annotations

import asyncio
import importlib

import httpx
import pytest
import uvicorn
from serve_stand_ins import Served
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from rlrag.serving.http import connections
from rlrag.serving.http.proxy import PROXY_VARIABLES, ProxyProblems, layers


async def says_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The proxy when the replica that works on a request dies."""


class Repeats:
    """A proxy that adds the request id of the service once more, as Ray Serve's does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_again(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"X-Request-ID", b"from-the-proxy"))
            await send(message)

        await self._app(scope, receive, send_again)


def ask(app: ASGIApp, path: str = "/v1/answer", **body: object) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(ProxyProblems(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body, headers={"X-Request-Id": "mine"})

    return asyncio.run(run())


def check_problem(reply: httpx.Response, detail: str) -> None:
    assert reply.status_code == 503
    assert reply.headers["content-type"] == "application/problem+json"
    assert int(reply.headers["retry-after"]) > 0
    [request_id] = reply.headers.get_list("x-request-id")
    assert reply.headers.get_list("x-client-request-id") == ["mine"]
    problem = reply.json()
    assert (problem["status"], problem["request_id"]) == (503, request_id)
    assert detail in problem["detail"]


def test_the_death_of_a_replica_becomes_a_503() -> None:
    check_problem(ask(says_nothing), "has ended; send the request again")


def test_clients_of_openai_find_the_reason_where_they_look() -> None:
    reply = ask(says_nothing, "/v1/chat/completions")
    check_problem(reply, "has ended")
    assert reply.json()["error"]["message"] == reply.json()["detail"]


@pytest.mark.parametrize(
    ("status", "detail"), [(408, "in time"), (429, "too many requests"), (503, "too many requests")]
)
def test_a_refusal_of_the_proxy_becomes_a_503(status: int, detail: str) -> None:
    check_problem(ask(PlainTextResponse("BackPressureError at ...", status)), detail)


def test_what_the_service_says_stays() -> None:
    reply = ask(Repeats(Served().app), question="who?")
    assert reply.status_code == 200
    assert reply.json()["answer"] == "v1 says 16. 25."
    assert len(reply.headers.get_list("x-request-id")) == 1
    assert reply.headers.get_list("x-client-request-id") == ["mine"]
    refused = Served(limits__retry_after_s=7)
    refused.desk.now = None
    reply = ask(Repeats(refused.app), question="who?")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "7")
    assert "no version is known yet" in reply.json()["detail"]
    stream = ask(Served().app, question="who?", stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text.count("event: ") == 5
    assert ask(PlainTextResponse("none", 404)).text == "none"


def test_a_response_that_has_begun_is_not_begun_again() -> None:
    async def stops_in_the_middle(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def run() -> list[str]:
        sent = []

        async def send(message) -> None:
            sent.append(message["type"])

        scope = {"type": "http", "path": "/v1/answer", "headers": []}
        await ProxyProblems(stops_in_the_middle)(scope, None, send)
        return sent

    assert asyncio.run(run()) == ["http.response.start", "http.response.body"]


def test_what_the_proxy_is_asked_itself_stays() -> None:
    assert ask(PlainTextResponse("unhealthy", 503), "/-/healthz").text == "unhealthy"
    assert ask(Response(status_code=503)).status_code == 503


def test_half_a_head_holds_no_connection(monkeypatch) -> None:
    """Neither as the first of a connection nor after a request; a slow answer is waited for."""
    monkeypatch.setattr(connections, "_HEAD_WITHIN_S", 0.2)
    monkeypatch.setattr(connections, "_MAX_CONNECTIONS", 3)
    head = b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + b'Content-Length: 19\r\n\r\n{"question": "who"}'

    async def run() -> None:
        layers()
        served = Served()
        served.pipeline.gate.clear()
        server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None))
        serving = asyncio.ensure_future(server.serve())
        async with asyncio.timeout(30):
            while not server.started:
                await asyncio.sleep(0.01)
            [socket] = server.servers[0].sockets
            place = socket.getsockname()
            for sent in (b"", head[:40], whole + head[:40]):
                reader, writer = await asyncio.open_connection(*place)
                writer.write(sent)
                if sent.startswith(whole):
                    while not served.pipeline.open_engines:
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(0.5)  # longer than a head may take
                    served.pipeline.gate.set()
                reply = await reader.read()  # until the connection is closed
                assert (b"v1 says" in reply) == sent.startswith(whole)
                writer.close()
            monkeypatch.setattr(connections, "_HEAD_WITHIN_S", 30)
            held = [await asyncio.open_connection(*place) for _ in range(4)]
            assert await held[0][0].read() == b""  # the one that waited longest made room
            held[3][1].write(whole)
            assert b"v1 says" in await held[3][0].readuntil(b'"cached"')
            for _, writer in held:
                writer.close()
            server.should_exit = True
            await serving

    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    asyncio.run(run())


def test_the_variables_name_the_layer() -> None:
    module, _, name = PROXY_VARIABLES["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert getattr(importlib.import_module(module), name) is layers
    [layer] = layers()
    assert isinstance(layer, Middleware)  # as Ray Serve demands
    assert layer.cls is ProxyProblems
