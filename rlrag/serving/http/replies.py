"""Response bodies of the HTTP interface as pydantic models, with examples."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rlrag.serving.http.schemas import EXAMPLE_ID

_EXAMPLE_PASSAGE: dict[str, Any] = {
    "id": "kiribati-3",
    "title": "Kiribati",
    "text": "Capital: Tarawa.",
    "retriever_score": 0.71,
}
_EXAMPLE_TIMINGS: dict[str, Any] = {
    "wait": 0.0,
    "retrieve": 4.1,
    "select": 1.3,
    "generate": 92.0,
    "total": 98.2,
}
_EXAMPLE_PICKED: dict[str, Any] = {**_EXAMPLE_PASSAGE, "selection_prob": 0.83}
_EXAMPLE_ANSWER: dict[str, Any] = {
    "request_id": EXAMPLE_ID,
    "answer": "Tarawa",
    "answer_logp": -0.42,
    "num_answer_tokens": 3,
    "num_prompt_tokens": 212,
    "num_passages": 1,
    "num_cut_tokens": 0,
    "passages": [_EXAMPLE_PICKED],
    "bundle_version": "3fa9c1d2e4b5",
    "timings_ms": _EXAMPLE_TIMINGS,
    "cached": False,
}

T = TypeVar("T")
Absent = Annotated[T | None, Field(exclude_if=lambda value: value is None)]
"""A part of a reply that is left out where there is none."""


class Reply(BaseModel):
    """What the service sends."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class FoundPassage(Reply):
    """A candidate."""

    id: str
    title: str
    text: str
    retriever_score: float


class PickedPassage(Reply):
    """A passage that the selector picked."""

    id: str
    title: str
    text: str
    retriever_score: float | None
    """Of the question's own search; null for a passage that was found on the path alone."""
    selection_prob: float
    """Its probability under the selector, given what it did before."""


class PathPassage(Reply):
    """A passage that a turn found."""

    id: str
    title: str
    by: Literal["query", "hop", "title"]
    """What found it: a query, a hop along an edge, or its title, which the question names."""
    source: Absent[str] = None
    """Id of the picked passage that the hop came from."""
    edge: Absent[str] = None
    """Kind of the edge that the hop followed, as `environment.hops.edges` names it."""


class PathTurn(Reply):
    """What the selector did in one turn, and what that found."""

    action: Literal["start", "pick", "search", "stop", "invalid"]
    """`start` is the question's own search; `invalid` an action that was not allowed."""
    passage_id: Absent[str] = None
    """The passage that was picked, or the pick that a search's query was written on."""
    title: Absent[str] = None
    query: Absent[str] = None
    writer: Absent[str] = None
    """Which query writer wrote the query."""
    found: list[PathPassage]
    num_left_out: int
    """Passages that were found as well and had no room."""


class Timings(Reply):
    """Milliseconds; a stage that a cache answered took 0."""

    wait: float
    """Until there was room."""
    retrieve: float
    select: float
    generate: float
    total: float


class Answer(Reply):
    """An answer with what it stands on."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE_ANSWER]})

    request_id: str
    answer: str
    answer_logp: float | None
    """Log-probability of the answer under the generator, in nats; null where the generator does not
    give it."""
    num_answer_tokens: int
    num_prompt_tokens: int
    num_passages: int
    """Passages that the prompt shows; fewer than were picked where it had no room for the last."""
    num_cut_tokens: int
    """Tokens of the picked passages that the prompt had no room for."""
    passages: list[PickedPassage]
    """In the order picked."""
    path: Absent[list[PathTurn]] = None
    """How the selector came to the passages, turn by turn; only with a bundle whose episodes look
    further than the candidates."""
    bundle_version: str
    timings_ms: Timings
    cached: bool
    """Whether an equal request had been answered before."""
    candidates: Absent[list[FoundPassage]] = None
    """With `explain`: all candidates in the retriever's order."""


class FieldError(Reply):
    """What is wrong with one field of a request."""

    field: str
    message: str


class OpenAIError(Reply):
    """A problem as clients of OpenAI's API read it."""

    message: str
    type: str
    param: str | None
    """The field of the request that is wrong."""
    code: str


class Problem(Reply):
    """What went wrong, as RFC 9457 (problem details) has it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:rlrag:overloaded",
                    "title": "The service is full",
                    "status": 503,
                    "detail": "64 requests are under way and 64 wait; try again in a moment",
                    "request_id": EXAMPLE_ID,
                    "error": {
                        "message": "64 requests are under way and 64 wait; try again in a moment",
                        "type": "overloaded",
                        "param": None,
                        "code": "overloaded",
                    },
                }
            ]
        }
    )

    type: str
    """Which kind of problem; equal kinds have equal types."""
    title: str
    status: int
    detail: str
    request_id: str
    errors: Absent[list[FieldError]] = None
    """Fields of the request that are wrong."""
    error: OpenAIError
    """The same in OpenAI's form."""


class AnswerOrProblem(Reply):
    """What became of one question of several: exactly one of both."""

    answer: Absent[Answer] = None
    problem: Absent[Problem] = None


class Answers(Reply):
    """The questions' answers, in their order."""

    request_id: str
    bundle_version: str
    answers: list[AnswerOrProblem]


class RetrieveTimings(Reply):
    """Milliseconds."""

    wait: float
    retrieve: float
    total: float


class Candidates(Reply):
    """Candidates in the retriever's order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "request_id": EXAMPLE_ID,
                    "passages": [_EXAMPLE_PASSAGE],
                    "bundle_version": "3fa9c1d2e4b5",
                    "timings_ms": {"wait": 0.0, "retrieve": 4.1, "total": 4.4},
                    "cached": False,
                }
            ]
        }
    )

    request_id: str
    passages: list[FoundPassage]
    bundle_version: str
    timings_ms: RetrieveTimings
    cached: bool


class SearchDocument(Reply):
    """A passage in Search-R1's form: the first line of `contents` is the title."""

    id: str
    contents: str


class ScoredDocument(Reply):
    """A passage with its score."""

    document: SearchDocument
    score: float


class QueryProblem(Reply):
    """Why a query of several found nothing."""

    query: int
    """Its place among the queries, from 0."""
    detail: str


class SearchResults(Reply):
    """For each query its documents, wrapped with scores where they were asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "result": [
                        [
                            {
                                "document": {
                                    "id": "kiribati-3",
                                    "contents": "Kiribati\nCapital: Tarawa.",
                                },
                                "score": 0.71,
                            }
                        ]
                    ]
                }
            ]
        }
    )

    result: list[list[ScoredDocument] | list[SearchDocument]]
    problems: Absent[list[QueryProblem]] = None
    """Queries that could not be looked up; left out where there are none."""


class Versions(Reply):
    """Bundle versions in use."""

    active: str
    canary: str | None
    canary_share: float
    """Part of the requests that the canary answers."""
    shadow: str | None
    epoch: int
    """Counts the changes."""


class VersionsWithPaths(Versions):
    """Bundle versions in use and where they were loaded from."""

    paths: dict[str, str]


class LoadedBundle(Reply):
    """A bundle that has been loaded and checked and now has its role."""

    version: str
    role: str
    already_loaded: bool
    """Whether the version was in use before, so that nothing was read again."""
    note: Absent[str] = None
    """What else the operator should know."""


class Difference(Reply):
    """A question that the active version and the shadow treated differently."""

    request_id: str
    question: str
    active_answer: str
    shadow_answer: str
    active_passages: list[str]
    """Ids of the passages picked, in order."""
    shadow_passages: list[str]


class ComparisonReport(Reply):
    """How the shadow compares with the active version, as counted by this replica.

    A share or mean over no requests is null.
    """

    active: str | None
    shadow: str | None
    num_compared: int
    num_failed: int
    """Questions that the shadow could not answer."""
    num_dropped: int
    """Questions left out because too many shadow answers were under way."""
    equal_answers: float | None
    """Share of equal answers."""
    equal_selections: float | None
    """Share of equal passages in equal order."""
    active_mean_ms: float | None
    """Mean time over requests that no cache answered on either side."""
    shadow_mean_ms: float | None
    differences: list[Difference]
    """The newest differences, newest first."""


class RecentRequest(Reply):
    """One request that this replica has finished."""

    request_id: str
    client_request_id: str | None
    """What the client called it."""
    time: float
    """When it came, in seconds since 1970."""
    route: str
    status: int
    """499 where the client left."""
    version: str | None
    timings_ms: dict[str, float]
    question: Absent[str] = None
    """Its beginning; kept only where feedback is recorded."""


class RecentRequests(Reply):
    """The newest requests first."""

    requests: list[RecentRequest]


class Accepted(Reply):
    """Feedback that has been recorded."""

    request_id: str


class Health(Reply):
    """The state of the service."""

    status: Literal["ok"] = "ok"
