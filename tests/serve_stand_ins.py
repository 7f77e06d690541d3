"""A pipeline without models and a desk without replicas, behind the service's protocols."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import numpy as np
from fastapi import FastAPI

from rlrag.data.feedback import FeedbackStore
from rlrag.errors import CheckpointError, OverloadedError, PromptTooLongError, RequestError
from rlrag.records import Passage
from rlrag.serving.answering import Answered, Answering
from rlrag.serving.feedback_log import FeedbackLog
from rlrag.serving.http.api import create_api
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.questions import Ask
from rlrag.serving.records import AnswerPiece, Decoding, Filters, Picked, Retrieved, Routing
from rlrag.serving.settings import ServeSettings, parse_settings

PASSAGES = tuple(
    Passage(f"p{n}", f"Title {n}", f"The value of number {n} is {n * n}.") for n in range(8)
)
NUM_CANDIDATES, NUM_SELECTED = 5, 2
LONGEST_PROMPT = 300


class NumberPipeline:
    """Ranks passages by number, turned by the question's length; answers with the values picked.

    Versions differ in the first word of their answers. `gate` holds answers back while it is
    cleared; `calls` counts what was asked of each part, `open_engines` the answers being decoded,
    and `streamed` tells of each answer whether its pieces were wanted as they come. Where
    `num_cut_tokens` is set, a prompt lacks so many tokens and shows nothing of the last passage.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: Counter[str] = Counter()
        self.versions: list[tuple[str, str]] = []
        self.streamed: list[bool] = []
        self.num_cut_tokens = 0
        self.open_engines = 0
        self.most_engines = 0
        self.failure: Exception | None = None

    async def retrieve(
        self, version: str, question: str, num_candidates: int | None, filters: Filters
    ) -> Retrieved:
        self._count("retrieve", version)
        number = num_candidates or NUM_CANDIDATES
        allowed = [p for p in PASSAGES if _passes(p, filters)]
        if number > len(allowed):
            raise RequestError(f"{len(allowed)} passages are left, fewer than {number}")
        turn = len(question) % len(allowed)
        found = (allowed[turn:] + allowed[:turn])[:number]
        scores = np.linspace(1, 0, number, dtype=np.float32)[:, None]
        await asyncio.sleep(0)
        return Retrieved(tuple(found), scores, np.zeros(0), np.zeros((number, 0)))

    async def select(
        self,
        version: str,
        question: str,
        retrieved: Retrieved,
        num_selected: int | None,
        explore: bool,
    ) -> Picked:
        self._count("select", version)
        number = num_selected or NUM_SELECTED
        if number > len(retrieved.passages):
            raise RequestError(f"num_selected is {number} of {len(retrieved.passages)} candidates")
        order = tuple(range(len(retrieved.passages)))
        picked = order[::-1][:number] if explore else order[:number]
        return Picked(picked, (0.5,) * number, picked, -1.5 if explore else 0.0, explore)

    async def generate(
        self, version: str, question: str, passages: tuple[Passage, ...], decoding: Decoding
    ) -> AsyncIterator[AnswerPiece]:
        self._count("generate", version)
        self.streamed.append(decoding.streamed)
        if len(question) > LONGEST_PROMPT:
            raise PromptTooLongError(f"the question has {len(question)} characters")
        self.open_engines += 1
        self.most_engines = max(self.most_engines, self.open_engines)
        try:
            words = [f" {version} says", *(f" {p.text.split()[-1]}" for p in passages), "\n"]
            num_shown = len(passages) - (self.num_cut_tokens > 0)
            for at, word in enumerate(words, start=1):
                await self.gate.wait()
                await asyncio.sleep(0)
                if self.failure is not None and at == 2:
                    raise self.failure
                yield AnswerPiece(
                    text=word,
                    logp=-0.5 * at,
                    num_tokens=at,
                    num_prompt_tokens=20 + len(question),
                    num_passages=num_shown,
                    num_cut_tokens=self.num_cut_tokens,
                    finished=at == len(words),
                )
        finally:
            self.open_engines -= 1

    def _count(self, part: str, version: str) -> None:
        self.calls[part] += 1
        self.versions.append((part, version))


class Desk:
    """Versions in memory; a path that begins with `bad` is a damaged bundle."""

    def __init__(self, routing: Routing | None = None) -> None:
        self.now = routing
        self.gone: tuple[str, ...] = ()
        self.changed: str | None = None
        self.in_flight: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()

    def routing(self) -> Routing:
        if self.now is None:
            raise OverloadedError("no version is known yet; try again in a moment")
        return self.now

    def missing(self) -> tuple[str, ...]:
        return self.gone

    def bundle_path(self, version: str) -> str:
        return f"/bundles/{version}"

    async def load(self, path: str, role: str, share: float) -> str:
        if path.startswith("bad"):
            raise CheckpointError(f"{path}: index.bin does not have its recorded hash")
        version = path.rpartition("/")[2].encode().hex()[:12] or "00"
        changes: dict[str, object] = {role: version}
        if role == "canary":
            changes["canary_share"] = share
        self._change(**changes)
        return version

    async def drop(self, role: str) -> None:
        self._change(**{role: None})

    async def changed_corpus(self, version: str) -> str | None:
        return self.changed

    def begin(self, version: str) -> None:
        self.in_flight[version] += 1
        self.begun[version] += 1

    def end(self, version: str) -> None:
        self.in_flight[version] -= 1

    def _change(self, **changes: object) -> None:
        routing = self.routing()
        self.now = replace(routing, epoch=routing.epoch + 1, **changes)  # type: ignore[arg-type]


def settings_of(**arguments: object) -> ServeSettings:
    """Settings by their dotted names, with `__` for the dot."""
    named = {name.replace("__", "."): value for name, value in arguments.items()}
    return parse_settings({"bundle": "b", **named})


class Served:
    """An application on stand-ins, with a client that calls it in this process."""

    def __init__(
        self,
        routing: Routing | None = None,
        store: FeedbackStore | None = None,
        pipeline: NumberPipeline | None = None,
        **arguments: object,
    ) -> None:
        self.pipeline = pipeline or NumberPipeline()
        self.desk = Desk(routing or Routing("v1"))
        self.app: FastAPI = create_api(
            self.pipeline, self.desk, settings_of(**arguments), feedback=store
        )
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://localhost",
        )

    async def ask(self, question: str = "what is it?", **fields: object) -> httpx.Response:
        return await self.client.post("/v1/answer", json={"question": question, **fields})

    async def settled(self) -> None:
        """Wait until nothing is under way, for at most a few seconds."""
        async with asyncio.timeout(5):
            while self.pipeline.open_engines or any(self.desk.in_flight.values()):
                await asyncio.sleep(0.001)


class Parts:
    """An `Answering` with the stand-ins that it works on."""

    def __init__(
        self,
        routing: Routing | None = None,
        store: FeedbackStore | None = None,
        explore_share: float = 0.0,
        **arguments: object,
    ) -> None:
        self.pipeline, self.desk, self.metrics = NumberPipeline(), Desk(routing), Metrics()
        if routing is None:
            self.desk.now = Routing("v1")
        self.log = FeedbackLog(store, explore_share, self.metrics) if store else None
        self.answering = Answering(
            self.pipeline, self.desk, settings_of(**arguments), self.metrics, self.log
        )

    def ask(self, question: str = "what?", timeout_s: float = 5.0, **fields: object) -> Ask:
        deadline = self.answering.deadline_of(timeout_s)
        return Ask(question, deadline, **fields)  # type: ignore[arg-type]

    async def answer(self, question: str = "what?", **fields: object) -> Answered:
        return await self.answering.answer(self.ask(question, **fields), "r1")


def _passes(passage: Passage, filters: Filters) -> bool:
    return (
        (not filters.ids or passage.id in filters.ids)
        and passage.id not in filters.exclude_ids
        and filters.title_contains.lower() in passage.title.lower()
    )
