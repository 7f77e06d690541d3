"""`/v1/chat/completions` and `/v1/models` as the official client sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from serve_stand_ins import Served

from rlrag.errors import OverloadedError
from rlrag.serving.records import Routing

QUESTION = "what?"  # the ranking begins with passage 5


def openai_client(served: Served, **fields: Any) -> AsyncOpenAI:
    """The official client, whose requests stay in this process."""
    return AsyncOpenAI(
        api_key="none",
        base_url="http://localhost/v1",
        max_retries=0,
        http_client=httpx2.AsyncClient(
            transport=httpx2.ASGITransport(served.app, raise_app_exceptions=False)
        ),
        **fields,
    )


def test_the_openai_client_is_answered() -> None:
    async def run() -> None:
        served = Served(Routing("v1", canary="v2"))
        served.pipeline.num_cut_tokens = 7
        client = openai_client(served)
        done = await client.chat.completions.create(
            model="rlrag",
            messages=[
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
            ],
            temperature=0,
            seed=-4,
            max_tokens=4,
            top_p=0.9,
            user="me",
        )
        message = done.choices[0].message
        assert message.content == "v1 says 25. 36."
        assert [one["id"] for one in message.citations] == ["p5", "p6"]  # type: ignore[attr-defined]
        assert (message.num_passages, message.num_cut_tokens) == (1, 7)  # type: ignore[attr-defined]
        assert done.choices[0].finish_reason == "length"
        assert done.model == "v1"
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (25, 4)
        assert done.usage.total_tokens == 29
        assert [model.id async for model in client.models.list()] == ["rlrag", "v1", "v2"]
        assert (await client.models.retrieve("v2")).id == "v2"
        done = await client.chat.completions.create(
            model="v2", messages=[{"role": "user", "content": QUESTION}]
        )
        assert done.model == "v2"
        assert done.choices[0].finish_reason == "stop"

    asyncio.run(run())


def test_the_openai_client_reads_a_stream() -> None:
    async def run() -> None:
        client = openai_client(Served())
        stream = await client.chat.completions.create(
            model="rlrag",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "v1 says 25. 36."
        assert chunks[0].choices[0].delta.role == "assistant"
        last = chunks[-2].choices[0]
        assert last.finish_reason == "stop"
        assert [one["id"] for one in last.delta.citations] == ["p5", "p6"]  # type: ignore[attr-defined]
        assert (last.delta.num_passages, last.delta.num_cut_tokens) == (2, 0)  # type: ignore[attr-defined]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 29
        assert len({chunk.id for chunk in chunks}) == 1

    asyncio.run(run())


def test_an_openai_stream_ends_with_done_and_tells_of_failures() -> None:
    async def run() -> None:
        served = Served()
        asked = {"model": "rlrag", "messages": [{"role": "user", "content": QUESTION}]}
        path = "/v1/chat/completions"
        reply = await served.client.post(path, json={**asked, "stream": True})
        assert reply.text.endswith("data: [DONE]\n\n")
        served.pipeline.failure = OverloadedError("the generator is restarting")
        served.desk.now = Routing("v2", epoch=1)
        stream = await openai_client(served).chat.completions.create(**asked, stream=True)
        with pytest.raises(openai.APIError, match="restarting"):
            assert [chunk async for chunk in stream] == []

    asyncio.run(run())


@pytest.mark.parametrize(
    "refused",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"logprobs": True},
        {"extra_body": {"frequency_penalty": False}},
        {"top_logprobs": 3},
        {"stop": "."},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"logit_bias": {"1": 1}},
        {"temperature": 1, "top_p": 0.5},
        {"top_p": 0.5},
        {"reasoning_effort": "high"},
        {"tool_choice": "required"},
        {"verbosity": "low"},
        {"store": True},
        {"extra_body": {"repetition_penalty": 1.1}},
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(
    refused: dict[str, Any],
) -> None:
    async def run() -> None:
        name = list(refused.get("extra_body", refused))[-1]
        with pytest.raises(openai.BadRequestError, match=f"{name} is ") as caught:
            await openai_client(Served()).chat.completions.create(
                model="rlrag", messages=[{"role": "user", "content": QUESTION}], **refused
            )
        assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")

    asyncio.run(run())


def test_parameters_that_ask_for_nothing_are_accepted() -> None:
    async def run() -> None:
        done = await openai_client(Served()).chat.completions.create(
            model="rlrag", messages=[{"role": "user", "content": QUESTION}], n=1, tools=[],
            logprobs=False, presence_penalty=0, response_format={"type": "text"}, stop=[],
            tool_choice="auto", reasoning_effort="none", store=False, top_p=1, user="me",
            metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
        )  # fmt: skip
        assert done.choices[0].message.content

    asyncio.run(run())


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([("system", "Answer in French."), ("user", QUESTION)], "messages.0"),
        ([("developer", "Answer in French."), ("user", QUESTION)], "messages.0"),
        ([("user", "before"), ("assistant", "yes"), ("user", QUESTION)], "messages.0"),
        ([("system", ""), ("user", QUESTION), ("assistant", "The capital is")], "messages.1"),
        ([("user", QUESTION), ("tool", "42")], "messages.0"),
        ([("assistant", QUESTION)], "messages.0"),
    ],
)
def test_instructions_and_earlier_turns_are_refused_and_not_dropped(
    messages: list[tuple[str, str]], param: str
) -> None:
    async def run() -> None:
        served = Served()
        asked = [{"role": role, "content": content} for role, content in messages]
        with pytest.raises(openai.BadRequestError, match="neither an instruction nor") as caught:
            await openai_client(served).chat.completions.create(
                model="rlrag",
                messages=asked,  # type: ignore[arg-type]
            )
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)
        assert not served.pipeline.calls

    asyncio.run(run())


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 5000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
    ],
)
def test_problems_name_fields_as_the_client_does(sent: dict[str, Any], param: str) -> None:
    async def run() -> None:
        asked = {"model": "rlrag", "messages": [{"role": "user", "content": QUESTION}]} | sent
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await openai_client(Served()).chat.completions.create(**asked)
        assert caught.value.param == param
        assert "max_new_tokens" not in caught.value.message

    asyncio.run(run())


def test_chats_without_a_question_or_with_an_unknown_model_are_refused() -> None:
    async def run() -> None:
        client = openai_client(Served())
        ask = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="model 'gpt-9' is unknown"):
            await ask(model="gpt-9", messages=[{"role": "user", "content": QUESTION}])
        with pytest.raises(openai.UnprocessableEntityError, match="no text of role 'user'"):
            await ask(model="rlrag", messages=[{"role": "system", "content": " "}])
        with pytest.raises(openai.BadRequestError, match="parts of type image_url"):
            await ask(
                model="rlrag",
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                    }
                ],
            )
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("v9")
        assert (caught.value.code, caught.value.param) == ("unknown_name", "model")
        with pytest.raises(openai.NotFoundError, match="no resource has this path"):
            await client.embeddings.create(model="rlrag", input="text")

    asyncio.run(run())
