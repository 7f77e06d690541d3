"""From a log to what is trained on: the same candidates, the rewards, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feedback_runs import even_log, event, library_of, write_log
from loop_runs import changed
from stand_ins import make_table

from rlrag.algorithms.off_policy import snips
from rlrag.config import HOPS, RetrievalConfig, RunConfig
from rlrag.data.checks import DataReport
from rlrag.data.corpus import MemoryCorpus
from rlrag.data.feedback import FeedbackStore
from rlrag.data.questions import QuestionSet
from rlrag.data.sample import sample_corpus, sample_questions
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play, replay
from rlrag.errors import ConfigError, DataError
from rlrag.pipeline import Library, candidates_of, open_policy
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.graph import PassageGraph
from rlrag.selection.protocol import Draws
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.feedback.selections import open_logged_data
from rlrag.training.feedback.trainer import LoggedTrainer


@pytest.fixture
def config(small_config) -> RunConfig:
    return changed(
        small_config, algorithm={"name": "feedback", "log": "log.sqlite", "held_back_share": 0.25}
    )


def test_candidates_are_those_that_were_served_as_if_just_retrieved(tmp_path):
    """With a real index: rows, scores and order are what a search gives."""
    corpus = sample_corpus()
    retrieval = RetrievalConfig(kind="bm25", encoder=None, num_candidates=6)
    config = changed(
        RunConfig(cache_dir=str(tmp_path), retrieval=retrieval),
        algorithm={"name": "feedback", "log": "log.sqlite", "held_back_share": 0.0},
        training={"batch_size": 5},
    )
    library = Library(corpus, open_retrievers(corpus, retrieval, tmp_path))
    questions = QuestionSet.of(sample_questions(), DataReport("sample", 25, 25))
    table = candidates_of(library, questions, config)
    rows = [3, 0, 3, 7, 11]
    log = write_log(tmp_path / "log.sqlite", [event(table, row, n) for n, row in enumerate(rows)])
    found = open_logged_data(config, library, log).train
    expected, batch = table.batch(rows), found.candidates.batch(range(5))
    assert np.array_equal(found.candidates.rows_QN, table.rows_QN[rows])
    assert batch.question_texts == expected.question_texts
    assert batch.passage_texts == expected.passage_texts
    assert np.allclose(batch.scores_BNC, expected.scores_BNC)
    assert found.candidates.score_names == table.score_names
    assert found.actions_QT.tolist() == [[0], [1], [2], [3], [4]]
    assert np.allclose(found.propensity_logp_Q, -np.log(6))


def test_the_order_that_was_served_stays(config, tmp_path):
    """Position 0 is what the service had first, whatever the retriever says now."""
    table = make_table(24)
    turned = [
        event(table, row, row, candidate_ids=tuple(p.id for p in table.passages(row))[::-1])
        for row in range(24)
    ]
    log = write_log(tmp_path / "log.sqlite", turned)
    found = open_logged_data(
        changed(config, algorithm={"held_back_share": 0.0}), library_of(table), log
    ).train.candidates
    assert np.array_equal(found.rows_QN, table.rows_QN[:, ::-1])
    assert np.array_equal(found.scores_QNC, table.scores_QNC[:, ::-1])
    assert np.array_equal(found.question_vectors_QD, table.question_vectors_QD)


def test_rewards_are_what_was_given_or_whether_the_answer_is_right(config, tmp_path):
    table, words = make_table(24), {}
    config = changed(config, algorithm={"reward_range": [-4.0, 1.0]})
    store = FeedbackStore(tmp_path / "log.sqlite")
    for number in range(24):
        given = (
            {"reward": -3.5},
            {"thumbs": "up"},
            {"thumbs": "down"},
            {"golden_answers": ["Eiffel Tower", "x"]},
            {"golden_answers": ["Big Ben"]},
            {"golden_answers": []},
        )[number % 6]
        store.record_selection(event(table, number, number, answer="the Eiffel tower."))
        store.record_feedback(f"request-{number}", **given)
        words[f"request-{number}"] = (-3.5, 1.0, 0.0, 1.0, 0.0, 0.0)[number % 6]
    data = open_logged_data(config, library_of(table), tmp_path / "log.sqlite")
    assert data.held_back is not None
    found = {
        question.id: reward
        for part in (data.train, data.held_back)
        for question, reward in zip(part.candidates.questions, part.rewards_Q, strict=True)
    }
    assert found == words


def test_no_question_stands_on_both_sides_and_the_seed_does_not_matter(config, tmp_path):
    log, table = even_log(tmp_path / "log.sqlite")
    sides = []
    for seed in (0, 1):
        seeded = config.model_copy(update={"seed": seed})
        data = open_logged_data(seeded, library_of(table), log)
        assert data.held_back is not None
        assert (len(data.train), len(data.held_back)) == (180, 60)
        texts = [
            {q.question for q in part.candidates.questions} for part in (data.train, data.held_back)
        ]
        assert not texts[0] & texts[1]
        sides.append((texts, data.content_hash))
    assert sides[0] == sides[1]


def test_what_says_nothing_is_left_out_and_counted(config, tmp_path):
    table = make_table(24)
    events = [event(table, row, row) for row in range(24)]
    ids = events[0].candidate_ids
    events += [
        event(table, 0, 100, propensity_logp=0.0, explored=False),
        event(table, 1, 101, propensity_logp=0.0, explored=False),
        event(table, 0, 102, candidate_ids=(*ids[:-1], "gone"), actions=(0,)),
        event(table, 0, 103, candidate_ids=ids[:3], actions=(0,)),
        event(table, 0, 104, actions=(0, 1)),
        event(table, 0, 105, actions=(2, 1)),
    ]
    data = open_logged_data(config, library_of(table), write_log(tmp_path / "log.sqlite", events))
    assert (data.num_certain, data.num_unknown, data.num_other_shape) == (2, 1, 3)
    assert len(data.train) + len(data.held_back or ()) == 24
    assert "2 without exploration, 1 with passages that the corpus lacks, 3" in data.describe()


@pytest.mark.parametrize(("may_stop", "kept"), [(True, [(5,), (0, 5), (0, 1)]), (False, [(0, 1)])])
def test_only_episodes_that_the_policy_could_have_played_are_kept(config, tmp_path, may_stop, kept):
    """Two picks of five candidates, or a stop before where the policy may: action 5."""
    table = make_table(24)
    config = changed(
        config,
        environment={"num_selected": 2},
        selector={"may_stop": may_stop},
        algorithm={"held_back_share": 0.0},
    )
    actions = [(5,), (0, 5), (0, 1), (0,), (0, 1, 5), (0, 1, 2)]
    events = [event(table, n % 24, n, actions=actions[n // 24]) for n in range(144)]
    data = open_logged_data(config, library_of(table), write_log(tmp_path / "log.sqlite", events))
    padded = [(*each, *[-1] * (2 - len(each))) for each in kept for _ in range(24)]
    assert sorted(map(tuple, data.train.actions_QT.tolist())) == sorted(padded)
    assert data.num_other_shape == 144 - len(padded)


def test_a_log_without_exploration_is_refused(config, tmp_path):
    table = make_table(24)
    log = write_log(
        tmp_path / "log.sqlite", [event(table, r, r, propensity_logp=0.0) for r in range(24)]
    )
    with pytest.raises(DataError, match=r"all 24 .* feedback\.explore_share above 0"):
        open_logged_data(config, library_of(table), log)


def test_a_log_without_feedback_is_refused(config, tmp_path):
    table = make_table(3)
    FeedbackStore(tmp_path / "log.sqlite").record_selection(event(table, 0, 0))
    with pytest.raises(DataError, match="1 selections, but no feedback"):
        open_logged_data(config, library_of(table), tmp_path / "log.sqlite")


def test_a_log_of_another_corpus_or_shape_is_refused(config, tmp_path):
    log, table = even_log(tmp_path / "log.sqlite")
    strange = library_of(table)
    strange = Library(MemoryCorpus([table.corpus[0]]), strange.retrievers)
    with pytest.raises(DataError, match=r"none of the 240 .* 240 name a passage"):
        open_logged_data(config, strange, log)
    wider = changed(config, retrieval={"num_candidates": 7})
    with pytest.raises(DataError, match=r"240 have another shape than retrieval\.num_candidates 7"):
        open_logged_data(wider, library_of(table), log)


def test_a_log_that_is_too_small_is_refused(config, tmp_path):
    table = make_table(24)
    log = write_log(tmp_path / "log.sqlite", [event(table, 0, n) for n in range(20)])
    with pytest.raises(DataError, match="1 different questions"):
        open_logged_data(config, library_of(table), log)
    more = changed(config, algorithm={"held_back_share": 0.0}, training={"batch_size": 32})
    with pytest.raises(DataError, match=r"leaves 20 .* training\.batch_size 32"):
        open_logged_data(more, library_of(table), log)


@pytest.mark.parametrize("extreme", [1000.0, -1000.0])
def test_an_extreme_reward_counts_as_the_end_of_the_scale(config, tmp_path, extreme):
    """One of 48: it is clipped and counted, and the estimate stays where the scale ends."""
    table, store = make_table(24), FeedbackStore(tmp_path / "log.sqlite")
    for number in range(48):
        store.record_selection(event(table, number % 24, number))
        store.record_feedback(f"request-{number}", reward=extreme if number == 30 else 0.5)
    everything = changed(config, algorithm={"held_back_share": 0.0})
    found = open_logged_data(everything, library_of(table), tmp_path / "log.sqlite")
    end = 1.0 if extreme > 0 else -1.0
    assert sorted(found.train.rewards_Q.tolist()) == sorted([0.5] * 47 + [end])
    assert found.num_clipped == 1
    assert "1 rewards clipped" in found.describe()
    assert snips(torch.ones(48), torch.from_numpy(found.train.rewards_Q)).value == pytest.approx(
        0.5 + (end - 0.5) / 48
    )


def test_a_log_on_another_scale_is_refused_with_its_range(config, tmp_path):
    table, store = make_table(24), FeedbackStore(tmp_path / "log.sqlite")
    for number in range(24):
        store.record_selection(event(table, number, number))
        store.record_feedback(f"request-{number}", reward=number % 5 + 1)
    with pytest.raises(DataError, match=r"19 of the 24 rewards .* -1 to 1, and range from 1 to 5"):
        open_logged_data(config, library_of(table), tmp_path / "log.sqlite")
    stars = changed(config, algorithm={"reward_range": [1.0, 5.0]})
    assert open_logged_data(stars, library_of(table), tmp_path / "log.sqlite").num_clipped == 0


def test_selections_of_one_question_share_its_number(config, tmp_path):
    table = make_table(24)
    log = write_log(tmp_path / "log.sqlite", [event(table, n % 24, n) for n in range(48)])
    everything = changed(config, algorithm={"held_back_share": 0.0})
    part = open_logged_data(everything, library_of(table), log).train
    assert part.questions_Q.tolist() == [*range(24), *range(24)]


def test_a_scale_without_a_width_is_refused(config):
    with pytest.raises(ConfigError, match="reward_range is 1 to 1; give two numbers"):
        changed(config, algorithm={"reward_range": [1.0, 1.0]})


def test_paths_are_played_again_from_their_actions(tmp_path):
    """What they found follows from them; what cannot be played any more is left out and counted."""
    corpus = sample_corpus()
    retrieval = RetrievalConfig(kind="bm25", encoder=None, num_candidates=4)
    config = changed(
        RunConfig(cache_dir=str(tmp_path), retrieval=retrieval),
        environment={"id": HOPS, "num_selected": 2, "hops": {"num_revealed": 2}},
        selector={"kind": "slots", "may_stop": True},
        algorithm={"name": "feedback", "log": "log.sqlite", "held_back_share": 0.0},
        training={"batch_size": 4},
    )
    retrievers = open_retrievers(corpus, retrieval, tmp_path)
    library = Library(corpus, retrievers, looks_further=True, graph=PassageGraph.build(corpus, ()))
    questions = QuestionSet.of(sample_questions(), DataReport("sample", 25, 25))
    table = candidates_of(library, questions, config)
    policy = open_policy(config, table)
    rows = np.arange(8)
    episodes = open_episodes(config.environment, len(rows), table, Unrewarded())
    played = play(episodes, policy, rows, Draws([[0, int(row)] for row in rows]))
    hopped = [path for path in played.paths if any(turn.found for turn in path.turns()[1:])]
    assert hopped, "no path found more than its question's hits"
    events = [
        event(
            table,
            row,
            row,
            actions=tuple(played.actions_ET[row][played.acts_ET[row]].tolist()),
            propensity_logp=float(played.logp_E[row]),
            action_logps=tuple(played.logp_ET[row][played.acts_ET[row]].tolist()),
            num_selected=2,
        )
        for row in rows.tolist()
    ]
    unlike = {"propensity_logp": -1.0, "action_logps": (-0.5, -0.5), "num_selected": 2}
    elsewhere = event(table, 9, 9, actions=(7, 0), **unlike)  # an empty slot
    longer = event(table, 10, 10, actions=(0, 1, 2), **unlike | {"action_logps": (-1.0, 0.0, 0.0)})
    log = write_log(tmp_path / "log.sqlite", [*events, elsewhere, longer])
    found = open_logged_data(config, library, log)
    assert len(found.train) == len(events)
    assert found.num_other_shape == 2
    again = replay(
        config.environment, found.train.candidates, np.arange(len(events)), found.train.actions_QT
    )
    assert again.evidence == played.evidence
    logp = policy.log_prob(again).sum(dim=1).tolist()
    assert logp == pytest.approx(found.train.propensity_logp_Q.tolist(), abs=1e-5)
    trainer = LoggedTrainer(config, found, SingleWorker(), min_ess=1.0)
    metrics = trainer.step(0, pauses_after=False)
    assert metrics["mean_ratio"] == pytest.approx(1.0, abs=1e-5)
