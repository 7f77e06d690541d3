"""Answers a question with one bundle version: retrieval, selection, generation.

The order of one answer: room, version, caches, retrieve, select, generate; then the record of its
selection and the shadow's turn. All routes answer through here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from rlrag.data.feedback import SelectionEvent
from rlrag.errors import OverloadedError, RequestError
from rlrag.serving.caches import CallCache, Key
from rlrag.serving.feedback_log import FeedbackLog
from rlrag.serving.http.limits import Admission
from rlrag.serving.http.metrics import Metrics
from rlrag.serving.http.problems import DeadlineError
from rlrag.serving.questions import Ask, check_ask
from rlrag.serving.records import Retrieved, Routing, ServedPipeline, VersionDesk
from rlrag.serving.settings import ServeSettings
from rlrag.serving.stages import Chosen, Computed, answer_in_stages, last_of
from rlrag.serving.versions.shadow import ShadowRuns


@dataclass(frozen=True, slots=True)
class Answered:
    """A finished answer to one request."""

    request_id: str
    version: str
    computed: Computed
    cached: bool
    wait_ms: float
    total_ms: float

    @property
    def timings_ms(self) -> dict[str, float]:
        """Milliseconds by stage; what a cache answered took none."""
        stages = ("retrieve", "select", "generate")
        spent = {stage: 0.0 if self.cached else self.computed.times_ms[stage] for stage in stages}
        return {"wait": self.wait_ms, **spent, "total": self.total_ms}


@dataclass(frozen=True, slots=True)
class Found:
    """The candidates of one request."""

    request_id: str
    version: str
    retrieved: Retrieved
    cached: bool
    wait_ms: float
    retrieve_ms: float
    total_ms: float


class Answering:
    """The pipeline with its limits, caches, record and shadow.

    Args:
        pipeline: Retrieves, selects and generates.
        desk: Knows the versions.
        settings: Limits and sizes.
        metrics: Counts and times.
        feedback: Records selections; None records nothing.
    """

    def __init__(
        self,
        pipeline: ServedPipeline,
        desk: VersionDesk,
        settings: ServeSettings,
        metrics: Metrics,
        feedback: FeedbackLog | None,
    ) -> None:
        limits, sizes = settings.limits, settings.caches
        self._pipeline = pipeline
        self._desk = desk
        self._limits = limits
        self._metrics = metrics
        self._feedback = feedback
        self._room = Admission(limits.max_in_flight, limits.max_waiting, metrics)
        self._candidates: CallCache[Retrieved] = CallCache(
            sizes.candidates, sizes.max_mib * 2**20, lambda hit: metrics.lookup("candidates", hit)
        )
        self._answers: CallCache[Computed] = CallCache(
            sizes.answers, sizes.max_mib * 2**20, lambda hit: metrics.lookup("answers", hit)
        )
        self._epoch = -1
        self.shadow = ShadowRuns(
            self._compute, desk, limits.max_shadow_runs, limits.timeout_s, metrics
        )

    def check_ready(self) -> None:
        """Return when questions can be answered.

        Raises:
            OverloadedError: when no version is known yet, or a part has no replica that holds it.
        """
        version = self._desk.routing().active
        missing = self._desk.missing()
        if missing:
            raise OverloadedError(
                f"no {' and no '.join(missing)} has loaded version {version} yet; try again "
                "in a moment"
            )

    def check_room(self, batch: bool = False) -> None:
        """See `Admission.check`."""
        self._room.check(batch)

    def routing(self) -> Routing:
        """The newest routing; entries of versions that it no longer names leave the caches."""
        routing = self._desk.routing()
        if routing.epoch != self._epoch:
            self._epoch = routing.epoch
            for cache in (self._candidates, self._answers):
                cache.keep_versions(routing.versions)
        return routing

    def version_for(self, request_id: str, wanted: str | None) -> str:
        """The version that answers a request: the wanted one, or the one that routing says.

        Raises:
            RequestError: when the wanted one is not in use.
            OverloadedError: when no version is known yet.
        """
        routing = self.routing()
        if wanted is None:
            return routing.version_of(request_id)
        if wanted not in routing.versions:
            raise RequestError.about(
                "version", f"{wanted!r} is not in use; /v1/versions lists those that are"
            )
        return wanted

    @asynccontextmanager
    async def holding(self, version: str) -> AsyncIterator[None]:
        """Keep a version in use while the block runs."""
        self._desk.begin(version)
        try:
            yield
        finally:
            self._desk.end(version)

    def deadline_of(self, timeout_s: float | None) -> float:
        """The moment, on the event loop's clock, by which a request of this timeout must end."""
        longest = self._limits.timeout_s
        return asyncio.get_running_loop().time() + min(timeout_s or longest, longest)

    async def answer(self, ask: Ask, request_id: str, patient: bool = False) -> Answered:
        """Answer a question.

        Args:
            ask: The question and how it is to be answered.
            request_id: Decides between active version and canary; the answer's name in the record.
            patient: See `Admission.slot`.

        Raises:
            RequestError: the question or its options cannot be answered.
            PromptTooLongError: the question leaves no room in the prompt.
            OverloadedError: there is no room.
            DeadlineError: it took too long.
            GenerationError: the engine failed.
        """
        check_ask(ask, self._limits)
        began = time.perf_counter()
        async with (
            _until(ask.deadline),
            self._admitted(ask, request_id, patient) as version,
        ):
            entered = time.perf_counter()
            explore = self._explores()
            if ask.repeats and not explore:
                computed, cached = await self._compute(version, ask)
            else:
                computed, cached = await self._uncached(version, ask, explore), False
            answered = _answered(request_id, version, computed, cached, began, entered)
            self._note(ask, answered)
            return answered

    async def stream(
        self, ask: Ask, request_id: str
    ) -> AsyncGenerator[Chosen | str | Answered, None]:
        """Answer a question piece by piece: the selection, the text's pieces, the whole answer.

        Raises:
            RlragError: as `answer` does; before the first piece where nothing is known yet.
        """
        check_ask(ask, self._limits)
        began = time.perf_counter()
        async with AsyncExitStack() as stack:
            async with _until(ask.deadline):
                version = await stack.enter_async_context(self._admitted(ask, request_id, False))
            entered = time.perf_counter()
            explore = self._explores()
            keeps = ask.repeats and not explore
            computed = self._answers.find(_answer_key(version, ask)) if keeps else None
            cached = computed is not None
            if computed is not None:
                yield computed.chosen
                yield computed.text
            else:
                steps = self._steps(version, ask, explore, streamed=True)
                stack.push_async_callback(steps.aclose)
                while computed is None:
                    async with _until(ask.deadline):
                        step = await anext(steps)
                    if isinstance(step, Computed):
                        computed = step
                    else:
                        yield step
                if keeps:
                    self._answers.put(_answer_key(version, ask), computed)
            answered = _answered(request_id, version, computed, cached, began, entered)
            self._note(ask, answered)
            yield answered

    async def retrieve(self, ask: Ask, request_id: str, patient: bool = False) -> Found:
        """Find the candidates of a question; raises as `answer` does."""
        check_ask(ask, self._limits)
        began = time.perf_counter()
        async with (
            _until(ask.deadline),
            self._admitted(ask, request_id, patient) as version,
        ):
            entered = time.perf_counter()
            retrieved, cached = await self._retrieve(version, ask)
            ended = time.perf_counter()
            if not cached:
                self._metrics.stage("retrieve", ended - entered)
            return Found(
                request_id,
                version,
                retrieved,
                cached,
                wait_ms=1000 * (entered - began),
                retrieve_ms=0.0 if cached else 1000 * (ended - entered),
                total_ms=1000 * (ended - began),
            )

    async def close(self) -> None:
        """End what runs in the background, and write what waits to be written."""
        await self.shadow.close()
        if self._feedback is not None:
            await asyncio.to_thread(self._feedback.close)

    @asynccontextmanager
    async def _admitted(self, ask: Ask, request_id: str, patient: bool) -> AsyncIterator[str]:
        """Room for a question, and the version that answers it, held while the block runs."""
        async with self._room.slot(patient):
            version = ask.assigned or self.version_for(request_id, ask.version)
            async with self.holding(version):
                yield version

    def _explores(self) -> bool:
        return self._feedback is not None and self._feedback.draws_to_explore()

    async def _retrieve(self, version: str, ask: Ask) -> tuple[Retrieved, bool]:
        key: Key = (version, (ask.question, ask.num_candidates, ask.filters))
        return await self._candidates.get(
            key,
            lambda: self._pipeline.retrieve(version, ask.question, ask.num_candidates, ask.filters),
        )

    async def _compute(self, version: str, ask: Ask) -> tuple[Computed, bool]:
        """An answer that equal asks of the same version may share, and whether it was shared."""
        return await self._answers.get(
            _answer_key(version, ask), lambda: self._uncached(version, ask, explore=False)
        )

    async def _uncached(self, version: str, ask: Ask, explore: bool) -> Computed:
        return await last_of(self._steps(version, ask, explore, streamed=False))

    def _steps(
        self, version: str, ask: Ask, explore: bool, streamed: bool
    ) -> AsyncGenerator[Chosen | str | Computed, None]:
        ask = replace(ask, decoding=replace(ask.decoding, streamed=streamed))
        return answer_in_stages(
            self._pipeline, version, ask, explore, self._retrieve, self._metrics
        )

    def _note(self, ask: Ask, answered: Answered) -> None:
        """Count an answer, record its selection, and let the shadow answer as well."""
        self._metrics.stage("total", answered.total_ms / 1000)
        self._metrics.answered(answered.version)
        computed = answered.computed
        if self._feedback is not None:
            self._feedback.record_selection(_event_of(ask, answered))
        if ask.version is None and ask.repeats and not computed.chosen.picked.explored:
            self.shadow.offer(
                self.routing(),
                ask,
                answered.request_id,
                answered.version,
                computed,
                None if answered.cached else answered.total_ms - answered.wait_ms,
            )


def _answer_key(version: str, ask: Ask) -> Key:
    decides = (
        ask.question, ask.num_selected, ask.num_candidates, ask.filters, ask.decoding
    )  # fmt: skip
    return version, decides


def _answered(
    request_id: str,
    version: str,
    computed: Computed,
    cached: bool,
    began: float,
    entered: float,
) -> Answered:
    wait_ms, total_ms = 1000 * (entered - began), 1000 * (time.perf_counter() - began)
    return Answered(request_id, version, computed, cached, wait_ms, total_ms)


def _event_of(ask: Ask, answered: Answered) -> SelectionEvent:
    computed = answered.computed
    picked = computed.chosen.picked
    path = picked.path
    return SelectionEvent(
        request_id=answered.request_id,
        time_s=time.time(),
        version=answered.version,
        question=ask.question,
        candidate_ids=tuple(passage.id for passage in computed.chosen.candidates),
        actions=picked.actions,
        propensity_logp=picked.propensity_logp,
        explored=picked.explored,
        answer=computed.text,
        answer_logp=computed.logp,
        action_logps=None if path is None else path.action_logps,
        num_selected=None if path is None else path.num_selected,
    )


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """Cancel the block at a moment of the event loop's clock.

    Raises:
        DeadlineError: when the moment came.
    """
    bound = asyncio.timeout_at(deadline)
    try:
        async with bound:
            yield
    except TimeoutError as error:
        if not bound.expired():
            raise
        raise DeadlineError("the answer was not ready in time; use a longer timeout_s") from error
