"""OpenAI-compatible `/v1/chat/completions` and `/v1/models`.

Citations, and what of them the prompt had no room for, stand in `choices[0].message`, and in a
stream in the `delta` of the chunk that ends the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlrag.errors import RequestError
from rlrag.serving.answering import Answered
from rlrag.serving.http.json_routes import JsonRoute, event_stream, refusals
from rlrag.serving.http.openai_schemas import (
    PIPELINE_MODEL,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Model,
    ModelList,
    Usage,
)
from rlrag.serving.http.problems import UnknownNameError, UnsupportedParameterError, problem_of
from rlrag.serving.http.responses import (
    EventStream,
    event,
    json_response,
    path_turns,
    picked_passages,
)
from rlrag.serving.http.traffic import RequestRecord, record_of
from rlrag.serving.questions import Ask, decoding_of
from rlrag.serving.service import Service, filters_of, note_outcome
from rlrag.serving.stages import Chosen

_REFUSALS = refusals(400, 401, 404, 415, 422, 503, 504)
_STREAM = event_stream(
    "The answer, or with `stream` its chunks as server-sent events.", "data: [DONE]\n\n"
)
_MAX_SHOWN = 100


def openai_routes(service: Service) -> APIRouter:
    """The routes in OpenAI's form."""
    router = APIRouter(route_class=JsonRoute, tags=["openai"])

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses=_REFUSALS | _STREAM
    )
    async def complete(request: Request, body: ChatRequest) -> Response:
        """Answer the question that a chat holds."""
        record = record_of(request.scope)
        _check_parameters(body)
        ask = _ask(service, body, record)
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
        raise UnknownNameError.about(
            "model", f"{name[:_MAX_SHOWN]!r} is unknown; the models are {', '.join(names)}"
        )
    return name


def _model(name: str) -> Model:
    return Model(id=name, created=0)


def _check_parameters(body: ChatRequest) -> None:
    for name, value in body.unfollowed().items():
        raise UnsupportedParameterError.about(
            name[:_MAX_SHOWN],
            f"is {json.dumps(value)[:_MAX_SHOWN]}, which the service does not follow; leave it out",
        )


def _ask(service: Service, body: ChatRequest, record: RequestRecord) -> Ask:
    name = _known(service, body.model)
    name_of_longest, longest = _longest(body, service.settings.limits.max_new_tokens)
    record.field_names = {
        "question": "messages",
        "version": "model",
        "max_new_tokens": name_of_longest,
    }
    seed = None if body.seed is None else body.seed % 2**63
    return Ask(
        _question(body.messages),
        service.answering.deadline_of(None),
        body.num_selected,
        body.num_candidates,
        filters_of(body.filters),
        decoding_of(longest, body.temperature, seed),
        None if name == PIPELINE_MODEL else name,
    )


def _question(messages: Sequence[ChatMessage]) -> str:
    """The text of the one message that says something, which must be the user's."""
    said = [(n, text) for n, message in enumerate(messages) if (text := _text(n, message)).strip()]
    for place, text in said:
        if place == said[-1][0] and messages[place].role == "user":
            return text
        raise UnsupportedParameterError.about(
            f"messages.{place}",
            f"has the role {messages[place].role!r}, but this service reads one question and "
            "neither an instruction nor earlier turns; send the question alone, as role 'user'",
        )
    raise RequestError.about("messages", "has no text of role 'user', which would be the question")


def _text(place: int, message: ChatMessage) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    unread = sorted({part.type for part in message.content} - {"text"})
    if unread:
        raise UnsupportedParameterError.about(
            f"messages.{place}.content",
            f"has parts of type {', '.join(unread)[:_MAX_SHOWN]}; only text can be read",
        )
    return "\n".join(part.text or "" for part in message.content)


def _longest(body: ChatRequest, most: int | None = None) -> tuple[str, int | None]:
    """The lesser of the two bounds of an answer's tokens, with its name.

    Raises:
        RequestError: when one of them is more than `most`.
    """
    bounds = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens")}
    given = {name: value for name, value in bounds.items() if value is not None}
    for name, value in given.items():
        if most is not None and value > most:
            raise RequestError.about(
                name, f"is {value}, more than the {most} that the service allows"
            )
    return min(given.items(), key=lambda one: one[1], default=("max_tokens", None))


def _finish(answered: Answered, body: ChatRequest) -> str:
    _, longest = _longest(body)
    cut = longest is not None and answered.computed.num_tokens >= longest
    return "length" if cut else "stop"


def _usage(answered: Answered) -> Usage:
    computed = answered.computed
    return Usage(
        prompt_tokens=computed.num_prompt_tokens,
        completion_tokens=computed.num_tokens,
        total_tokens=computed.num_prompt_tokens + computed.num_tokens,
    )


def _stands_on(answered: Answered) -> dict[str, Any]:
    """The picked passages, what of them the prompt shows, and the path to them if there is one."""
    computed = answered.computed
    shown: dict[str, Any] = {
        "citations": [passage.model_dump() for passage in picked_passages(computed.chosen)],
        "num_passages": computed.num_passages,
        "num_cut_tokens": computed.num_cut_tokens,
    }
    turns = path_turns(computed.chosen)
    if turns is not None:
        shown["path"] = [turn.model_dump() for turn in turns]
    return shown


def _completion(answered: Answered, body: ChatRequest) -> ChatCompletion:
    message = AssistantMessage(content=answered.computed.text, **_stands_on(answered))
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
                yield chunk(_stands_on(step), _finish(step, body))
                if body.stream_options and body.stream_options.include_usage:
                    yield event(None, {**head, "choices": [], "usage": _usage(step).model_dump()})
        yield event(None, "[DONE]")
    except Exception as error:  # noqa: BLE001 - the status has been sent; the client is told here
        problem = problem_of(error, record.request_id, record.field_names)
        yield event(None, {"error": problem.error.model_dump()})
    finally:
        await steps.aclose()
