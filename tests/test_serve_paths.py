"""A bundle whose episodes look further is served as it is played: picks, paths and records."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from serve_bundles import NUM_SELECTED, hop_config, make_bundle
from serve_stand_ins import NumberPipeline, Served

import rlrag
from rlrag.bundle import add_evaluation, bundle_version, copy_bundle, load_bundle
from rlrag.bundle_files import Evaluated, GoldenQuestion
from rlrag.data.feedback import FeedbackStore, read_feedback
from rlrag.environment.rollout import play_greedy, replay
from rlrag.errors import RequestError
from rlrag.pipeline import open_evaluation_data, open_library
from rlrag.serving.records import AnswerPiece, Filters, Picked, Retrieved, Routing
from rlrag.serving.retrieving import Ask, RetrieverPart
from rlrag.serving.selecting import Choice, SelectorPart
from rlrag.serving.versions.director import Bounds, Director
from rlrag.serving.versions.registry import PARTS, Report


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(openrag_files, cache_dir):
    return hop_config(openrag_files, cache_dir)


@pytest.fixture(scope="module")
def bundle(openrag_files, cache_dir, config, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("b") / "bundle"
    return make_bundle(place, openrag_files, cache_dir, seed=1, config=config)


@pytest.fixture(scope="module")
def version(bundle) -> str:
    return bundle_version(bundle)


@pytest.fixture(scope="module")
def table(config):
    return open_evaluation_data(config, open_library(config))[0]


@pytest.fixture(scope="module")
def played(bundle, table, config):
    return play_greedy(config.environment, load_bundle(bundle).policy, table)


@pytest.fixture(scope="module")
def retriever(bundle, version) -> RetrieverPart:
    part = RetrieverPart()
    part.load(version, bundle)
    return part


@pytest.fixture(scope="module")
def retrieved(retriever, version, table) -> list[Retrieved]:
    return retriever.retrieve(version, [Ask(q.question) for q in table.questions])


@pytest.fixture(scope="module")
def selector(bundle, version) -> SelectorPart:
    part = SelectorPart(explore_share=0.5)
    part.load(version, bundle)
    return part


class HopPipeline(NumberPipeline):
    """Real retriever and selector parts; answers with the ids of what was picked."""

    def __init__(self, retriever: RetrieverPart, selector: SelectorPart) -> None:
        super().__init__()
        self.retriever, self.selector = retriever, selector

    async def retrieve(self, version, question, num_candidates, filters):
        return raised(self.retriever.retrieve(version, [Ask(question, num_candidates, filters)]))

    async def select(self, version, question, retrieved, num_selected, explore):
        choice = Choice(question, retrieved, num_selected, explore, seed=5)
        return raised(self.selector.select(version, [choice]))

    async def generate(self, version, question, passages, decoding):
        text = " ".join(passage.id for passage in passages)
        yield AnswerPiece(text, -1.0, 2, 9, len(passages), 0, True)


def raised(found):
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@pytest.fixture
def pipeline(retriever, selector) -> HopPipeline:
    return HopPipeline(retriever, selector)


def choices(table, retrieved, **options) -> list[Choice]:
    return [
        Choice(question.question, found, seed=number, **options)
        for number, (question, found) in enumerate(zip(table.questions, retrieved, strict=True))
    ]


def test_picks_and_paths_are_those_of_evaluation(selector, version, table, retrieved, played):
    picked = selector.select(version, choices(table, retrieved))
    for row, (one, found) in enumerate(zip(picked, retrieved, strict=True)):
        assert one.passages(found.passages) == played.evidence[row]
        assert one.path.turns == played.paths[row].turns()
        assert one.path.writers == ("title",)
        known = {passage.id for passage in found.passages + one.further}
        assert {p.passage_id for turn in one.path.turns for p in turn.found} <= known
        assert not {p.id for p in one.further} & {p.id for p in found.passages}
        assert len(one.probs) == len(one.positions)
    # Else nothing of this would be put to the test.
    actions = {turn.action for one in picked for turn in one.path.turns}
    assert actions >= {"start", "pick", "search"}
    by = {found.by for one in picked for turn in one.path.turns for found in turn.found}
    assert by >= {"query", "hop"}
    num_candidates = len(retrieved[0].passages)
    assert any(max(one.positions) >= num_candidates for one in picked)


def test_probabilities_are_those_of_the_picks(selector, version, table, retrieved, played):
    picked = selector.select(version, choices(table, retrieved))
    for row, one in enumerate(picked):
        turns = one.path.turns[1:]
        logps = played.logp_ET[row][: len(turns)]
        expected = [
            np.exp(logp) for logp, turn in zip(logps, turns, strict=True) if turn.action == "pick"
        ]
        assert one.probs == pytest.approx(expected, abs=1e-5)


def test_what_was_explored_can_be_played_again(selector, version, table, retrieved, config):
    picked = selector.select(version, choices(table, retrieved, explore=True, num_selected=1))
    assert len({one.actions for one in picked}) > 1
    for row, one in enumerate(picked):
        logps = one.path.action_logps
        assert len(logps) == len(one.actions)
        assert sum(logps) == pytest.approx(one.propensity_logp)
        assert one.path.num_selected == 1
        environment = config.environment.model_copy(update={"num_selected": 1})
        again = replay(environment, table, np.array([row]), np.array([one.actions]))
        assert again.paths[0].turns() == one.path.turns
        assert again.evidence[0] == one.passages(retrieved[row].passages)


def test_propensities_of_all_first_actions_sum_to_one(selector, version, table, retrieved):
    question, found = table.questions[0].question, retrieved[0]
    picks = selector.select(
        version, [Choice(question, found, explore=seed % 2 == 0, seed=seed) for seed in range(400)]
    )
    shares = {one.actions[0]: np.exp(one.path.action_logps[0]) for one in picks}
    assert len(shares) > 1
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)


def test_filters_are_refused_where_a_path_could_leave_them(selector, retriever, version, table):
    question = table.questions[0].question
    (found,) = retriever.retrieve(version, [Ask(question, filters=Filters(exclude_ids=("x",)))])
    assert isinstance(found, Retrieved)  # what the question's own search finds may be filtered
    (refused,) = selector.select(version, [Choice(question, found)])
    assert isinstance(refused, RequestError)
    assert "filters" in str(refused)
    assert "looks further" in str(refused)


def test_candidates_must_be_enough_for_the_first_hits(selector, retriever, version, table):
    question = table.questions[0].question
    few, enough = retriever.retrieve(version, [Ask(question, 1), Ask(question, 2)])
    refused, picked = selector.select(version, [Choice(question, few), Choice(question, enough)])
    assert isinstance(refused, RequestError)
    assert "starts with 2; ask for at least 2 candidates" in str(refused)
    assert isinstance(picked, Picked)
    (zero,) = selector.select(version, [Choice(question, enough, num_selected=NUM_SELECTED + 1)])
    assert isinstance(zero, RequestError)
    assert f"trained to pick {NUM_SELECTED}" in str(zero)


def test_versions_share_what_they_look_further_in(
    selector, bundle, version, openrag_files, cache_dir, config, tmp_path, monkeypatch
):
    other = make_bundle(tmp_path / "other", openrag_files, cache_dir, seed=4, config=config)
    part = SelectorPart()
    part.load(version, bundle)
    monkeypatch.setattr("rlrag.serving.libraries.open_library", None)  # a second one would fail
    part.load(bundle_version(other), other)
    assert part.loaded() == (version, bundle_version(other))


def test_another_corpus_is_searched_by_both_parts(bundle, version, openrag_files, tmp_path):
    text = (openrag_files / "corpus.jsonl").read_text().replace("ledger says", "old ledger says")
    corpus = tmp_path / "other.jsonl"
    corpus.write_text(text)
    retriever = RetrieverPart(corpus=str(corpus))
    selector = SelectorPart(corpus=str(corpus))
    for part in (retriever, selector):
        part.load(version, bundle)
    question = "what does the lamp hold?"
    found = retriever.retrieve(version, [Ask(question)])
    (picked,) = selector.select(version, [Choice(question, found[0])])
    shown = found[0].passages + picked.further
    assert picked.further
    assert all("old ledger" in one.text for one in shown if one.id.endswith("-ledger"))


def test_an_answer_tells_its_path(pipeline, version, table, played):
    """The first question whose path searches, hops and picks beyond the candidates."""

    async def run() -> None:
        served = Served(Routing(version), pipeline=pipeline)
        row = searching_row(played)
        question, turns = table.questions[row].question, played.paths[row].turns()
        body = (await served.ask(question)).json()
        assert [p["id"] for p in body["passages"]] == [p.id for p in played.evidence[row]]
        path = body["path"]
        assert [turn["action"] for turn in path] == [turn.action for turn in turns]
        assert [turn.get("passage_id") for turn in path] == [turn.passage_id for turn in turns]
        assert [turn.get("query") for turn in path] == [turn.query for turn in turns]
        found = [[(p["id"], p["by"], p.get("edge")) for p in turn["found"]] for turn in path]
        assert found == [[(p.passage_id, p.by, p.edge) for p in turn.found] for turn in turns]
        assert [turn["writer"] for turn in path if turn["action"] == "search"] == ["title"]
        picks = [turn for turn in path if turn["action"] == "pick"]
        titles = {p.id: p.title for p in table.corpus}
        assert all(turn["title"] == titles[turn["passage_id"]] for turn in picks)
        hops = [p for turn in path for p in turn["found"] if p["by"] == "hop"]
        assert hops
        assert {p["source"] for p in hops} <= {turn["passage_id"] for turn in picks}
        candidates = {p.id for p in table.passages(row)}
        for passage in body["passages"]:
            assert (passage["retriever_score"] is None) == (passage["id"] not in candidates)

        chat = {"model": "rlrag", "messages": [{"role": "user", "content": question}]}
        reply = await served.client.post("/v1/chat/completions", json=chat)
        assert reply.json()["choices"][0]["message"]["path"] == path

    asyncio.run(run())


def searching_row(played) -> int:
    for row, path in enumerate(played.paths):
        turns = path.turns()
        if any(t.action == "search" for t in turns) and any(
            found.by == "hop" for t in turns for found in t.found
        ):
            return row
    raise AssertionError("no path searches and hops")


def test_a_stream_tells_each_turn_before_the_text(pipeline, version, table, played):
    async def run() -> None:
        served = Served(Routing(version), pipeline=pipeline)
        question = table.questions[searching_row(played)].question
        for _ in range(2):  # the second comes from the cache
            text = (await served.ask(question, stream=True)).text
            blocks = [block.split("\n") for block in text.split("\n\n") if block]
            events = [dict(line.split(": ", 1) for line in block) for block in blocks]
            whole = json.loads(events[-1]["data"])
            names = [one["event"] for one in events]
            num_turns = len(whole["path"])
            assert num_turns > 2
            assert names == ["passages", *["turn"] * num_turns, "token", "answer"]
            told = [json.loads(one["data"]) for one in events if one["event"] == "turn"]
            assert told == whole["path"]

    asyncio.run(run())


def test_a_filter_of_an_answer_is_refused_by_name(pipeline, version):
    async def run() -> None:
        served = Served(Routing(version), pipeline=pipeline)
        reply = await served.ask("what does the lamp hold?", filters={"exclude_ids": ["x"]})
        assert reply.status_code == 422
        assert reply.json()["error"]["param"] == "filters"

    asyncio.run(run())


def test_golden_answers_are_checked_with_their_paths(
    bundle, table, played, openrag_files, retriever, tmp_path, caplog
):
    def golden(picks) -> tuple[GoldenQuestion, ...]:
        return tuple(
            GoldenQuestion(q.id, q.question, " ".join(ids), ids, -1.0)
            for q, ids in zip(table.questions, picks, strict=True)
        )

    right = [tuple(passage.id for passage in evidence) for evidence in played.evidence]
    for name, picks, good in (("right", right, True), ("wrong", [ids[:1] for ids in right], False)):
        place = tmp_path / name
        copy_bundle(bundle, place)
        add_evaluation(place, Evaluated(golden(picks), {}))
        parts = RetrieverPart(), SelectorPart()
        for part in parts:
            part.load(bundle_version(place), place)
        director = Director(
            str(place), tmp_path / f"state-{name}", Bounds(20.0), HopPipeline(*parts)
        )
        for part in PARTS:
            director.hear(Report(f"{part}-1", part, (bundle_version(place),), {}, ""))
        caplog.clear()
        asyncio.run(director.check_first(is_own_corpus=True))
        assert ("the service cannot start" in caplog.text) != good


def test_the_log_holds_what_a_path_is_played_again_from(pipeline, version, table, tmp_path, config):
    async def run() -> None:
        store = FeedbackStore(tmp_path / "log.sqlite")
        served = Served(
            Routing(version), store=store, pipeline=pipeline, feedback__explore_share=1.0
        )
        async with served.app.router.lifespan_context(served.app):
            for question in table.questions[:4]:
                body = (await served.ask(question.question)).json()
                said = {"request_id": body["request_id"], "reward": 1.0}
                assert (await served.client.post("/v1/feedback", json=said)).is_success
        bodies.append(body)

    bodies: list[dict] = []
    asyncio.run(run())
    for row, record in enumerate(read_feedback(tmp_path / "log.sqlite")):
        event = record.event
        assert event.num_selected == NUM_SELECTED
        assert event.action_logps is not None
        assert len(event.action_logps) == len(event.actions)
        assert sum(event.action_logps) == pytest.approx(event.propensity_logp)
        again = replay(config.environment, table, np.array([row]), np.array([event.actions]))
        assert " ".join(passage.id for passage in again.evidence[0]) == event.answer
    assert row == 3


def test_the_pipeline_in_python_plays_the_same(bundle, table, played):
    with rlrag.load_pipeline(bundle) as pipeline:
        answers = pipeline.answer_many([question.question for question in table.questions])
    assert [answer.path for answer in answers] == [path.turns() for path in played.paths]
    assert tuple(answer.passages for answer in answers) == played.evidence
