"""`/v1/answer`, `/v1/answers`, `/v1/retrieve` and Search-R1's `/retrieve`."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlrag.errors import OverloadedError, RequestError
from rlrag.records import Passage
from rlrag.serving.answering import Answered
from rlrag.serving.http.json_routes import JsonRoute, event_stream, refusals
from rlrag.serving.http.problems import problem_of
from rlrag.serving.http.replies import (
    Answer,
    AnswerOrProblem,
    Answers,
    Candidates,
    QueryProblem,
    ScoredDocument,
    SearchDocument,
    SearchResults,
)
from rlrag.serving.http.responses import (
    EventStream,
    answer_reply,
    candidates_reply,
    event,
    json_response,
    path_turns,
    picked_passages,
)
from rlrag.serving.http.schemas import (
    AnswerOptions,
    AnswerRequest,
    AnswersRequest,
    RetrieveOptions,
    RetrieveRequest,
    SearchRequest,
)
from rlrag.serving.http.traffic import RequestRecord, record_of
from rlrag.serving.questions import Ask, check_length, check_numbers, decoding_of, holds_words
from rlrag.serving.service import Service, check_number, filters_of, note_outcome, work_on_all
from rlrag.serving.stages import Chosen

_MAX_FOUND = 65_536
"""Passages of one response, some tens of megabytes."""
_REFUSALS = refusals(400, 401, 415, 422, 503, 504)
_EVENTS = (
    'event: passages\ndata: {"request_id": "9f1c", "bundle_version": "3fa9", "passages": []}\n\n'
    'event: token\ndata: {"text": "Tarawa"}\n\nevent: answer\ndata: {"answer": "Tarawa"}\n\n'
)
_STREAM = event_stream("The answer, or with `stream` the events of its making.", _EVENTS)


def answer_routes(service: Service) -> APIRouter:
    """The routes that answer and retrieve."""
    router = APIRouter(route_class=JsonRoute, tags=["questions"])
    limits = service.settings.limits

    @router.post("/v1/answer", response_model=Answer, responses=_REFUSALS | _STREAM)
    async def answer(request: Request, body: AnswerRequest) -> Response:
        """Answer a question from the corpus, with the passages that the answer stands on."""
        record = record_of(request.scope)
        service.traffic.note_question(record, body.question)
        ask = _ask(service, body, body.question)
        if body.stream:
            steps = service.answering.stream(ask, record.request_id)
            first = await anext(steps)
            return EventStream(_events(record, first, steps, body.explain))
        answered = await service.answering.answer(ask, record.request_id)
        note_outcome(record, answered)
        return json_response(answer_reply(answered, body.explain))

    @router.post("/v1/answers", response_model=Answers, responses=_REFUSALS)
    async def answers(request: Request, body: AnswersRequest) -> Response:
        """Answer several questions, all by one version; each gets an answer or a problem.

        The request is refused as a whole where there is no room for its first question.
        """
        check_number("questions", len(body.questions), limits.max_questions)
        service.answering.check_room(batch=True)
        record = record_of(request.scope)
        service.traffic.note_question(record, " | ".join(body.questions))
        version = service.answering.version_for(record.request_id, body.version)
        asks = [_ask(service, body, question, version) for question in body.questions]

        async def work(number: int, ask: Ask, patient: bool) -> AnswerOrProblem:
            name = f"{record.request_id}.{number}"
            try:
                answered = await service.answering.answer(ask, name, patient)
            except Exception as error:
                if not patient and isinstance(error, OverloadedError):
                    raise
                return AnswerOrProblem(problem=problem_of(error, name))
            return AnswerOrProblem(answer=answer_reply(answered, body.explain))

        async with service.answering.holding(version):
            done = await work_on_all(asks, work)
        record.version = version
        return json_response(
            Answers(request_id=record.request_id, bundle_version=version, answers=done)
        )

    @router.post("/v1/retrieve", response_model=Candidates, responses=_REFUSALS)
    async def retrieve(request: Request, body: RetrieveRequest) -> Response:
        """Find the candidates of a question, without answering it."""
        record = record_of(request.scope)
        service.traffic.note_question(record, body.question)
        ask = _retrieval(service, body, body.question)
        found = await service.answering.retrieve(ask, record.request_id)
        note_outcome(record, found)
        return json_response(candidates_reply(found))

    return router


def search_routes(service: Service) -> APIRouter:
    """The route for clients of Search-R1's retrieval server."""
    router = APIRouter(route_class=JsonRoute, tags=["questions"])
    limits = service.settings.limits

    @router.post("/retrieve", response_model=SearchResults, responses=_REFUSALS)
    async def search(request: Request, body: SearchRequest) -> Response:
        """Find passages for several queries, in Search-R1's format.

        A query that is too long finds nothing, and `problems` says so; one without a letter or
        digit finds nothing either. So a policy in training that writes one loses no other query of
        its batch.
        """
        check_number("queries", len(body.queries), limits.max_queries)
        record = record_of(request.scope)
        record.field_names = {"num_candidates": "topk"}
        service.answering.check_room(batch=True)
        version = service.answering.version_for(record.request_id, None)
        deadline = service.answering.deadline_of(None)
        # Also where there are no queries, or such as nothing is looked up for.
        check_numbers(Ask("", deadline, num_candidates=body.topk), limits)
        asks = [
            Ask(query, deadline, num_candidates=body.topk or None, assigned=version)
            for query in body.queries
        ]
        problems: list[QueryProblem] = []
        num_found = 0

        async def work(
            number: int, ask: Ask, patient: bool
        ) -> list[ScoredDocument] | list[SearchDocument]:
            nonlocal num_found
            if not holds_words(ask.question):
                return list[SearchDocument]()
            try:
                check_length(ask.question, limits)
            except RequestError as error:
                problems.append(QueryProblem(query=number, detail=str(error)))
                return list[SearchDocument]()
            found = await service.answering.retrieve(ask, f"{record.request_id}.{number}", patient)
            passages, scores = found.retrieved.passages, found.retrieved.scores_NC[:, 0]
            num_found += len(passages)
            if num_found > _MAX_FOUND:
                raise RequestError.about(
                    "queries",
                    f"find more than {_MAX_FOUND:,} passages together; send fewer, or a smaller "
                    "topk",
                )
            if not body.return_scores:
                return [_document(passage) for passage in passages]
            return [
                ScoredDocument(document=_document(passage), score=float(score))
                for passage, score in zip(passages, scores, strict=True)
            ]

        async with service.answering.holding(version):
            result = await work_on_all(asks, work)
        record.version = version
        problems.sort(key=lambda problem: problem.query)
        return json_response(SearchResults(result=result, problems=problems or None))

    return router


async def _events(
    record: RequestRecord,
    first: Chosen | str | Answered,
    steps: AsyncGenerator[Chosen | str | Answered, None],
    explain: bool,
) -> AsyncGenerator[bytes, None]:
    try:
        yield _event_of(record, first, explain)
        async for step in steps:
            yield _event_of(record, step, explain)
    except Exception as error:  # noqa: BLE001 - the status has been sent; the client is told here
        yield event("error", problem_of(error, record.request_id))
    finally:
        await steps.aclose()


def _event_of(record: RequestRecord, step: Chosen | str | Answered, explain: bool) -> bytes:
    if isinstance(step, str):
        return event("token", {"text": step})
    if isinstance(step, Answered):
        note_outcome(record, step)
        return event("answer", answer_reply(step, explain))
    passages = [passage.model_dump() for passage in picked_passages(step)]
    head = {"request_id": record.request_id, "bundle_version": step.version}
    turns = [event("turn", turn) for turn in path_turns(step) or ()]
    return event("passages", {**head, "passages": passages}) + b"".join(turns)


def _ask(service: Service, body: AnswerOptions, question: str, assigned: str | None = None) -> Ask:
    return Ask(
        question,
        service.answering.deadline_of(body.timeout_s),
        body.num_selected,
        body.num_candidates,
        filters_of(body.filters),
        decoding_of(body.max_new_tokens, body.temperature, body.seed),
        body.version,
        assigned,
    )


def _retrieval(service: Service, body: RetrieveOptions, question: str) -> Ask:
    return Ask(
        question,
        service.answering.deadline_of(body.timeout_s),
        num_candidates=body.num_candidates,
        filters=filters_of(body.filters),
        version=body.version,
    )


def _document(passage: Passage) -> SearchDocument:
    # The first line is the title also where it is empty: clients split there.
    return SearchDocument(id=passage.id, contents=f"{passage.title}\n{passage.text}")
