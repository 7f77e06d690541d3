"""What the retriever and selector parts of a service give is what evaluation computes."""

from __future__ import annotations

from pathlib import Path

import episodes
import numpy as np
import pytest
from serve_bundles import NUM_CANDIDATES, NUM_SELECTED, bundle_config, make_bundle

from rlrag.bundle import bundle_version, load_bundle
from rlrag.errors import CheckpointError, OverloadedError, RequestError
from rlrag.pipeline import open_evaluation_data, open_library
from rlrag.serving.records import Filters, Picked, Retrieved
from rlrag.serving.retrieving import Ask, RetrieverPart
from rlrag.serving.selecting import Choice, SelectorPart, propensity_logp


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(openrag_files, cache_dir, tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("b") / "bundle", openrag_files, cache_dir, seed=1)


@pytest.fixture(scope="module")
def version(bundle) -> str:
    return bundle_version(bundle)


@pytest.fixture(scope="module")
def table(openrag_files, cache_dir):
    config = bundle_config(openrag_files, cache_dir)
    return open_evaluation_data(config, open_library(config))[0]


@pytest.fixture(scope="module")
def retriever(bundle, version) -> RetrieverPart:
    part = RetrieverPart()
    part.load(version, bundle)
    return part


@pytest.fixture(scope="module")
def retrieved(retriever, version, table) -> list[Retrieved]:
    found = retriever.retrieve(version, [Ask(q.question) for q in table.questions])
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


def test_picks_are_those_of_evaluation(bundle, version, table, retrieved):
    part = SelectorPart()
    part.load(version, bundle)
    found = part.select(version, choices(table, retrieved))
    expected = episodes.picks(load_bundle(bundle).policy, table)
    assert [list(picked.positions) for picked in found] == expected.tolist()
    assert {picked.propensity_logp for picked in found} == {0.0}
    assert not any(picked.explored for picked in found)


def test_probabilities_are_those_of_each_pick_given_those_before(bundle, version, table, retrieved):
    part = SelectorPart()
    part.load(version, bundle)
    policy = load_bundle(bundle).policy
    for row, picked in enumerate(part.select(version, choices(table, retrieved))[:4]):
        picks_BMK = np.array([[picked.positions]])
        expected = episodes.pick_log_prob(policy, table.batch([row]), picks_BMK)[0, 0]
        assert np.log(picked.probs) == pytest.approx(expected.detach().numpy(), abs=1e-5)


def test_fewer_picks_are_the_first_of_more(bundle, version, table, retrieved):
    part = SelectorPart()
    part.load(version, bundle)
    both = part.select(version, choices(table, retrieved))
    one = part.select(version, choices(table, retrieved, num_selected=1))
    assert [picked.positions for picked in one] == [picked.positions[:1] for picked in both]


def test_an_impossible_number_of_picks_concerns_its_question_alone(
    bundle, version, table, retrieved
):
    part = SelectorPart()
    part.load(version, bundle)
    question = table.questions[0].question
    good = Choice(question, retrieved[0])
    found = part.select(version, [good, Choice(question, retrieved[0], NUM_SELECTED + 1), good])
    assert isinstance(found[1], RequestError)
    assert f"trained to pick {NUM_SELECTED}" in str(found[1])
    assert [found[place].positions for place in (0, 2)] == [found[0].positions] * 2
    zero = part.select(version, [Choice(question, retrieved[0], 0)])
    assert isinstance(zero[0], RequestError)


def test_exploration_draws_its_share_with_its_propensity(bundle, version, table, retrieved):
    """Half of the picks are drawn; frequencies of selections are their propensities."""
    part = SelectorPart(explore_share=0.5)
    part.load(version, bundle)
    question, found = table.questions[0].question, retrieved[0]
    picks = part.select(
        version, [Choice(question, found, explore=seed % 2 == 0, seed=seed) for seed in range(3000)]
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


def test_filters_search_deeper_until_there_are_enough(retriever, version, table):
    question = table.questions[0].question
    everything = retriever.retrieve(version, [Ask(question)])[0]
    banned = tuple(passage.id for passage in everything.passages[:3])
    (found,) = retriever.retrieve(version, [Ask(question, filters=Filters(exclude_ids=banned))])
    ids = [passage.id for passage in found.passages]
    assert len(ids) == NUM_CANDIDATES
    assert not set(ids) & set(banned)
    assert ids[:2] == [passage.id for passage in everything.passages[3:]]
    assert (np.diff(found.scores_NC[:, 0]) <= 0).all()


def test_filters_by_title_and_by_id(retriever, version, table):
    question = table.questions[0].question
    asked = Ask(question, 3, Filters(title_contains="LAMP"))
    (found,) = retriever.retrieve(version, [asked])
    assert {passage.title for passage in found.passages} == {"lamp"}
    (one,) = retriever.retrieve(version, [Ask(question, 1, Filters(ids=("river-ledger",)))])
    assert [passage.id for passage in one.passages] == ["river-ledger"]


def test_filters_that_leave_too_little_say_how_much(retriever, version, table):
    asked = Ask(table.questions[0].question, filters=Filters(title_contains="lamp"))
    (found,) = retriever.retrieve(version, [asked])
    assert isinstance(found, RequestError)
    assert "leave 3 of 60 passages" in str(found)


@pytest.mark.parametrize("wanted", [0, NUM_CANDIDATES + 1])
def test_an_impossible_number_of_candidates_is_refused(retriever, version, table, wanted):
    (found,) = retriever.retrieve(version, [Ask(table.questions[0].question, wanted)])
    assert isinstance(found, RequestError)
    assert f"from 1 to {NUM_CANDIDATES}" in str(found)


def test_a_version_that_is_not_loaded_is_asked_for_again_later(retriever):
    with pytest.raises(OverloadedError, match="version v9 is being loaded"):
        retriever.retrieve("v9", [Ask("what?")])
    with pytest.raises(OverloadedError, match="version v9 is being loaded"):
        SelectorPart().select("v9", [])


def test_versions_share_what_is_equal_and_are_dropped(
    bundle, version, openrag_files, cache_dir, tmp_path
):
    other = make_bundle(tmp_path / "other", openrag_files, cache_dir, seed=2)
    versions = (version, bundle_version(other))
    part = RetrieverPart()
    part.load(version, bundle)
    part.load(versions[1], other)
    assert part.loaded() == versions
    first, second = (part.retrieve(v, [Ask("which thing")])[0] for v in versions)
    assert first.passages == second.passages
    part.drop(version)
    assert part.loaded() == versions[1:]


def test_a_damaged_bundle_is_refused(bundle, version, tmp_path):
    with pytest.raises(CheckpointError):
        RetrieverPart().load(version, tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        SelectorPart().load(version, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [RetrieverPart, SelectorPart])
def test_a_path_that_holds_another_version_by_now_is_refused(
    kind, openrag_files, cache_dir, tmp_path
):
    part = kind()
    place = make_bundle(tmp_path / "current", openrag_files, cache_dir, seed=1)
    named = bundle_version(place)
    make_bundle(place, openrag_files, cache_dir, seed=2)
    message = (
        f"current now contains version {bundle_version(place)}, not {named}; restore {named} there"
    )
    with pytest.raises(CheckpointError, match=message):
        part.load(named, place)
    assert part.loaded() == ()
