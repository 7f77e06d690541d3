"""What the retriever and selector parts of a service give is what evaluation computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serve_bundles import NUM_CANDIDATES, NUM_SELECTED, bundle_config, make_bundle

from rlrag.bundle import load_bundle
from rlrag.errors import CheckpointError, OverloadedError, RequestError
from rlrag.evaluation.systems import greedy_picks
from rlrag.pipeline import open_evaluation_data, open_library
from serve.records import Filters, Picked, Retrieved
from serve.retrieving import Ask, RetrieverPart
from serve.selecting import Choice, SelectorPart, propensity_logp


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(openrag_files, cache_dir, tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("b") / "bundle", openrag_files, cache_dir, seed=1)


@pytest.fixture(scope="module")
def table(openrag_files, cache_dir):
    config = bundle_config(openrag_files, cache_dir)
    return open_evaluation_data(config, open_library(config))[0]


@pytest.fixture(scope="module")
def retriever(bundle) -> RetrieverPart:
    part = RetrieverPart()
    part.load("v1", bundle)
    return part


@pytest.fixture(scope="module")
def retrieved(retriever, table) -> list[Retrieved]:
    found = retriever.retrieve("v1", [Ask(q.question) for q in table.questions])
    assert all(isinstance(one, Retrieved) for one in found)
    return found


def choices(table, retrieved, **options) -> list[Choice]:
    return [
        Choice(question.question, found, seed=number, **options)
        for number, (question, found) in enumerate(zip(table.questions, retrieved, strict=True))
    ]


def test_candidates_are_those_of_evaluation(table, retrieved):
    for row, found in enumerate(retrieved):
        assert found.passages == table.passages(row)
        assert np.allclose(found.scores_NC, table.scores_QNC[row], atol=1e-5)
        assert np.allclose(found.question_vector_D, table.question_vectors_QD[row], atol=1e-5)
        rows_N = table.rows_QN[row]
        assert np.array_equal(found.passage_vectors_ND, table.passage_vectors_PD[rows_N])


def test_picks_are_those_of_evaluation(bundle, table, retrieved):
    part = SelectorPart()
    part.load("v1", bundle)
    found = part.select("v1", choices(table, retrieved))
    expected = greedy_picks(load_bundle(bundle).policy, table)
    assert [list(picked.positions) for picked in found] == expected.tolist()
    assert {picked.propensity_logp for picked in found} == {0.0}
    assert not any(picked.explored for picked in found)


def test_probabilities_are_those_of_each_pick_given_those_before(bundle, table, retrieved):
    part = SelectorPart()
    part.load("v1", bundle)
    policy = load_bundle(bundle).policy
    for row, picked in enumerate(part.select("v1", choices(table, retrieved))[:4]):
        whole = policy.log_prob(table.batch([row]), np.array([[picked.positions]])).item()
        first = policy.log_prob(table.batch([row]), np.array([[picked.positions[:1]]])).item()
        assert np.log(picked.probs) == pytest.approx([first, whole - first], abs=1e-5)


def test_fewer_picks_are_the_first_of_more(bundle, table, retrieved):
    part = SelectorPart()
    part.load("v1", bundle)
    both = part.select("v1", choices(table, retrieved))
    one = part.select("v1", choices(table, retrieved, num_selected=1))
    assert [picked.positions for picked in one] == [picked.positions[:1] for picked in both]


def test_an_impossible_number_of_picks_concerns_its_question_alone(bundle, table, retrieved):
    part = SelectorPart()
    part.load("v1", bundle)
    question = table.questions[0].question
    good = Choice(question, retrieved[0])
    found = part.select("v1", [good, Choice(question, retrieved[0], NUM_SELECTED + 1), good])
    assert isinstance(found[1], RequestError)
    assert f"trained to pick {NUM_SELECTED}" in str(found[1])
    assert [found[place].positions for place in (0, 2)] == [found[0].positions] * 2
    zero = part.select("v1", [Choice(question, retrieved[0], 0)])
    assert isinstance(zero[0], RequestError)


def test_exploration_draws_its_share_with_its_propensity(bundle, table, retrieved):
    """Half of the picks are drawn; frequencies of selections are their propensities."""
    part = SelectorPart(explore_share=0.5)
    part.load("v1", bundle)
    question, found = table.questions[0].question, retrieved[0]
    picks = part.select(
        "v1", [Choice(question, found, explore=seed % 2 == 0, seed=seed) for seed in range(3000)]
    )
    assert sum(picked.explored for picked in picks) == 1500
    counts: dict[tuple[int, ...], list[Picked]] = {}
    for picked in picks:
        counts.setdefault(picked.positions, []).append(picked)
    for same in counts.values():
        share = np.exp(same[0].propensity_logp)
        deviation = (share * (1 - share) / 3000) ** 0.5
        assert len(same) / 3000 == pytest.approx(share, abs=4 * deviation + 1 / 3000)
        logps = [picked.propensity_logp for picked in same]
        assert logps == pytest.approx([logps[0]] * len(logps), abs=1e-5)


def test_propensities_of_all_selections_sum_to_one():
    """Four selections with probabilities p, the first of which is the greedy one."""
    probabilities = [0.4, 0.3, 0.2, 0.1]
    for share in (0.0, 0.3, 1.0):
        total = sum(
            np.exp(propensity_logp(np.log(p), is_greedy=place == 0, explore_share=share))
            for place, p in enumerate(probabilities)
        )
        assert total == pytest.approx(1.0)
    assert propensity_logp(-1.0, is_greedy=False, explore_share=0.0) == -np.inf


def test_filters_search_deeper_until_there_are_enough(retriever, table):
    question = table.questions[0].question
    everything = retriever.retrieve("v1", [Ask(question)])[0]
    banned = tuple(passage.id for passage in everything.passages[:3])
    (found,) = retriever.retrieve("v1", [Ask(question, filters=Filters(exclude_ids=banned))])
    ids = [passage.id for passage in found.passages]
    assert len(ids) == NUM_CANDIDATES
    assert not set(ids) & set(banned)
    assert ids[:2] == [passage.id for passage in everything.passages[3:]]
    assert (np.diff(found.scores_NC[:, 0]) <= 0).all()


def test_filters_by_title_and_by_id(retriever, table):
    question = table.questions[0].question
    asked = Ask(question, 3, Filters(title_contains="LAMP"))
    (found,) = retriever.retrieve("v1", [asked])
    assert {passage.title for passage in found.passages} == {"lamp"}
    (one,) = retriever.retrieve("v1", [Ask(question, 1, Filters(ids=("river-ledger",)))])
    assert [passage.id for passage in one.passages] == ["river-ledger"]


def test_filters_that_leave_too_little_say_how_much(retriever, table):
    asked = Ask(table.questions[0].question, filters=Filters(title_contains="lamp"))
    (found,) = retriever.retrieve("v1", [asked])
    assert isinstance(found, RequestError)
    assert "leave 3 of 60 passages" in str(found)


@pytest.mark.parametrize("wanted", [0, NUM_CANDIDATES + 1])
def test_an_impossible_number_of_candidates_is_refused(retriever, table, wanted):
    (found,) = retriever.retrieve("v1", [Ask(table.questions[0].question, wanted)])
    assert isinstance(found, RequestError)
    assert f"from 1 to {NUM_CANDIDATES}" in str(found)


def test_a_version_that_is_not_loaded_is_asked_for_again_later(retriever):
    with pytest.raises(OverloadedError, match="version v9 is being loaded"):
        retriever.retrieve("v9", [Ask("what?")])
    with pytest.raises(OverloadedError, match="version v9 is being loaded"):
        SelectorPart().select("v9", [])


def test_versions_share_what_is_equal_and_are_dropped(bundle, openrag_files, cache_dir, tmp_path):
    other = make_bundle(tmp_path / "other", openrag_files, cache_dir, seed=2)
    part = RetrieverPart()
    part.load("v1", bundle)
    part.load("v2", other)
    assert part.loaded() == ("v1", "v2")
    first, second = (part.retrieve(v, [Ask("which thing")])[0] for v in ("v1", "v2"))
    assert first.passages == second.passages
    part.drop("v1")
    assert part.loaded() == ("v2",)


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    with pytest.raises(CheckpointError):
        RetrieverPart().load("v1", tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        SelectorPart().load("v1", tmp_path / "nowhere")
