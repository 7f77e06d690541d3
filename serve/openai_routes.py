"""`/v1/chat/completions` and `/v1/models`, which the `openai` client uses unchanged.

Citations stand in `choices[0].message.citations`, and in a stream in the `delta` of the chunk that
ends the answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlrag.errors import RequestError
from serve.answering import Answered
from serve.json_routes import JsonRoute, event_stream, refusals
from serve.openai_schemas import (
    PIPELINE_MODEL,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    Model,
    ModelList,
    Usage,
)
from serve.problems import UnknownNameError, problem_of
from serve.questions import Ask, decoding_of
from serve.responses import EventStream, event, json_response, picked_passages
from serve.service import Service, filters_of, note_outcome
from serve.stages import Chosen
from serve.traffic import RequestRecord, record_of

_REFUSALS = refusals(400, 401, 404, 415, 422, 503, 504)
_STREAM = event_stream(
    "The answer, or with `stream` its chunks as server-sent events.", "data: [DONE]\n\n"
)

# For each parameter that the service cannot follow, the values that ask for nothing.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "n": lambda n: n in (None, 1),
    "tools": lambda tools: not tools,
    "functions": lambda functions: not functions,
    "stop": lambda stop: not stop,
    "logprobs": lambda logprobs: not logprobs,
    "top_logprobs": lambda number: not number,
    "logit_bias": lambda bias: not bias,
    "presence_penalty": lambda penalty: not penalty,
    "frequency_penalty": lambda penalty: not penalty,
    "response_format": lambda form: not form or form == {"type": "text"},
    "modalities": lambda kinds: not kinds or kinds == ["text"],
}


def openai_routes(service: Service) -> APIRouter:
    """The routes in OpenAI's form."""
    router = APIRouter(route_class=JsonRoute, tags=["openai"])

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses=_REFUSALS | _STREAM
    )
    async def complete(request: Request, body: ChatRequest) -> Response:
        """Answer the last user message of a chat; earlier messages are not read."""
        record = record_of(request.scope)
        _check_parameters(body)
        ask = _ask(service, body)
        service.traffic.note_question(record, ask.question)
        if body.stream:
            steps = service.answering.stream(ask, record.request_id)
            chosen = await anext(steps)
            assert isinstance(chosen, Chosen)  # always the first step
            return EventStream(_chunks(record, chosen.version, body, steps))
        answered = await service.answering.answer(ask, record.request_id)
        note_outcome(record, answered)
        return json_response(_completion(answered, body))

    @router.get("/v1/models", response_model=ModelList, responses=refusals(401, 503))
    async def models() -> Response:
        """The names that `model` may take: `rlrag`, and each version in use."""
        return json_response(ModelList(data=[_model(name) for name in _names(service)]))

    @router.get("/v1/models/{name}", response_model=Model, responses=refusals(401, 404, 422, 503))
    async def model(name: str) -> Response:
        """One of the names that `model` may take."""
        return json_response(_model(_known(service, name)))

    return router


def _names(service: Service) -> list[str]:
    return [PIPELINE_MODEL, *sorted(service.answering.routing().versions)]


def _known(service: Service, name: str) -> str:
    names = _names(service)
    if name not in names:
        raise UnknownNameError(f"there is no model {name!r}; the models are {', '.join(names)}")
    return name


def _model(name: str) -> Model:
    return Model(id=name, created=0)


def _check_parameters(body: ChatRequest) -> None:
    harmful = [name for name, harmless in _HARMLESS.items() if not harmless(getattr(body, name))]
    if body.temperature and body.top_p not in (None, 1):
        harmful.append("top_p")
    if harmful:
        raise RequestError(
            f"the service cannot follow {', '.join(harmful)} as given; leave them out"
        )


def _ask(service: Service, body: ChatRequest) -> Ask:
    name = _known(service, body.model)
    longest = body.max_completion_tokens or body.max_tokens
    seed = None if body.seed is None else body.seed % 2**63
    return Ask(
        _question(body),
        service.answering.deadline_of(None),
        body.num_selected,
        body.num_candidates,
        filters_of(body.filters),
        decoding_of(longest, body.temperature, seed),
        None if name == PIPELINE_MODEL else name,
    )


def _question(body: ChatRequest) -> str:
    asked = [message.content for message in body.messages if message.role == "user"]
    if not asked:
        raise RequestError("messages has none of role 'user', which would be the question")
    content = asked[-1]
    if isinstance(content, list):
        unread = {part.type for part in content} - {"text"}
        if unread:
            raise RequestError(f"the last user message has parts other than text: {sorted(unread)}")
        content = "\n".join(part.text or "" for part in content)
    return content or ""


def _finish(answered: Answered, body: ChatRequest) -> str:
    longest = body.max_completion_tokens or body.max_tokens
    cut = longest is not None and answered.computed.num_tokens >= longest
    return "length" if cut else "stop"


def _usage(answered: Answered) -> Usage:
    computed = answered.computed
    return Usage(
        prompt_tokens=computed.num_prompt_tokens,
        completion_tokens=computed.num_tokens,
        total_tokens=computed.num_prompt_tokens + computed.num_tokens,
    )


def _completion(answered: Answered, body: ChatRequest) -> ChatCompletion:
    message = AssistantMessage(
        content=answered.computed.text, citations=picked_passages(answered.computed.chosen)
    )
    choice = ChatChoice.model_validate(
        {"message": message, "finish_reason": _finish(answered, body)}
    )
    return ChatCompletion(
        id=f"chatcmpl-{answered.request_id}",
        created=int(time.time()),
        model=answered.version,
        choices=[choice],
        usage=_usage(answered),
    )


async def _chunks(
    record: RequestRecord,
    version: str,
    body: ChatRequest,
    steps: AsyncGenerator[Chosen | str | Answered, None],
) -> AsyncGenerator[bytes, None]:
    head = {
        "id": f"chatcmpl-{record.request_id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": version,
    }

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event(None, {**head, "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        # The first step is the selection, which the last chunk repeats whole.
        async for step in steps:
            if isinstance(step, str):
                yield chunk({"content": step})
            elif isinstance(step, Answered):
                note_outcome(record, step)
                passages = picked_passages(step.computed.chosen)
                citations = [passage.model_dump() for passage in passages]
                yield chunk({"citations": citations}, _finish(step, body))
                if body.stream_options and body.stream_options.include_usage:
                    yield event(None, {**head, "choices": [], "usage": _usage(step).model_dump()})
        yield event(None, "[DONE]")
    except Exception as error:  # noqa: BLE001 - the status has been sent; the client is told here
        problem = problem_of(error, record.request_id, "/v1/chat/completions")
        yield event(None, {"error": problem.error})
    finally:
        await steps.aclose()
