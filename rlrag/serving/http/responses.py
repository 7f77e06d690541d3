"""Answers as HTTP responses: complete, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rlrag.records import Passage
from rlrag.serving.answering import Answered, Found
from rlrag.serving.http.replies import (
    Answer,
    Candidates,
    FoundPassage,
    PathPassage,
    PathTurn,
    PickedPassage,
    RetrieveTimings,
    Timings,
)
from rlrag.serving.stages import Chosen

_SEND_TIMEOUT_S = 10.0


def json_response(reply: BaseModel, status: int = 200) -> Response:
    """A reply as JSON."""
    return Response(reply.model_dump_json(), status, media_type="application/json")


def picked_passages(chosen: Chosen) -> list[PickedPassage]:
    """The picked passages, in order."""
    picked = chosen.picked
    scores = (*chosen.scores, *[None] * len(picked.further))
    return [
        PickedPassage(
            id=passage.id,
            title=passage.title,
            text=passage.text,
            retriever_score=scores[position],
            selection_prob=prob,
        )
        for passage, position, prob in zip(
            chosen.passages, picked.positions, picked.probs, strict=True
        )
    ]


def path_turns(chosen: Chosen) -> list[PathTurn] | None:
    """The turns of the path to the picked passages; None where there is no path to tell."""
    path = chosen.picked.path
    if path is None or not path.turns:
        return None
    title_of = {p.id: p.title for p in chosen.candidates + chosen.picked.further}
    passage_in = {found.slot: found.passage_id for turn in path.turns for found in turn.found}
    return [
        PathTurn(
            action=turn.action,
            passage_id=turn.passage_id,
            title=None if turn.passage_id is None else title_of[turn.passage_id],
            query=turn.query,
            writer=None if turn.writer is None else path.writers[turn.writer],
            found=[
                PathPassage(
                    id=found.passage_id,
                    title=title_of[found.passage_id],
                    by=found.by,
                    source=None if found.source is None else passage_in[found.source],
                    edge=found.edge,
                )
                for found in turn.found
            ],
            num_left_out=turn.num_left_out,
        )
        for turn in path.turns
    ]


def answer_reply(answered: Answered, explain: bool) -> Answer:
    """A finished answer; with `explain` all candidates beside it."""
    computed = answered.computed
    chosen = computed.chosen
    candidates = None
    if explain:
        pairs = zip(chosen.candidates, chosen.scores, strict=True)
        candidates = [FoundPassage(**_passage(passage, score)) for passage, score in pairs]
    return Answer(
        request_id=answered.request_id,
        answer=computed.text,
        answer_logp=computed.logp,
        num_answer_tokens=computed.num_tokens,
        num_prompt_tokens=computed.num_prompt_tokens,
        num_passages=computed.num_passages,
        num_cut_tokens=computed.num_cut_tokens,
        passages=picked_passages(chosen),
        path=path_turns(chosen),
        bundle_version=answered.version,
        timings_ms=Timings(**answered.timings_ms),
        cached=answered.cached,
        candidates=candidates,
    )


def candidates_reply(found: Found) -> Candidates:
    """The candidates of a question."""
    retrieved = found.retrieved
    return Candidates(
        request_id=found.request_id,
        passages=[
            FoundPassage(**_passage(passage, float(score)))
            for passage, score in zip(retrieved.passages, retrieved.scores_NC[:, 0], strict=True)
        ],
        bundle_version=found.version,
        timings_ms=RetrieveTimings(
            wait=found.wait_ms, retrieve=found.retrieve_ms, total=found.total_ms
        ),
        cached=found.cached,
    )


class EventStream(Response):
    """Server-sent events as they come.

    They are sent in the request's own task, so that cancelling it closes `events`; a client that
    takes nothing for a while is given up.

    Args:
        events: The events' bytes; closed when the response ends in any way.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for event in self._events:
                async with asyncio.timeout(_SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(name: str | None, data: BaseModel | dict[str, Any] | str) -> bytes:
    r"""One server-sent event.

    Example:
        >>> event("token", {"text": "a\nb"})
        b'event: token\ndata: {"text": "a\\nb"}\n\n'
        >>> event(None, "[DONE]")
        b'data: [DONE]\n\n'
    """
    if isinstance(data, BaseModel):
        text = data.model_dump_json()
    else:
        text = data if isinstance(data, str) else json.dumps(data)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


def _passage(passage: Passage, score: float) -> dict[str, Any]:
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "retriever_score": score,
    }
