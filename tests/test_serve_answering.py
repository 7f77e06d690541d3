"""One version from retrieval to the last token; caches, deadlines and the record."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from serve_stand_ins import Parts, Served

from rlrag.data.feedback import FeedbackStore, read_feedback
from rlrag.errors import GenerationError, OverloadedError, PromptTooLongError, RequestError
from rlrag.serving.answering import Answered
from rlrag.serving.http.problems import DeadlineError
from rlrag.serving.questions import decoding_of
from rlrag.serving.records import Decoding, Filters, Routing
from rlrag.serving.stages import Chosen


def test_an_answer_names_its_passages_in_order_and_its_times() -> None:
    async def run() -> None:
        parts = Parts()
        answered = await parts.answer("what?")  # 5 characters: the ranking begins with passage 5
        assert answered.computed.text == "v1 says 25. 36."
        assert [p.id for p in answered.computed.chosen.passages] == ["p5", "p6"]
        assert answered.computed.logp == -2.0
        assert answered.computed.num_tokens == 4
        times = answered.timings_ms
        assert times["total"] >= times["retrieve"] + times["select"] + times["generate"]
        assert list(times) == ["wait", "retrieve", "select", "generate", "total"]
        assert all(value >= 0 for value in times.values())
        assert parts.desk.in_flight["v1"] == 0
        assert parts.desk.begun["v1"] == 1

    asyncio.run(run())


def test_a_stream_brings_the_selection_then_words_that_add_up_to_the_answer() -> None:
    async def run() -> None:
        parts = Parts()
        steps = [step async for step in parts.answering.stream(parts.ask(), "r1")]
        assert isinstance(steps[0], Chosen)
        assert isinstance(steps[-1], Answered)
        assert "".join(step for step in steps if isinstance(step, str)) == steps[-1].computed.text
        assert steps[1:-1] == ["v1 says", " 25.", " 36."]
        again = [step async for step in parts.answering.stream(parts.ask(), "r2")]
        assert again[1:-1] == ["v1 says 25. 36."]
        assert isinstance(again[-1], Answered)
        assert again[-1].cached
        assert parts.pipeline.calls["generate"] == 1

    asyncio.run(run())


def test_pieces_are_asked_for_where_a_stream_wants_them_and_an_answer_whole_otherwise() -> None:
    async def run() -> None:
        parts = Parts()
        first = await parts.answer("one?")
        steps = [step async for step in parts.answering.stream(parts.ask("two?"), "r1")]
        assert parts.pipeline.streamed == [False, True]
        # How it was sent does not matter to who asks again.
        again = [step async for step in parts.answering.stream(parts.ask("one?"), "r2")]
        second = await parts.answer("two?")
        assert isinstance(steps[-1], Answered)
        assert isinstance(again[-1], Answered)
        assert again[-1].computed is first.computed
        assert second.computed is steps[-1].computed
        assert len(parts.pipeline.streamed) == 2

    asyncio.run(run())


def test_a_repeated_greedy_question_is_answered_from_memory() -> None:
    async def run() -> None:
        parts = Parts()
        first, second = await parts.answer(), await parts.answer()
        assert (first.cached, second.cached) == (False, True)
        assert second.computed is first.computed
        stages = ("retrieve", "select", "generate")
        assert [second.timings_ms[stage] for stage in stages] == [0, 0, 0]
        assert parts.pipeline.calls["generate"] == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    "changed",
    [
        {"num_selected": 1},
        {"num_candidates": 4},
        {"filters": Filters(exclude_ids=("p0",))},
        {"decoding": Decoding(max_new_tokens=3)},
        {"decoding": Decoding(seed=1)},
    ],
)
def test_whatever_decides_an_answer_is_part_of_its_key(changed: dict[str, object]) -> None:
    async def run() -> None:
        parts = Parts()
        await parts.answer()
        assert not (await parts.answer(**changed)).cached

    asyncio.run(run())


def test_sampled_answers_are_not_kept_but_their_candidates_are() -> None:
    async def run() -> None:
        parts = Parts()
        for _ in range(2):
            answered = await parts.answer(decoding=decoding_of(None, 0.7, None))
            assert not answered.cached
        assert parts.pipeline.calls == {"retrieve": 1, "select": 2, "generate": 2}

    asyncio.run(run())


def test_sampling_takes_a_fresh_seed_unless_one_is_given() -> None:
    seeds = {decoding_of(None, 0.7, None).seed for _ in range(8)}
    assert len(seeds) > 1
    assert decoding_of(None, 0.7, 5).seed == 5
    assert decoding_of(None, None, None).seed == 0


def test_equal_questions_at_one_time_are_computed_once() -> None:
    async def run() -> None:
        parts = Parts()
        found = await asyncio.gather(*(parts.answer() for _ in range(5)))
        assert [answered.cached for answered in found] == [False, True, True, True, True]
        assert parts.pipeline.calls == {"retrieve": 1, "select": 1, "generate": 1}

    asyncio.run(run())


def test_one_version_answers_a_request_whatever_happens_meanwhile() -> None:
    async def run() -> None:
        parts = Parts()
        parts.pipeline.gate.clear()
        work = asyncio.ensure_future(parts.answer())
        async with asyncio.timeout(5):
            while not parts.pipeline.open_engines:
                await asyncio.sleep(0)
        parts.desk.now = Routing("v2", epoch=1)
        parts.pipeline.gate.set()
        assert (await work).computed.text.startswith("v1 says")
        assert {version for _, version in parts.pipeline.versions} == {"v1"}
        assert (await parts.answer()).computed.text.startswith("v2 says")
        assert parts.desk.begun == {"v1": 1, "v2": 1}
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())


def test_swaps_under_load_mix_no_versions() -> None:
    async def run() -> None:
        parts = Parts(caches__answers=4)

        async def client(number: int) -> None:
            for turn in range(10):
                answered = await parts.answering.answer(
                    parts.ask(f"number {turn % 3}?"), f"{number}-{turn}"
                )
                assert answered.computed.text.startswith(f"{answered.version} says")
                assert answered.computed.chosen.version == answered.version

        async def swaps() -> None:
            for epoch in range(1, 21):
                parts.desk.now = Routing(f"v{epoch}", epoch=epoch)
                await asyncio.sleep(0)

        await asyncio.gather(swaps(), *(client(number) for number in range(8)))
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())


def test_a_canary_takes_its_share_and_equal_ids_stay_with_one_version() -> None:
    routing = Routing("v1", canary="v2", canary_share=0.25)
    chosen = [routing.version_of(f"request-{n}") for n in range(4000)]
    assert math.isclose(chosen.count("v2") / 4000, 0.25, abs_tol=0.03)
    assert chosen == [routing.version_of(f"request-{n}") for n in range(4000)]


def test_a_wanted_version_must_be_in_use() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v3"))
        assert (await parts.answer(version="v3")).version == "v3"
        with pytest.raises(RequestError, match="version 'v9' is not in use"):
            await parts.answer(version="v9")
        parts.desk.now = None
        with pytest.raises(OverloadedError):
            await parts.answer()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("question", "fields", "message"),
    [
        ("  ?! ", {}, "no letter and no digit"),
        ("x" * 4001, {}, "4001 characters, more than the 4000"),
        ("q", {"num_candidates": 101}, "num_candidates is 101, more than the 100"),
        ("q", {"num_selected": 101}, "num_selected is 101"),
        ("q", {"decoding": Decoding(max_new_tokens=1025)}, "max_new_tokens is 1025"),
        ("q", {"num_selected": 6}, "num_selected is 6 of 5"),
        ("q", {"filters": Filters(ids=("p1",))}, "1 passages are left"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(
    question: str, fields: dict[str, object], message: str
) -> None:
    async def run() -> None:
        parts = Parts()
        with pytest.raises(RequestError, match=message):
            await parts.answer(question, **fields)
        assert not parts.pipeline.calls["generate"]
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())


def test_errors_of_the_parts_reach_the_caller_unchanged() -> None:
    async def run() -> None:
        parts = Parts()
        with pytest.raises(PromptTooLongError):
            await parts.answer("long " * 100)
        parts.pipeline.failure = GenerationError("the engine died")
        with pytest.raises(GenerationError, match="died"):
            await parts.answer()
        parts.pipeline.failure = None
        assert not (await parts.answer()).cached

    asyncio.run(run())


@pytest.mark.parametrize("place", ["engine", "queue", "stream"])
def test_a_deadline_ends_the_work_wherever_it_stands(place: str) -> None:
    async def run() -> None:
        parts = Parts(limits__max_in_flight=1)
        parts.pipeline.gate.clear()
        if place == "queue":
            other = asyncio.ensure_future(parts.answer("other?"))
            await asyncio.sleep(0)
        ask = parts.ask(timeout_s=0.02)

        async def work() -> None:
            if place == "stream":
                assert [step async for step in parts.answering.stream(ask, "r1")] == []
            else:
                await parts.answering.answer(ask, "r1")

        with pytest.raises(DeadlineError):
            await work()
        parts.pipeline.gate.set()
        if place == "queue":
            await other
        assert parts.pipeline.open_engines == 0
        assert not any(parts.desk.in_flight.values())
        assert (await parts.answer("next?")).computed.text

    asyncio.run(run())


def test_a_request_may_ask_for_less_time_than_the_service_allows_but_not_for_more() -> None:
    async def run() -> None:
        parts = Parts(limits__timeout_s=10)
        now = asyncio.get_running_loop().time()
        for asked, expected in ((None, 10), (3.0, 3), (99.0, 10)):
            assert math.isclose(parts.answering.deadline_of(asked) - now, expected, abs_tol=0.5)

    asyncio.run(run())


def test_closing_a_stream_early_closes_the_engine() -> None:
    async def run() -> None:
        parts = Parts()
        stream = parts.answering.stream(parts.ask(), "r1")
        await anext(stream)
        await anext(stream)
        assert parts.pipeline.open_engines == 1
        await stream.aclose()
        assert parts.pipeline.open_engines == 0
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())


def test_selections_are_recorded_with_their_propensities(tmp_path: Path) -> None:
    async def run() -> None:
        store = FeedbackStore(tmp_path / "feedback.db")
        parts = Parts(store=store, explore_share=1.0)
        explored = await parts.answering.answer(parts.ask("what?"), "r1")
        assert not explored.cached
        again = await parts.answering.answer(parts.ask("what?"), "r2")
        assert not again.cached
        assert parts.log is not None
        assert await parts.log.record_feedback("r1", None, None, "up")
        assert not await parts.log.record_feedback("r9", None, None, "up")
        parts.log.close()

    asyncio.run(run())
    [row] = [row for row in read_feedback(tmp_path / "feedback.db") if row.reward is not None]
    event = row.event
    assert (event.request_id, event.version, event.question) == ("r1", "v1", "what?")
    assert event.candidate_ids == ("p5", "p6", "p7", "p0", "p1")
    assert event.actions == (4, 3)
    assert event.explored
    assert event.propensity_logp == -1.5
    assert event.answer == "v1 says 1. 0."


def test_answers_from_memory_are_recorded_under_their_own_ids(tmp_path: Path) -> None:
    async def run() -> None:
        parts = Parts(store=FeedbackStore(tmp_path / "feedback.db"))
        for name in ("r1", "r2"):
            await parts.answering.answer(parts.ask(), name)
        assert parts.log is not None
        assert await parts.log.record_feedback("r2", 0.5, None, None)
        await parts.answering.close()

    asyncio.run(run())


def test_a_record_that_fails_spoils_no_answer() -> None:
    class Broken:
        def record_selection(self, event: object) -> bool:
            raise OSError("the disk is full")

        def close(self) -> None:
            pass

    async def run() -> None:
        parts = Parts(store=Broken())  # type: ignore[arg-type]
        assert (await parts.answer()).computed.text
        await parts.answering.close()
        await asyncio.sleep(0)
        assert b"rlrag_selections_unlogged_total 1.0" in parts.metrics.text(None)

    asyncio.run(run())


def test_a_batch_holds_one_version_and_answers_at_most_as_many_at_once_as_there_is_room() -> None:
    async def run() -> None:
        served = Served(limits__max_in_flight=3, limits__max_waiting=0, caches__answers=0)
        questions = [f"number {n}?" for n in range(40)]
        work = asyncio.ensure_future(
            served.client.post("/v1/answers", json={"questions": questions})
        )
        async with asyncio.timeout(5):
            while not served.pipeline.open_engines:
                await asyncio.sleep(0)
        served.desk.now = Routing("v2", epoch=1)
        reply = await work
        assert reply.status_code == 200
        answers = reply.json()["answers"]
        assert [one["answer"]["bundle_version"] for one in answers] == ["v1"] * 40
        assert served.pipeline.most_engines == 3
        assert not any(served.desk.in_flight.values())

    asyncio.run(run())
