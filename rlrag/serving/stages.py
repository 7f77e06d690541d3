"""Events of a streamed answer: the selection, parts of the text, the complete answer.

Every stage is timed, and each runs only when its consumer asks for what comes next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlrag.errors import GenerationError
from rlrag.records import Passage
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.questions import Ask
from rlrag.serving.records import AnswerPiece, Picked, Retrieved, ServedPipeline

_CLOSE_TIMEOUT_S = 5.0

Retrieve = Callable[[str, Ask], Awaitable[tuple[Retrieved, bool]]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The candidates with their ranking scores, and what a version picked of them.

    Where an episode looked further, some picks may be none of the candidates; see `Picked`.
    """

    version: str
    candidates: tuple[Passage, ...]
    scores: tuple[float, ...]
    picked: Picked

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The picked passages, in order."""
        return self.picked.passages(self.candidates)


@dataclass(frozen=True, slots=True)
class Computed:
    """An answer that was computed, apart from the request that it was computed for.

    Its prompt shows `num_passages` of the picked ones, without `num_cut_tokens` of their tokens.
    """

    chosen: Chosen
    text: str
    logp: float | None
    num_tokens: int
    num_prompt_tokens: int
    num_passages: int
    num_cut_tokens: int
    times_ms: Mapping[str, float]


async def answer_in_stages(
    pipeline: ServedPipeline,
    version: str,
    ask: Ask,
    explore: bool,
    retrieve: Retrieve,
    metrics: Metrics,
) -> AsyncGenerator[Chosen | str | Computed, None]:
    """Retrieve, select and generate with one version.

    Closing the generator, or cancelling it, closes that of the engine.

    Args:
        pipeline: Selects and generates.
        version: The version that answers.
        ask: The question.
        explore: Draw the selection from the policy.
        retrieve: Finds candidates, and tells whether a cache had them.
        metrics: Takes the stages' times and the tokens.

    Raises:
        GenerationError: when the engine ends without finishing the answer; else as
            `ServedPipeline` does.
    """
    times_ms: dict[str, float] = {}

    def end_stage(name: str, began: float) -> float:
        now = time.perf_counter()
        metrics.stage(name, now - began)
        times_ms[name] = 1000 * (now - began)
        return now

    began = time.perf_counter()
    retrieved, cached = await retrieve(version, ask)
    if cached:
        times_ms["retrieve"], began = 0.0, time.perf_counter()
    else:
        began = end_stage("retrieve", began)
    picked = await pipeline.select(version, ask.question, retrieved, ask.num_selected, explore)
    began = end_stage("select", began)
    scores = tuple(float(score) for score in retrieved.scores_NC[:, 0])
    chosen = Chosen(version, retrieved.passages, scores, picked)
    yield chosen

    text, spaces = "", ""
    last: AnswerPiece | None = None
    pieces = pipeline.generate(version, ask.question, chosen.passages, ask.decoding)
    async with _closing(pieces):
        async for last in pieces:
            # White space goes out only between words, so that the pieces add up to the answer.
            added = spaces + last.text if text else last.text.lstrip()
            words = added.rstrip()
            spaces = added[len(words) :]
            if words:
                text += words
                yield words
    if last is None or not last.finished:
        raise GenerationError(f"the generator of version {version} ended during an answer")
    end_stage("generate", began)
    computed = Computed(
        chosen,
        text,
        last.logp,
        last.num_tokens,
        last.num_prompt_tokens,
        last.num_passages,
        last.num_cut_tokens,
        times_ms,
    )
    metrics.computed(last.num_prompt_tokens, last.num_tokens)
    metrics.prompted(last.num_passages, len(chosen.passages), last.num_cut_tokens)
    yield computed


async def last_of(steps: AsyncGenerator[Chosen | str | Computed, None]) -> Computed:
    """The whole answer, without its stages."""
    async with _closing(steps):
        async for step in steps:
            if isinstance(step, Computed):
                return step
    raise GenerationError("an answer ended before it was complete")


@asynccontextmanager
async def _closing(steps: AsyncIterator[object]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if isinstance(steps, AsyncGenerator):
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await steps.aclose()
