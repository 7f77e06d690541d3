"""A new bundle takes its role only after it was loaded everywhere and answers as recorded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from serve_bundles import make_bundle

from rlrag.bundle import add_evaluation
from rlrag.bundle_files import Evaluated, GoldenQuestion, read_bundle
from rlrag.errors import CheckpointError, RequestError
from rlrag.records import Passage
from rlrag.serving.records import AnswerPiece, Decoding, Filters, Picked, Retrieved
from rlrag.serving.versions.director import Bounds, Director
from rlrag.serving.versions.registry import PARTS, Report

GOLDEN = tuple(
    GoldenQuestion(f"q{n}", f"question {n}", f"answer to question {n}", ("p1", "p0"), -1.0)
    for n in range(10)
)


class EchoPipeline:
    """Picks the second and the first passage and answers with the question."""

    def __init__(self, wrong: tuple[str, ...] = (), picks: tuple[int, ...] = (1, 0)) -> None:
        self._wrong = wrong
        self._picks = picks

    async def retrieve(self, version, question, num_candidates, filters: Filters) -> Retrieved:
        passages = tuple(Passage(f"p{n}", "", "text") for n in range(3))
        return Retrieved(passages, np.zeros((3, 1)), np.zeros(0), np.zeros((3, 0)))

    async def select(self, version, question, retrieved, num_selected, explore) -> Picked:
        return Picked(self._picks, (0.5, 0.5), self._picks, 0.0, False)

    async def generate(
        self, version, question, passages, decoding: Decoding
    ) -> AsyncIterator[AnswerPiece]:
        text = "something else" if question in self._wrong else f"answer to {question}"
        yield AnswerPiece(text[:4], -0.5, 1, 9, 1, 0, False)
        yield AnswerPiece(text[4:] + " ", -1.0, 2, 9, 1, 0, True)


@pytest.fixture(scope="module")
def bundles(openrag_files, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return tuple(
        make_bundle(folder / name, openrag_files, folder / "cache", seed)
        for seed, name in enumerate(("first", "second"), 1)
    )


def director(bundles, tmp_path, pipeline=None, start_timeout_s=20.0) -> Director:
    return Director(str(bundles[0]), tmp_path, Bounds(start_timeout_s), pipeline or EchoPipeline())


async def replicas(director: Director, failing: str | None = None) -> None:
    """Parts that load whatever they are told."""
    loaded: tuple[str, ...] = ()
    proposal = ""
    while True:
        for part in PARTS:
            failed = dict.fromkeys(loaded, "no such file") if part == failing else {}
            held = () if failed else loaded
            wanted = director.hear(Report(f"{part}-1", part, held, failed, proposal))
        loaded, proposal = tuple(wanted.bundles), wanted.proposal
        await asyncio.sleep(0.02)


def run(director: Director, path: Path, role="active", share=0.0, failing=None):
    async def scenario():
        parts = asyncio.create_task(replicas(director, failing))
        try:
            return await director.load(str(path), role, share)
        finally:
            parts.cancel()

    return asyncio.run(scenario())


def test_a_bundle_that_is_loaded_everywhere_becomes_active(bundles, tmp_path):
    found = director(bundles, tmp_path)
    routing = run(found, bundles[1])
    assert routing.active == read_bundle(bundles[1]).version
    assert routing.epoch == 1


def test_a_canary_needs_a_share_and_another_version(bundles, tmp_path):
    found = director(bundles, tmp_path)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(RequestError, match="above 0 and at most 1"):
            run(found, bundles[1], "canary", share)
    with pytest.raises(RequestError, match="active already"):
        run(found, bundles[0], "canary", 0.5)
    with pytest.raises(RequestError, match="must be one of active, canary, shadow"):
        run(found, bundles[1], "boss", 0.5)
    assert run(found, bundles[1], "canary", 0.5).canary == read_bundle(bundles[1]).version
    with pytest.raises(RequestError, match="cannot be ended"):
        found.drop("active")
    assert found.drop("canary").canary is None


def test_a_damaged_bundle_is_refused_and_the_old_one_stays(bundles, tmp_path):
    found = director(bundles, tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        run(found, tmp_path / "nowhere")
    wanted = found.hear(Report("i1", "ingress", epoch=0))
    assert wanted.routing.active == read_bundle(bundles[0]).version
    assert len(wanted.bundles) == 1


def test_a_replica_that_cannot_load_refuses_the_bundle(bundles, tmp_path):
    found = director(bundles, tmp_path)
    with pytest.raises(CheckpointError, match="by selector selector-1: no such file"):
        run(found, bundles[1], failing="selector")
    wanted = found.hear(Report("i1", "ingress", epoch=0))
    assert list(wanted.bundles) == [read_bundle(bundles[0]).version]


def test_a_link_is_followed_when_it_is_given_and_not_later(bundles, tmp_path):
    found = director(bundles, tmp_path / "state")
    link = tmp_path / "current"
    link.symlink_to(bundles[1])
    version = run(found, link).active
    link.unlink()
    link.symlink_to(bundles[0])
    assert found.hear(Report("i1", "ingress", epoch=1)).bundles[version] == str(bundles[1])


@pytest.mark.parametrize("path", ["a\0b", "~nobody-of-this-name/bundle"])
def test_a_path_that_cannot_be_followed_is_refused(bundles, tmp_path, path):
    with pytest.raises(CheckpointError, match="cannot be found"):
        run(director(bundles, tmp_path), path)


def test_a_role_that_cannot_be_kept_is_not_taken_and_the_next_change_goes_ahead(bundles, tmp_path):
    state_dir = tmp_path / "state"
    found = director(bundles, state_dir)
    state_dir.write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(found, bundles[1])
    wanted = found.hear(Report("i1", "ingress", epoch=0))
    assert (wanted.routing.active, wanted.routing.epoch) == (read_bundle(bundles[0]).version, 0)
    assert list(wanted.bundles) == [wanted.routing.active]
    state_dir.unlink()
    assert run(found, bundles[1]).active == read_bundle(bundles[1]).version


def test_a_part_that_never_loads_is_named(bundles, tmp_path):
    found = director(bundles, tmp_path, start_timeout_s=0.3)
    with pytest.raises(CheckpointError, match="not loaded within 0 s by a retriever, a selector"):
        asyncio.run(found.load(str(bundles[1]), "active", 0.0))


def check(pipeline, tmp_path, bundles, golden=GOLDEN) -> None:
    found = director(bundles, tmp_path, pipeline)
    asyncio.run(found._check_golden("v", golden))


def test_golden_questions_must_be_answered_as_recorded(bundles, tmp_path):
    check(EchoPipeline(), tmp_path, bundles)
    check(EchoPipeline(wrong=("question 3",)), tmp_path, bundles)
    with pytest.raises(CheckpointError, match=r"only 8 of 10 golden answers.*'question 3'"):
        check(EchoPipeline(wrong=("question 3", "question 7")), tmp_path, bundles)


def test_golden_questions_must_lead_to_the_recorded_picks(bundles, tmp_path):
    with pytest.raises(CheckpointError, match="only 0 of 10"):
        check(EchoPipeline(picks=(0, 1)), tmp_path, bundles)


@pytest.fixture(scope="module")
def recorded(bundles) -> tuple[Path, Path]:
    """The bundles, the first with golden questions."""
    add_evaluation(bundles[0], Evaluated(GOLDEN, {}))
    return bundles


def first_checked(found: Director, is_own_corpus: bool = True) -> bool:
    """Whether the first version is checked once it is loaded."""

    async def scenario() -> bool:
        assert not found.hear(Report("i1", "ingress", epoch=0)).checked
        parts = asyncio.create_task(replicas(found))
        async with asyncio.timeout(60):
            await found.check_first(is_own_corpus)
        parts.cancel()
        return found.hear(Report("i1", "ingress", epoch=0)).checked

    return asyncio.run(scenario())


def test_the_first_bundle_must_answer_as_recorded_too(recorded, tmp_path, caplog):
    assert first_checked(director(recorded, tmp_path))
    assert caplog.text == ""
    wrong = EchoPipeline(picks=(0, 1))
    found = director(recorded, tmp_path, wrong)
    assert not first_checked(found)
    assert "the service cannot start: version" in caplog.text
    assert "only 0 of 10 golden answers" in caplog.text
    assert run(found, recorded[1]).active == read_bundle(recorded[1]).version
    assert found.hear(Report("i1", "ingress", epoch=0)).checked  # another bundle repairs it


def test_on_a_corpus_of_the_service_the_first_bundle_is_not_compared(recorded, tmp_path, caplog):
    assert first_checked(director(recorded, tmp_path, EchoPipeline(picks=(0, 1))), False)
    assert "are not checked, because the service uses another corpus" in caplog.text


def test_one_change_at_a_time(bundles, tmp_path):
    found = director(bundles, tmp_path, start_timeout_s=1.0)

    async def scenario():
        first = asyncio.create_task(found.load(str(bundles[1]), "active", 0.0))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="another bundle is being loaded"):
            await found.load(str(bundles[1]), "shadow", 0.0)
        with pytest.raises(CheckpointError):
            await first

    asyncio.run(scenario())
