"""The shadow's answers and how they are compared."""

from __future__ import annotations

import asyncio

from serve_stand_ins import Parts

from rlrag.errors import GenerationError
from rlrag.serving.questions import decoding_of
from rlrag.serving.records import Routing


def test_the_shadow_answers_the_same_questions_and_is_compared() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v2"))
        shadow = parts.answering.shadow
        for question in ("what?", "who?", "what?"):
            answered = await parts.answer(question)
            assert answered.version == "v1"
            await shadow.settle()
        report = shadow.report(parts.desk.routing())
        assert (report.active, report.shadow) == ("v1", "v2")
        assert (report.num_compared, report.num_failed, report.num_dropped) == (3, 0, 0)
        # Every answer begins with its version's name, and all pick alike.
        assert (report.equal_answers, report.equal_selections) == (0.0, 1.0)
        assert report.active_mean_ms is not None
        assert report.shadow_mean_ms is not None
        newest = report.differences[0]
        assert newest.active_answer == "v1 says 25. 36."
        assert newest.shadow_answer == "v2 says 25. 36."
        assert newest.active_passages == newest.shadow_passages == ["p5", "p6"]
        assert parts.desk.begun == {"v1": 3, "v2": 3}
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())


def test_the_shadow_leaves_out_what_chance_decides_and_what_was_asked_of_one_version() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", canary="v3", canary_share=1.0, shadow="v2"))
        await parts.answer()  # the canary's
        parts.desk.now = Routing("v1", shadow="v2", epoch=1)
        await parts.answer(decoding=decoding_of(None, 1.0, None))
        await parts.answer(version="v1")
        await parts.answering.shadow.settle()
        assert parts.answering.shadow.report(parts.desk.routing()).num_compared == 0

    asyncio.run(run())


def test_too_many_shadow_runs_are_dropped_and_failed_ones_counted() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v2"), limits__max_shadow_runs=1)
        for question in ("what?", "who?"):
            await parts.answer(question)
        shadow = parts.answering.shadow
        await shadow.settle()
        parts.desk.now = Routing("v1", shadow="v2", epoch=2)
        report = shadow.report(parts.desk.routing())
        assert (report.num_compared, report.num_dropped) == (1, 1)
        await parts.answer("why?")
        parts.pipeline.failure = GenerationError("the shadow's engine died")
        await shadow.settle()
        assert shadow.report(parts.desk.routing()).num_failed == 1
        assert parts.desk.in_flight["v2"] == 0

    asyncio.run(run())


def test_the_comparison_begins_anew_with_a_new_shadow_and_stays_when_it_ends() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v2"))
        shadow = parts.answering.shadow
        assert shadow.report(Routing("v1")).shadow is None
        await parts.answer()
        await shadow.settle()
        assert shadow.report(Routing("v1")).num_compared == 1
        assert shadow.report(Routing("v1", shadow="v3")).num_compared == 0

    asyncio.run(run())


def test_only_the_last_fifty_differences_are_kept() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v2"))
        for number in range(60):
            await parts.answering.answer(parts.ask(f"number {number}?"), f"r{number}")
            await parts.answering.shadow.settle()
        differences = parts.answering.shadow.report(parts.desk.routing()).differences
        assert [one.request_id for one in differences] == [f"r{n}" for n in range(59, 9, -1)]

    asyncio.run(run())


def test_a_shadow_run_ends_with_the_service() -> None:
    async def run() -> None:
        parts = Parts(Routing("v1", shadow="v2"))
        await parts.answer()
        parts.pipeline.gate.clear()
        await asyncio.sleep(0)
        await parts.answering.close()
        assert parts.pipeline.open_engines == 0
        assert not any(parts.desk.in_flight.values())

    asyncio.run(run())
