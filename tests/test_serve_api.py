"""Answers, candidates and problems over HTTP, on a pipeline without models."""

from __future__ import annotations

import asyncio
import json
import pickle
from typing import Any

import pytest
from serve_stand_ins import Served

from rlrag.errors import GenerationError, OverloadedError, RequestError
from rlrag.serving.http import answer_routes
from rlrag.serving.records import Routing

QUESTION = "what?"  # the ranking begins with passage 5
PROBLEM = "application/problem+json"


def events_of(text: str) -> list[tuple[str, Any]]:
    """Server-sent events as (name, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        data = lines["data"]
        found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def test_an_answer_has_all_that_it_stands_on() -> None:
    async def run() -> None:
        served = Served()
        reply = await served.ask(QUESTION, num_selected=2)
        assert reply.status_code == 200
        body = reply.json()
        assert body["answer"] == "v1 says 25. 36."
        assert body["passages"][0] == {
            "id": "p5",
            "title": "Title 5",
            "text": "The value of number 5 is 25.",
            "retriever_score": 1.0,
            "selection_prob": 0.5,
        }
        assert [p["id"] for p in body["passages"]] == ["p5", "p6"]
        assert body["answer_logp"] == -2.0
        assert (body["num_answer_tokens"], body["num_prompt_tokens"]) == (4, 25)
        assert (body["num_passages"], body["num_cut_tokens"]) == (2, 0)
        assert body["bundle_version"] == "v1"
        assert body["cached"] is False
        assert set(body["timings_ms"]) == {"wait", "retrieve", "select", "generate", "total"}
        assert body["request_id"] == reply.headers["x-request-id"]
        assert "candidates" not in body

    asyncio.run(run())


def test_an_answer_says_what_its_prompt_left_out() -> None:
    async def run() -> None:
        served = Served()
        served.pipeline.num_cut_tokens = 7
        expected = {"num_passages": 2, "num_cut_tokens": 7}
        for _ in range(2):  # the second is answered by the cache
            body = (await served.ask(QUESTION, num_selected=3)).json()
            assert len(body["passages"]) == 3
            assert expected.items() <= body.items()
        fields = {"questions": [QUESTION], "num_selected": 3}
        batch = (await served.client.post("/v1/answers", json=fields)).json()
        assert expected.items() <= batch["answers"][0]["answer"].items()
        streamed = await served.ask(QUESTION, num_selected=3, stream=True)
        assert expected.items() <= dict(events_of(streamed.text))["answer"].items()

    asyncio.run(run())


def test_explaining_adds_all_candidates() -> None:
    async def run() -> None:
        body = (await Served().ask(QUESTION, explain=True, num_candidates=3)).json()
        found = [(p["id"], p["retriever_score"]) for p in body["candidates"]]
        assert found == [("p5", 1.0), ("p6", 0.5), ("p7", 0.0)]

    asyncio.run(run())


def test_filters_and_versions_reach_the_pipeline() -> None:
    async def run() -> None:
        served = Served(Routing("v1", shadow="v2"))
        filters = {"exclude_ids": ["p5"], "title_contains": "TITLE"}
        body = (await served.ask(QUESTION, filters=filters, version="v2")).json()
        assert body["answer"].startswith("v2 says")
        assert "p5" not in [p["id"] for p in body["passages"]]
        reply = await served.ask(QUESTION, version="v9")
        assert reply.status_code == 422
        assert "'v9' is not in use" in reply.json()["detail"]

    asyncio.run(run())


def test_streamed_events_add_up_to_the_answer() -> None:
    async def run() -> None:
        reply = await Served().ask(QUESTION, stream=True, explain=True)
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = events_of(reply.text)
        assert [name for name, _ in events] == ["passages", *["token"] * 3, "answer"]
        whole = events[-1][1]
        assert "".join(data["text"] for name, data in events if name == "token") == whole["answer"]
        assert events[0][1]["passages"] == whole["passages"]
        assert events[0][1]["request_id"] == whole["request_id"] == reply.headers["x-request-id"]
        assert events[0][1]["bundle_version"] == "v1"
        assert len(whole["candidates"]) == 5

    asyncio.run(run())


def test_a_stream_fails_with_a_status_before_it_begins_and_with_an_event_after() -> None:
    async def run() -> None:
        served = Served()
        reply = await served.ask(QUESTION, stream=True, num_selected=6)
        assert reply.status_code == 422
        assert reply.headers["content-type"] == PROBLEM
        served.pipeline.failure = OverloadedError("the generator is restarting")
        reply = await served.ask(QUESTION, stream=True)
        assert reply.status_code == 200
        name, problem = events_of(reply.text)[-1]
        assert name == "error"
        assert (problem["status"], problem["type"]) == (503, "urn:rlrag:overloaded")
        assert problem["request_id"] == reply.headers["x-request-id"]

    asyncio.run(run())


def test_several_questions_get_answers_or_problems_in_their_order() -> None:
    async def run() -> None:
        served = Served(limits__max_questions=3)
        asked = {"questions": [QUESTION, "?", "x" * 400], "num_selected": 1}
        reply = await served.client.post("/v1/answers", json=asked)
        assert reply.status_code == 200
        body = reply.json()
        first, second, third = body["answers"]
        assert first["answer"]["answer"] == "v1 says 25."
        assert first["answer"]["request_id"] == f"{body['request_id']}.0"
        assert second["problem"]["type"] == "urn:rlrag:unanswerable"
        assert third["problem"]["type"] == "urn:rlrag:prompt-too-long"
        reply = await served.client.post("/v1/answers", json={"questions": ["q"] * 4})
        assert reply.status_code == 422
        assert "4 entries, more than the 3" in reply.json()["detail"]

    asyncio.run(run())


def test_a_batch_is_refused_as_a_whole_where_there_is_no_room() -> None:
    async def run() -> None:
        served = Served(limits__max_in_flight=1, limits__max_waiting=0)
        served.pipeline.gate.clear()
        first = asyncio.ensure_future(served.ask())
        async with asyncio.timeout(5):
            while not served.pipeline.open_engines:
                await asyncio.sleep(0)
        reply = await served.client.post("/v1/answers", json={"questions": ["a", "b"]})
        assert reply.status_code == 503
        served.pipeline.gate.set()
        assert (await first).status_code == 200
        reply = await served.client.post("/v1/answers", json={"questions": ["a", "b"]})
        assert [list(one) for one in reply.json()["answers"]] == [["answer"], ["answer"]]

    asyncio.run(run())


def test_candidates_are_found_without_an_answer() -> None:
    async def run() -> None:
        served = Served()
        asked = {"question": QUESTION, "num_candidates": 2}
        body = (await served.client.post("/v1/retrieve", json=asked)).json()
        assert [(p["id"], p["retriever_score"]) for p in body["passages"]] == [
            ("p5", 1.0),
            ("p6", 0.0),
        ]
        assert body["cached"] is False
        assert (await served.client.post("/v1/retrieve", json=asked)).json()["cached"] is True
        assert served.pipeline.calls == {"retrieve": 1}

    asyncio.run(run())


def read_as_search_r1(result: list[dict[str, Any]]) -> list[str]:
    """What Search-R1 shows its policy: titles and texts, split at the first line."""
    shown = []
    for found in result:
        title, *lines = found["document"]["contents"].split("\n")
        shown.append(f"(Title: {title}) " + "\n".join(lines))
    return shown


def test_search_r1_clients_read_the_answers() -> None:
    async def run() -> None:
        served = Served()
        asked = {"queries": [QUESTION, "", "four"], "topk": 2, "return_scores": True}
        result = (await served.client.post("/retrieve", json=asked)).json()["result"]
        assert read_as_search_r1(result[0])[0] == "(Title: Title 5) The value of number 5 is 25."
        assert [found["score"] for found in result[0]] == [1.0, 0.0]
        assert result[1] == []
        assert result[2][0]["document"]["id"] == "p4"
        plain = (await served.client.post("/retrieve", json={"queries": ["four"]})).json()
        assert len(plain["result"][0]) == 5
        assert plain["result"][0][0] == {
            "id": "p4",
            "contents": "Title 4\nThe value of number 4 is 16.",
        }
        assert (await served.client.post("/retrieve", json={"queries": []})).json() == {
            "result": []
        }
        for refused in ({"queries": [], "topk": 65_193}, {"queries": ["?"], "topk": 101}):
            reply = await served.client.post("/retrieve", json=refused)
            assert reply.status_code == 422
            assert reply.json()["detail"].startswith("topk is ")
            assert reply.json()["error"]["param"] == "topk"

    asyncio.run(run())


def test_a_bad_query_of_search_r1_loses_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        served = Served()
        bad = ["x" * 5000, "half \ud800", "?" * 5000]
        queries = [f"query {n % 7}" for n in range(2557)]  # 2,560 in one call, as it sends
        content = json.dumps({"queries": queries[:9] + bad + queries[9:], "topk": 3}).encode()
        reply = await served.client.post(
            "/retrieve", content=content, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 200, reply.text
        found = reply.json()
        assert [len(one) for one in found["result"]] == [3] * 9 + [0, 3, 0] + [3] * 2548
        [problem] = found["problems"]
        assert problem["query"] == 9
        assert problem["detail"].startswith("question has 5000 characters, more than the 4000")
        monkeypatch.setattr(answer_routes, "_MAX_FOUND", 7)
        reply = await served.client.post("/retrieve", json={"queries": ["a", "b"], "topk": 4})
        assert reply.status_code == 422
        assert "more than 7 passages" in reply.json()["detail"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b'{"question": "\xff"}', {}, 400, "not UTF-8: byte 14 is 0xff"),
        ('{"question": "q"}'.encode("utf-16"), {}, 400, "not UTF-8"),
        (b'{"question": ', {}, 400, "not JSON: Expecting value at 13"),
        (b"[" * 100_000, {}, 413, "values"),
        (b"[" * 10_000, {}, 400, "too deeply nested"),
        (b'{"question":"q","seed":' + b"9" * 5000 + b"}", {}, 400, "too many digits"),
        (b"", {}, 422, "required"),
        (b"[]", {}, 422, "body"),
        (b'{"question": ""}', {}, 422, "question: "),
        (b'{"question": "?!"}', {}, 422, "nothing to look up"),
        (b'{"question": "\\ud800"}', {}, 422, "unicode"),
        (b'{"question": "q", "\\ud800": 1}', {}, 422, "unicode"),
        (b'{"question": "q", "temperature": NaN}', {}, 422, "finite"),
        (b'{"question": "q"}', {"Content-Type": "text/plain"}, 415, "declared as text/plain"),
        (b"question=q", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "json"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_its_reason(
    content: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    async def run() -> None:
        served = Served()
        reply = await served.client.post(
            "/v1/answer", content=content, headers={"Content-Type": "application/json"} | headers
        )
        assert reply.status_code == status
        assert reply.headers["content-type"] == PROBLEM
        body = reply.json()
        assert words in body["detail"]
        assert body["status"] == status
        assert body["request_id"] == reply.headers["x-request-id"]
        assert not served.pipeline.calls

    asyncio.run(run())


@pytest.mark.parametrize(
    ("failure", "status", "kind", "said"),
    [
        (OverloadedError("the selector is restarting"), 503, "overloaded", True),
        (GenerationError("CUDA out of memory on gpu-7"), 500, "internal", False),
        (ValueError("/srv/secret is missing"), 500, "internal", False),
    ],
)
def test_failures_tell_what_a_client_can_act_on_and_no_more(
    failure: Exception, status: int, kind: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        served = Served()
        served.pipeline.failure = failure
        reply = await served.ask()
        assert reply.status_code == status
        assert reply.json()["type"] == f"urn:rlrag:{kind}"
        assert (str(failure) in reply.text) == said
        assert ("retry-after" in reply.headers) == (status == 503)
        logged = [
            r for r in caplog.records if r.exc_info and reply.json()["request_id"] in r.message
        ]
        assert bool(logged) == (not said)

    asyncio.run(run())


def test_a_late_answer_is_a_504() -> None:
    async def run() -> None:
        served = Served()
        served.pipeline.gate.clear()
        reply = await served.ask(timeout_s=0.1)
        assert reply.status_code == 504
        assert reply.json()["type"] == "urn:rlrag:too-late"
        await served.settled()

    asyncio.run(run())


def test_what_can_be_got_has_a_head() -> None:
    async def run() -> None:
        served = Served()
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/", "/page/page.js"):
            reply = await served.client.head(path)
            assert (reply.status_code, reply.content) == (200, b""), path
        assert (await served.client.head("/v1/answer")).headers["allow"] == "POST"
        assert (await served.client.head("/nothing")).status_code == 404

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"question": "q", "num_selected": 500}, "num_selected"),
        ({"question": "q", "num_selected": "2"}, "num_selected"),
        ({"question": "x" * 400}, "question"),  # the prompt has no room for it
        ({"question": "q", "version": "v9"}, "version"),
        ({"question": "q", "filters": {"ids": [7]}}, "filters.ids.0"),
    ],
)
def test_a_problem_names_the_field_that_is_wrong(fields: dict[str, Any], param: str) -> None:
    async def run() -> None:
        reply = await Served().ask(**fields)
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, param)

    asyncio.run(run())


def test_an_error_keeps_its_field_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RequestError.about("num_selected", "is 9")))
    assert (str(error), error.field) == ("num_selected is 9", "num_selected")


def test_unknown_paths_and_methods_are_problems_too() -> None:
    async def run() -> None:
        served = Served()
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("POST", "/v1/answer/", 404),
            ("GET", "/page/nothing.js", 404),
            ("GET", "/v1/answer", 405),
            ("PUT", "/healthz", 405),
        ):
            reply = await served.client.request(method, path)
            assert reply.status_code == status
            assert reply.headers["content-type"] == PROBLEM
            error = reply.json()["error"]
            assert error["message"] == reply.json()["detail"]
            assert (error["param"], error["code"]) == (
                None,
                {404: "not_found"}.get(status, "method"),
            )
        assert reply.headers["allow"] == "GET"

    asyncio.run(run())
