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
from serve.records import Routing

QUESTION = "what?"  # the ranking begins with passage 5


def openai_client(served: Served, **fields: Any) -> AsyncOpenAI:
    """The official client, whose requests stay in this process."""
    return AsyncOpenAI(
        api_key="none",
        base_url="http://service/v1",
        max_retries=0,
        http_client=httpx2.AsyncClient(
            transport=httpx2.ASGITransport(served.app, raise_app_exceptions=False)
        ),
        **fields,
    )


def test_the_openai_client_is_answered() -> None:
    async def run() -> None:
        client = openai_client(Served(Routing("v1", canary="v2")))
        done = await client.chat.completions.create(
            model="rlrag",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "before"},
                {"role": "assistant", "content": "yes"},
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
        {"top_logprobs": 3},
        {"stop": "."},
        {"response_format": {"type": "json_object"}},
        {"presence_penalty": 0.5},
        {"logit_bias": {"1": 1}},
        {"temperature": 1, "top_p": 0.5},
    ],
)
def test_parameters_that_would_change_the_answer_are_refused_by_name(
    refused: dict[str, Any],
) -> None:
    async def run() -> None:
        with pytest.raises(openai.UnprocessableEntityError, match=list(refused)[-1]):
            await openai_client(Served()).chat.completions.create(
                model="rlrag", messages=[{"role": "user", "content": QUESTION}], **refused
            )

    asyncio.run(run())


def test_parameters_that_ask_for_nothing_are_accepted() -> None:
    async def run() -> None:
        done = await openai_client(Served()).chat.completions.create(
            model="rlrag", messages=[{"role": "user", "content": QUESTION}], n=1, tools=[],
            logprobs=False, presence_penalty=0, response_format={"type": "text"}, stop=[],
        )  # fmt: skip
        assert done.choices[0].message.content

    asyncio.run(run())


def test_chats_without_a_question_or_with_an_unknown_model_are_refused() -> None:
    async def run() -> None:
        client = openai_client(Served())
        ask = client.chat.completions.create
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
            await ask(model="gpt-9", messages=[{"role": "user", "content": QUESTION}])
        with pytest.raises(openai.UnprocessableEntityError, match="none of role 'user'"):
            await ask(model="rlrag", messages=[{"role": "system", "content": "hi"}])
        with pytest.raises(openai.UnprocessableEntityError, match="parts other than text"):
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
        assert caught.value.code == "unknown-name"

    asyncio.run(run())
