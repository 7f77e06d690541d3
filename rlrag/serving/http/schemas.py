"""Request bodies of the HTTP interface as pydantic models, with examples.

Requests refuse unknown fields and wrong types. What depends on the bundle or on the settings, such
as the longest question, is checked where the question is answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

EXAMPLE_QUESTION = "What is the capital of Kiribati?"
EXAMPLE_ID = "9f1c0d3e5a7b4c2d8e6f0a1b2c3d4e5f"


def whole(value: Any) -> Any:
    """`2.0` as `2`: both are integers in JSON Schema, and in JavaScript."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=0, le=2**53 - 1), BeforeValidator(whole)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
QuestionText = Annotated[Text, Field(description="The question in natural language.")]
PassageId = Annotated[str, Field(min_length=1, max_length=500)]
RequestId = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._-]+$")]
GoldenAnswers = Annotated[list[Annotated[Text, Field(max_length=2000)]], Field(max_length=64)]


def _without_halves(value: Any) -> Any:
    """Text that has a form in UTF-8, so that one query of many cannot refuse them all."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _drop_default(schema: dict[str, Any]) -> None:
    """A field that may be left out, but not be null, has no default to show."""
    schema.pop("default", None)


class Request(BaseModel):
    """What a client sends: exact types, no unknown fields, finite numbers."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PassageFilter(Request):
    """Which passages may be candidates; an empty field excludes nothing."""

    ids: list[PassageId] = Field(default=[], max_length=1000)
    """Only these passages."""
    exclude_ids: list[PassageId] = Field(default=[], max_length=1000)
    """None of these passages."""
    title_contains: str = Field(default="", max_length=200)
    """Only passages whose title contains this text; case does not matter."""


class RetrieveOptions(Request):
    """What every request that retrieves may set."""

    num_candidates: Count | None = None
    """Passages to retrieve (n); the bundle's number when unset."""
    filters: PassageFilter | None = None
    """Which passages may be candidates. An answer refuses them where the bundle looks further than
    the candidates, which it could leave."""
    version: str | None = Field(default=None, min_length=1, max_length=100)
    """A bundle version in use; the service decides when unset."""
    timeout_s: float | None = Field(default=None, ge=0.1)
    """Give up after so many seconds, or after the service's own limit if that is shorter."""


class AnswerOptions(RetrieveOptions):
    """What every request that answers may set."""

    num_selected: Count | None = None
    """Passages to pick (K); the bundle's number when unset."""
    explain: bool = False
    """Return all candidates with their retriever scores as well."""
    max_new_tokens: Count | None = None
    """Longest answer, in tokens; the bundle's number when unset."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Sampling temperature; 0 is greedy; the bundle's own when unset."""
    seed: Seed | None = None
    """Equal seeds repeat a sampled answer; drawn at random when unset."""


class AnswerRequest(AnswerOptions):
    """One question."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"question": EXAMPLE_QUESTION},
                {"question": EXAMPLE_QUESTION, "num_selected": 2, "explain": True},
            ]
        }
    )

    question: QuestionText
    stream: bool = False
    """Answer with server-sent events: `passages`, then one `turn` for each turn of the path where
    there is one and one `token` for each piece of text, then `answer` with the whole answer, or
    `error` with a problem."""


class AnswersRequest(AnswerOptions):
    """Several questions, all answered by the same bundle version."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"questions": [EXAMPLE_QUESTION, "Who wrote Hamlet?"]}]}
    )

    questions: list[QuestionText] = Field(min_length=1)


class RetrieveRequest(RetrieveOptions):
    """One question whose candidates are wanted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"question": EXAMPLE_QUESTION, "num_candidates": 3}]}
    )

    question: QuestionText


class SearchRequest(BaseModel):
    """Search-R1's request. A query without a word in it, or too long a one, finds nothing."""

    model_config = ConfigDict(
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [{"queries": [EXAMPLE_QUESTION], "topk": 3, "return_scores": True}]
        },
    )

    queries: list[Annotated[str, BeforeValidator(_without_halves)]]
    """Half of a surrogate pair is read as `?`."""
    topk: CountOrZero | None = None
    """Passages a query; the bundle's number when unset or 0."""
    return_scores: bool = False
    """Wrap each document with its score."""


class FeedbackRequest(Request):
    """What an answer was worth, in exactly one form."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"request_id": EXAMPLE_ID, "thumbs": "up"}],
            "oneOf": [{"required": [name]} for name in ("reward", "golden_answers", "thumbs")],
        }
    )

    request_id: RequestId
    """The id that came with the answer."""
    reward: Annotated[float, Field(ge=-1, le=1)] | SkipJsonSchema[None] = Field(
        default=None, json_schema_extra=_drop_default
    )
    """From -1 to 1, growing with the worth of the answer; right answers get 1 in training."""
    golden_answers: GoldenAnswers | SkipJsonSchema[None] = Field(
        default=None, json_schema_extra=_drop_default
    )
    """Texts that would have been right; none says that the question has no answer."""
    thumbs: Literal["up", "down"] | SkipJsonSchema[None] = Field(
        default=None, json_schema_extra=_drop_default
    )
    """Right or wrong."""

    @model_validator(mode="after")
    def _exactly_one(self) -> FeedbackRequest:
        given = self.model_fields_set - {"request_id"}
        if len(given) != 1 or any(getattr(self, name) is None for name in given):
            raise ValueError("give exactly one of reward, golden_answers and thumbs")
        return self


class BundleRequest(Request):
    """A bundle to load and the role that it takes."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"path": "/srv/bundles/july", "role": "canary", "share": 0.1}]
        }
    )

    path: str = Field(min_length=1, max_length=4096)
    """A bundle directory that the service can read."""
    role: Literal["active", "canary", "shadow"] = "active"
    """`canary` answers a share of the requests; `shadow` answers beside the active version, to be
    compared and never shown."""
    share: float = Field(default=0.1, ge=0, le=1)
    """Part of the requests that a canary answers."""
