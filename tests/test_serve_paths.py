"""A bundle whose episodes look further is served as it is played: picks, paths and records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serve_bundles import NUM_SELECTED, hop_config, make_bundle

from rlrag.bundle import bundle_version, load_bundle
from rlrag.environment.rollout import play_greedy, replay
from rlrag.errors import RequestError
from rlrag.pipeline import open_evaluation_data, open_library
from rlrag.serving.records import Filters, Picked, Retrieved
from rlrag.serving.retrieving import Ask, RetrieverPart
from rlrag.serving.selecting import Choice, SelectorPart


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(openrag_files, cache_dir):
    return hop_config(openrag_files, cache_dir)


@pytest.fixture(scope="module")
def bundle(openrag_files, cache_dir, config, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("b") / "bundle"
    return make_bundle(place, openrag_files, cache_dir, seed=3, config=config)


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
