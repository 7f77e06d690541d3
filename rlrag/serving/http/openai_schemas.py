"""Requests and responses of `/v1/chat/completions` and `/v1/models` as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from rlrag.serving.http.replies import Absent, PathTurn, PickedPassage, Reply
from rlrag.serving.http.schemas import EXAMPLE_QUESTION, Count, PassageFilter, whole

PIPELINE_MODEL = "rlrag"
"""The model's name for whichever version the service routes to."""

AnySeed = Annotated[int, BeforeValidator(whole)]


class _ChatPart(BaseModel):
    """A part of a chat; fields that are not named below are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


# What the service does not follow, and the values of it that ask for nothing; nor does null.
_UNFOLLOWED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": ([], ["text"]),
    "moderation": (),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stop": ([], ""),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Of no consequence here, whatever they are: who asks, how a bill or a cache is kept, what tools
# that are not there may do, what the client expects.
_HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)


def _describe_unfollowed(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = False
    for name, values in sorted((_UNFOLLOWED | dict.fromkeys(_HARMLESS, ())).items()):
        followed = name in _HARMLESS
        told = "Of no consequence here." if followed else "Not followed: other values are refused."
        schema["properties"][name] = {"description": told} | (
            {} if followed else {"enum": [None, *values]}
        )
    schema["examples"] = [
        {"model": PIPELINE_MODEL, "messages": [{"role": "user", "content": EXAMPLE_QUESTION}]}
    ]


class ContentPart(_ChatPart):
    """A piece of a message; only text can be read."""

    type: str
    text: str | None = None


class ChatMessage(_ChatPart):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None


class StreamOptions(_ChatPart):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""


class ChatRequest(_ChatPart):
    """A chat that holds one question.

    The question is the one user message; an instruction or earlier turns are refused, since a
    bundle's prompt has no place for them. `num_selected`, `num_candidates` and `filters` are those
    of `/v1/answer`. A parameter that the service does not follow is refused by name.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_unfollowed)

    model: str
    """`rlrag`, or a bundle version in use."""
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Only 1, unless `temperature` is 0."""
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    seed: AnySeed | None = None
    num_selected: Count | None = None
    num_candidates: Count | None = None
    filters: PassageFilter | None = None

    def unfollowed(self) -> dict[str, Any]:
        """The parameters that ask for what the service does not do, with their values."""
        found = {
            name: value
            for name, value in (self.model_extra or {}).items()
            if name not in _HARMLESS
            and value is not None
            and not any(_same(value, other) for other in _UNFOLLOWED.get(name, ()))
        }
        if self.top_p not in (None, 1) and self.temperature != 0:
            found["top_p"] = self.top_p
        return found


def _same(value: Any, other: Any) -> bool:
    """Whether two JSON values are equal; `false` is no number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


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
    """The passages picked for the answer, in the order picked."""
    num_passages: int
    """As in `/v1/answer`: how many of them the prompt shows."""
    num_cut_tokens: int
    """As in `/v1/answer`: tokens of theirs that the prompt had no room for."""
    path: Absent[list[PathTurn]] = None
    """As in `/v1/answer`: how the selector came to them, where it looked further."""


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
                                "num_passages": 1,
                                "num_cut_tokens": 0,
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
