"""The page of the service and a small stand-in for its API in; an application to test it with out.

The answers are fixed. What the stand-in shall do otherwise is set on `StandIn` by the test.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

PAGE = Path(__file__).resolve().parents[1] / "rlrag" / "serving" / "page"
ACTIVE, SHADOW = "5d0c1f7be2a9", "a84e90b2f6d3"
REQUEST_ID = "7f3d9a52c4e81b067f3d9a52c4e81b06"
HOSTILE = '<img src="/x" onerror="document.title=\'taken\'"><script>document.title="taken"</script>'
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
POLICY += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
METRICS = """\
# HELP rlrag_requests_total Requests answered.
# TYPE rlrag_requests_total counter
rlrag_requests_total{route="/v1/answer",status="200"} 1840
rlrag_requests_total{route="/v1/retrieve",status="200"} 210
rlrag_requests_total{route="/v1/answer",status="422"} 31
rlrag_requests_total{route="/v1/recent",status="200"} 4711
rlrag_requests_total{route="unmatched",status="200"} 12
rlrag_requests_total{route="/v1/answer",status="503"} 12
rlrag_stage_seconds_bucket{stage="retrieve",le="0.01"} 1500
rlrag_stage_seconds_bucket{stage="retrieve",le="0.05"} 2040
rlrag_stage_seconds_bucket{stage="retrieve",le="+Inf"} 2050
rlrag_stage_seconds_bucket{stage="select",le="0.005"} 1790
rlrag_stage_seconds_bucket{stage="select",le="0.01"} 1840
rlrag_stage_seconds_bucket{stage="select",le="+Inf"} 1840
rlrag_stage_seconds_bucket{stage="generate",le="0.25"} 1100
rlrag_stage_seconds_bucket{stage="generate",le="1"} 1838
rlrag_stage_seconds_bucket{stage="generate",le="+Inf"} 1840
rlrag_stage_seconds_bucket{stage="total",le="0.25"} 920
rlrag_stage_seconds_bucket{stage="total",le="1"} 1840
rlrag_stage_seconds_bucket{stage="total",le="+Inf"} 1840
rlrag_cache_lookups_total{cache="candidates",result="hit"} 620
rlrag_cache_lookups_total{cache="candidates",result="miss"} 1430
rlrag_cache_lookups_total{cache="answers",result="hit"} 95
rlrag_cache_lookups_total{cache="answers",result="miss"} 1745
rlrag_tokens_total{kind="prompt"} 742113
rlrag_tokens_total{kind="answer"} 20344
rlrag_in_flight 3
rlrag_waiting 0
"""

_LONG = (
    "The Rhine rises in the Swiss Alps, where two headwaters meet near Reichenau, and flows north "
    "through six countries. Steamers reached Basel in 1832. For most of the nineteenth century the "
    "river was straightened, so that ships could pass and the plain no longer flooded every "
    "spring. Its mouth lies near Rotterdam in the Netherlands, beside the largest port of Europe, "
    "from where goods are carried upstream as far as Basel. The river gives its name to several "
    "regions along its course, and its banks hold more castles than those of any other river."
)


def passage(id: str, title: str, text: str, score: float, prob: float) -> dict[str, Any]:
    return {
        "id": id,
        "title": title,
        "text": text,
        "retriever_score": score,
        "selection_prob": prob,
    }


PASSAGES = [
    passage("rhine-0", "Rhine", _LONG, 14.2183, 0.6241),
    passage(
        "netherlands-3",
        "Netherlands",
        "The country lies on the deltas of the Rhine, the Meuse and the Scheldt. ROTTERDAM handles "
        "more cargo than any other port of Europe; Amsterdam is the capital.",
        11.907,
        0.2718,
    ),
    passage("markup-1", "Marks & <b>tags</b>", f"{HOSTILE} Rotterdamse is no city.", 9.5, 0.0004),
]
OTHERS = [
    PASSAGES[1] | {"selection_prob": 0.51},
    PASSAGES[0] | {"selection_prob": 0.33},
    passage("basel-2", "Basel", "Basel lies where the Rhine turns north.", 8.25, 0.12),
]
ANSWERS = {ACTIVE: ("Rotterdam.", PASSAGES), SHADOW: ("Near Rotterdam", OTHERS)}
PATH = [
    {
        "action": "start",
        "query": "Which port lies at the mouth of the Rhine?",
        "found": [
            {"id": "rhine-0", "title": "Rhine", "by": "query"},
            {"id": "basel-2", "title": "Basel", "by": "title"},
        ],
        "num_left_out": 0,
    },
    {
        "action": "pick",
        "passage_id": "rhine-0",
        "title": "Rhine",
        "found": [
            {
                "id": "netherlands-3",
                "title": "Netherlands",
                "by": "hop",
                "source": "rhine-0",
                "edge": "title_out",
            },
        ],
        "num_left_out": 2,
    },
    {
        "action": "search",
        "passage_id": "rhine-0",
        "title": "Rhine",
        "query": f"mouth of {HOSTILE}",
        "writer": "title",
        "found": [{"id": "markup-1", "title": "Marks & <b>tags</b>", "by": "query"}],
        "num_left_out": 0,
    },
    {"action": "stop", "found": [], "num_left_out": 0},
]
TIMINGS = {
    ACTIVE: {"wait": 0.0, "retrieve": 8.4, "select": 3.1, "generate": 231.0, "total": 244.0},
    SHADOW: {"wait": 12.0, "retrieve": 9.0, "select": 3.3, "generate": 118.0, "total": 143.0},
}


@dataclass
class StandIn:
    """What the service does, and what it was asked."""

    problem: dict[str, Any] | None = None
    """Sent in place of an answer, with its `status`."""
    breaks_off: bool = False
    """The stream ends after the first words."""
    hangs: bool = False
    """The stream stops after the first words, for longer than any test lasts."""
    path: list[dict[str, Any]] | None = None
    """Of the selector, whose second passage then has no score; None where it looks no further."""
    feedback: bool = True
    versions: tuple[str, ...] = (ACTIVE, SHADOW)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    thumbs: list[dict[str, Any]] = field(default_factory=list)
    polls: int = 0
    left: int = 0
    """Streams whose client left."""


def problem(status: int, title: str, detail: str, **more: Any) -> dict[str, Any]:
    content = {"type": "urn:rlrag:a-kind", "title": title, "status": status, "detail": detail}
    return content | more


def problem_response(content: dict[str, Any]) -> JSONResponse:
    headers = {"Retry-After": "2"} if content["status"] == 503 else {}
    return JSONResponse(
        content, content["status"], headers=headers, media_type="application/problem+json"
    )


def whole_answer(body: dict[str, Any]) -> dict[str, Any]:
    version = body.get("version", ACTIVE)
    answer, passages = ANSWERS[version]
    whole = {
        "request_id": REQUEST_ID,
        "num_answer_tokens": 4,
        "num_prompt_tokens": 312,
        "num_passages": 2 if version == SHADOW else 3,
        "num_cut_tokens": 1234 if version == SHADOW else 0,
        "answer": answer,
        "answer_logp": -0.8412,
        "passages": passages[: body.get("num_selected")],
        "bundle_version": version,
        "timings_ms": TIMINGS[version],
        "cached": False,
    }
    if body.get("explain"):
        whole["candidates"] = [*PASSAGES, OTHERS[2]]
    return whole


def event(name: str, data: object) -> str:
    return f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n"


async def stream_answer(stand_in: StandIn, body: dict[str, Any]) -> AsyncIterator[str]:
    whole = whole_answer(body)
    if stand_in.path is not None:
        whole["path"] = stand_in.path
        first, second, *rest = whole["passages"]
        whole["passages"] = [first, second | {"retriever_score": None}, *rest]
    yield ": a comment\r\n\r\n"
    head = {"request_id": REQUEST_ID, "bundle_version": whole["bundle_version"]}
    yield event("passages", {**head, "passages": whole["passages"]})
    for turn in stand_in.path or ():
        yield event("turn", turn)
    for at, text in enumerate(whole["answer"].partition("o")):
        yield event("token", {"text": text})
        await asyncio.sleep(0.01)
        if at == 0 and stand_in.hangs:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                stand_in.left += 1
                raise
        if at == 0 and stand_in.breaks_off:
            return
    yield event("answer", whole)


def recent_requests() -> list[dict[str, Any]]:
    rows = []
    for at in range(24):
        wave = 40 * ((at * 7) % 11)
        status = {5: 503, 11: 422}.get(at, 200)
        timings = {"retrieve": 8 + at % 5, "select": 3.2, "generate": 110 + wave}
        timings["total"] = sum(timings.values()) + 4
        rows.append(
            {
                "request_id": f"{int(REQUEST_ID, 16) - 0x97F4A7C15F39 * at**5:032x}",
                "time": 1_790_000_000 - 3.7 * at,
                "route": "/v1/answer",
                "status": status,
                "version": None if status == 422 else (ACTIVE, SHADOW)[at % 4 == 3],
                "timings_ms": timings if status == 200 else {"total": 2.4},
                "question": "Which port lies at the mouth of the Rhine?" if at % 2 else None,
            }
        )
    return rows


def make_app(stand_in: StandIn) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def add_policy(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/")
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.post("/v1/answer")
    async def answer(request: Request) -> Any:
        body = await request.json()
        stand_in.asked.append(body)
        stand_in.keys.append(request.headers.get("Authorization"))
        if stand_in.problem is not None:
            return problem_response(stand_in.problem)
        return StreamingResponse(stream_answer(stand_in, body), media_type="text/event-stream")

    @app.get("/v1/versions")
    async def versions() -> dict[str, Any]:
        shadow = stand_in.versions[1] if len(stand_in.versions) > 1 else None
        first = stand_in.versions[0]
        return {"active": first, "canary": None, "canary_share": 0.0, "shadow": shadow, "epoch": 1}

    @app.get("/v1/recent")
    async def recent() -> Any:
        stand_in.polls += 1
        if stand_in.problem is not None:
            return problem_response(stand_in.problem)
        return {"requests": recent_requests()}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(METRICS)

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> JSONResponse:
        if not stand_in.feedback:
            kind = "urn:rlrag:feedback-off"
            return problem_response(problem(404, "Feedback is off", "None is kept.", type=kind))
        stand_in.thumbs.append(await request.json())
        return JSONResponse({}, 202)

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address, on a free port, at which a thread of this process serves the application."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        deadline = monotonic() + 30
        while not server.started:
            assert monotonic() < deadline, "the server has not started within 30 s"
            sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive(), "the server has not ended within 10 s"
