"""Requests and answers of `/v1/chat/completions` and `/v1/models` as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from serve.replies import PickedPassage, Reply
from serve.schemas import EXAMPLE_QUESTION, Count, CountOrZero, PassageFilter, whole

PIPELINE_MODEL = "rlrag"
"""The model's name for whichever version the service routes to."""

AnySeed = Annotated[int, BeforeValidator(whole)]


class _ChatPart(BaseModel):
    """Clients send fields of their own here; those that are not named below are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ContentPart(_ChatPart):
    """A piece of a message; only text can be read."""

    type: str
    text: str | None = None


class ChatMessage(_ChatPart):
    """A message; only the last one of the user is read."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class StreamOptions(_ChatPart):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""


class ChatRequest(_ChatPart):
    """A chat whose last user message is the question.

    `num_selected`, `num_candidates` and `filters` are those of `/v1/answer`. Parameters that would
    change the answer and that the service cannot follow are refused; others are ignored.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": PIPELINE_MODEL,
                    "messages": [{"role": "user", "content": EXAMPLE_QUESTION}],
                }
            ]
        }
    )

    model: str
    """`rlrag`, or a bundle version in use."""
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    seed: AnySeed | None = None
    num_selected: Count | None = None
    num_candidates: Count | None = None
    filters: PassageFilter | None = None
    n: Count | None = None
    """Only 1."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Only 1, unless decoding is greedy."""
    stop: str | list[str] | None = None
    """Only empty."""
    tools: list[Any] | None = None
    """Only empty."""
    functions: list[Any] | None = None
    """Only empty."""
    logprobs: bool | None = None
    """Only false."""
    top_logprobs: CountOrZero | None = None
    """Only 0."""
    logit_bias: dict[str, Any] | None = None
    """Only empty."""
    presence_penalty: float | None = None
    """Only 0."""
    frequency_penalty: float | None = None
    """Only 0."""
    response_format: dict[str, Any] | None = None
    """Only `{"type": "text"}`."""
    modalities: list[str] | None = None
    """Only `["text"]`."""


class Usage(Reply):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(Reply):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None
    citations: list[PickedPassage]
    """The passages that the answer stands on, in the order picked."""


class ChatChoice(Reply):
    """The one answer."""

    index: int = 0
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(Reply):
    """An answer in OpenAI's form."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "chatcmpl-9f1c0d3e",
                    "object": "chat.completion",
                    "created": 1767225600,
                    "model": "3fa9c1d2e4b5",
                    "choices": [
                        {
                            "index": 0,
                            "message": {
                                "role": "assistant",
                                "content": "Tarawa",
                                "refusal": None,
                                "citations": [
                                    {
                                        "id": "kiribati-3",
                                        "title": "Kiribati",
                                        "text": "Capital: Tarawa.",
                                        "retriever_score": 0.71,
                                        "selection_prob": 0.83,
                                    }
                                ],
                            },
                            "finish_reason": "stop",
                            "logprobs": None,
                        }
                    ],
                    "usage": {"prompt_tokens": 212, "completion_tokens": 3, "total_tokens": 215},
                }
            ]
        }
    )

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    """The bundle version that answered."""
    choices: list[ChatChoice]
    usage: Usage


class Model(Reply):
    """A name that `model` may take."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rlrag"


class ModelList(Reply):
    """All names that `model` may take."""

    object: Literal["list"] = "list"
    data: list[Model]
