"""Hops and searches: the rules one by one, against plain Python, and against DocumentSelection."""

from __future__ import annotations

import warnings
from dataclasses import replace

import gymnasium as gym
import hop_cases as cases
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hop_cases import Anew, Answers, Edges, Fixed, OnTitle, OrderReward, make_batch, make_env, ring
from hypothesis import given, settings
from hypothesis import strategies as st

import envs  # noqa: F401  registers the environments
from rlrag.config import EnvironmentConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_hops import DocumentHopsEnv, DocumentHopsVectorEnv
from rlrag.environment.document_selection import DocumentSelectionEnv
from rlrag.environment.episodes import open_episodes
from rlrag.environment.rollout import Unrewarded, play
from rlrag.environment.vector import DocumentSelectionVectorEnv
from rlrag.errors import ConfigError, EpisodeError, GenerationError, RetrievalError
from rlrag.records import FoundPassage, Passage, PathTurn
from rlrag.retrieval.protocol import Hits
from rlrag.selection.protocol import Actions
from rlrag.selection.slot_features import GLOBAL_FEATURES, SLOT_FEATURES

ID = "rlrag/DocumentHops-v1"
N, K = 8, 3  # of `cases.PARTS`


def shown(env) -> list[str]:
    """Ids of the passages in the pool."""
    return [passage.id for passage in env._simulation.texts[0].passages]


def column(observation, name: str) -> list[float]:
    """A feature of the filled slots."""
    num_filled = observation["filled"].sum()
    return observation["slot_features"][:num_filled, SLOT_FEATURES.index(name)].tolist()


def overall(observation, name: str) -> float:
    return float(observation["global"][GLOBAL_FEATURES.index(name)])


def run(env, actions, row: int = 0):
    """The result of the last action in the episode of a question."""
    result = env.reset(options={"question_row": row})
    for action in actions:
        result = env.step(action)
    return result


# The pool at the start


def test_an_episode_starts_with_the_first_hits():
    env = make_env(edges=ring(), retriever=Answers(), writers=(OnTitle(),))
    observation, info = run(env, [], row=1)
    assert shown(env) == ["p1", "p2"]
    assert info["passages"] == tuple(passage.contents for passage in cases.PASSAGES[1:3])
    assert observation["filled"].tolist() == [1, 1] + [0] * 6
    assert observation["order"].tolist() == [N] * K
    assert info["queries"] == (None,) * K
    assert info["action_mask"].tolist() == [True] * 2 + [False] * (N - 2 + K) + [True]
    assert info["action_mask"].dtype == np.bool_
    table = cases.make_table()
    np.testing.assert_array_equal(
        observation["slot_embeddings"],
        np.concatenate([table.passage_vectors_PD[[1, 2]], np.zeros((6, 2), np.float32)]),
    )
    np.testing.assert_array_equal(observation["question_embedding"], table.question_vectors_QD[1])


def test_passages_whose_title_the_question_names_come_behind_the_hits():
    env = make_env(edges=Edges({}, named=[9, 0, 9]))
    observation, _ = run(env, [])
    assert shown(env) == ["p0", "p1", "p9"]
    assert column(observation, "named") == [1.0, 0.0, 1.0]
    assert column(observation, "in_first_list") == [1.0, 1.0, 0.0]
    assert overall(observation, "named_left") == 2.0
    path = run(env, [env.action_space.n - 1])[4]["path"].turns()
    assert path[0].found[2] == FoundPassage(2, "p9", "title")


def test_named_passages_without_room_are_counted():
    env = make_env(edges=Edges({}, named=[9, 10, 11]), settings={"num_slots": 4})
    path = run(env, [int(env.action_space.n) - 1])[4]["path"].turns()
    assert [found.passage_id for found in path[0].found] == ["p0", "p1", "p9", "p10"]
    assert path[0].num_left_out == 1


# Picks are hops


def test_a_pick_reveals_its_best_new_neighbours():
    env = make_env(edges=Edges({0: [(5, 3, 1.0), (1, 0, 9.0), (6, 0, 30.0), (7, 3, 20.0)]}))
    observation, reward, ended, cut, info = run(env, [0])
    assert (reward, ended, cut) == (0.0, False, False)
    assert shown(env) == ["p0", "p1", "p6", "p7"]  # 1 was there, 5 is the third best
    assert observation["order"].tolist() == [0, N, N]
    assert observation["picked"].tolist() == [1] + [0] * 7
    assert info["action_mask"][:N].tolist() == [False, True, True, True] + [False] * 4
    assert column(observation, "title_out") == [0.0, 9.0, 30.0, 0.0]
    assert column(observation, "newest_shared") == [0.0, 0.0, 0.0, 20.0]
    assert column(observation, "turn") == pytest.approx([0.0, 0.0, 1 / 3, 1 / 3])


def test_neighbours_stand_by_edge_plus_similarity():
    table = cases.make_table()
    similarity_P = table.passage_vectors_PD @ table.question_vectors_QD[0]
    near = [row for row in range(3, 12)]
    env = make_env(edges=Edges({0: [(row, 3, 1.0) for row in near]}), settings={"num_revealed": 5})
    observation, *_ = run(env, [0])
    expected = sorted(near, key=lambda row: -similarity_P[row])[:5]
    assert shown(env)[2:] == [f"p{row}" for row in expected]
    assert column(observation, "similarity")[2:] == pytest.approx(similarity_P[expected].tolist())


def test_several_edges_to_one_passage_are_all_told_and_reveal_it_once():
    env = make_env(edges=Edges({0: [(5, 3, 2.0), (5, 0, 7.0), (5, 3, 3.0), (0, 2, 50.0)]}))
    observation, *_ = run(env, [0])
    assert shown(env) == ["p0", "p1", "p5"]
    assert (column(observation, "shared")[2], column(observation, "title_out")[2]) == (3.0, 7.0)
    path = run(env, [0, int(env.action_space.n) - 1])[4]["path"].turns()
    assert path[1].found == (FoundPassage(2, "p5", "hop", 0, "title_out"),)


def test_edges_are_told_from_any_pick_and_from_the_newest():
    edges = Edges({0: [(5, 0, 7.0)], 1: [(5, 3, 2.0), (6, 3, 4.0)], 5: [(6, 1, 3.0)]})
    observation, *_ = run(make_env(edges=edges), [0, 1])
    # Slots: 0 -> p0, 1 -> p1, 2 -> p5, 3 -> p6.
    assert column(observation, "title_out") == [0.0, 0.0, 7.0, 0.0]
    assert column(observation, "shared") == [0.0, 0.0, 2.0, 4.0]
    assert column(observation, "newest_title_out") == [0.0] * 4
    assert column(observation, "newest_shared") == [0.0, 0.0, 2.0, 4.0]


def test_what_a_later_hop_finds_is_told_its_edges_from_earlier_picks():
    # Pick 0 has room for one neighbour, p6; p5 comes with pick 1 and has an edge from pick 0 too.
    edges = Edges({0: [(6, 0, 9.0), (5, 0, 7.0)], 1: [(5, 3, 2.0)]})
    env = make_env(edges=edges, settings={"num_revealed": 1})
    observation, *_ = run(env, [0, 1])
    assert shown(env) == ["p0", "p1", "p6", "p5"]
    assert column(observation, "title_out") == [0.0, 0.0, 9.0, 7.0]
    assert column(observation, "newest_shared") == [0.0, 0.0, 0.0, 2.0]


def test_a_passage_without_edges_reveals_nothing():
    env = make_env(edges=Edges({}))
    observation, _, ended, *_ = run(env, [0])
    assert not ended
    assert observation["filled"].sum() == 2
    path = run(env, [0, int(env.action_space.n) - 1])[4]["path"].turns()
    assert path[1] == PathTurn("pick", 0, "p0")


def test_a_full_pool_takes_nothing_in_and_keeps_all():
    env = make_env(edges=ring(), retriever=Answers(), writers=(Anew(),), settings={"num_slots": 3})
    observation, _, ended, _, info = run(env, [0])
    assert shown(env) == ["p0", "p1", "p4"]
    assert not ended
    assert not info["action_mask"][3:-1].any()  # nothing that a search finds would have room
    assert info["queries"] == (None,) * K
    assert overall(observation, "filled") == 1.0
    path = env.step(1)[4] and env.step(int(env.action_space.n) - 1)[4]["path"].turns()
    assert [turn.num_left_out for turn in path] == [0, 1, 2, 0]
    assert shown(env) == ["p0", "p1", "p4"]


def test_a_passage_that_was_brought_leads_nowhere():
    """It stands behind the corpus that the graph was built over."""

    class OfTheCorpus(Edges):
        def neighbours(self, row):
            if row >= cases.NUM_PASSAGES:
                raise IndexError(row)
            return super().neighbours(row)

    plain = cases.make_table()
    brought = Passage("b", "Brought", "Text of its own.")
    rows = plain.rows_QN.copy()
    rows[:, 0] = cases.NUM_PASSAGES
    table = replace(
        plain,
        corpus=MemoryCorpus([*cases.PASSAGES, brought]),
        rows_QN=rows,
        brought_vectors_XD=np.ones((1, 2), dtype=np.float32),
    )
    env = make_env(candidates=table, edges=OfTheCorpus(ring().edges))
    run(env, [0])
    assert shown(env)[:2] == ["b", "p1"]
    before = len(shown(env))
    _, _, ended, _, info = env.step(1)
    assert not ended
    assert len(info["passages"]) > before  # the other one has edges


# Searches


def search(writer: int = 0, chosen: int = 0) -> int:
    return N + writer * K + chosen


def test_a_search_adds_its_new_hits_in_their_order():
    answers = Answers({"Title 1": [7, 0, 9]})
    env = make_env(retriever=answers, writers=(OnTitle(),))
    observation, *_, info = run(env, [1, 0, search(0, 0)])
    assert answers.calls == [["Title 1"]]
    assert shown(env) == ["p0", "p1", "p7", "p9"]
    # 1, 1/2 and 1/3 less their mean, in standard deviations; of two scores one is 1 and one -1.
    assert column(observation, "newest_score") == pytest.approx(
        [-0.3922, 0, 1.3728, -0.9806], abs=1e-4
    )
    assert column(observation, "best_score") == pytest.approx([1, -1, 1.3728, -0.9806], abs=1e-4)
    assert column(observation, "reciprocal_rank") == pytest.approx([1.0, 0.5, 1.0, 1 / 3])
    assert info["queries"] == (None, "Title 0", None)
    assert overall(observation, "queries") == 0.5
    np.testing.assert_array_equal(
        observation["slot_embeddings"][2:4], cases.make_table().passage_vectors_PD[[7, 9]]
    )


def test_what_a_search_finds_is_told_its_edges_from_the_picks():
    edges = Edges({0: [(1, 0, 9.0), (2, 0, 8.0), (7, 2, 1.5)], 1: [(9, 3, 2.5)]})
    answers = Answers({"Title 1": [7, 9]})
    env = make_env(
        edges=edges, retriever=answers, writers=(OnTitle(),), settings={"num_revealed": 1}
    )
    observation, *_ = run(env, [0, 1, search(0, 1)])
    slots = dict(zip(shown(env), range(N), strict=False))
    assert column(observation, "document")[slots["p7"]] == 1.5
    assert column(observation, "newest_document")[slots["p7"]] == 0.0
    assert column(observation, "newest_shared")[slots["p9"]] == 2.5


def test_a_writer_that_needs_no_pick_has_one_action():
    env = make_env(retriever=Answers(), writers=(Anew(), OnTitle()))
    _, info = run(env, [])
    assert info["action_mask"][N:-1].tolist() == [True, False, False] + [False] * 3
    *_, info = env.step(1)
    assert info["action_mask"][N:-1].tolist() == [True, False, False] * 2
    assert info["queries"][3] == "Title 1"
    assert info["queries"][0] == "what about word0 and word4? 1"


def test_a_query_is_issued_once_in_an_episode():
    env = make_env(retriever=Answers(), writers=(Fixed("the same"), Fixed("the same")))
    _, info = run(env, [])
    assert info["action_mask"][[search(0), search(1)]].tolist() == [True, True]
    *_, info = env.step(search(0))
    assert info["action_mask"][[search(0), search(1)]].tolist() == [False, False]
    *_, info = env.step(0)
    assert info["action_mask"][[search(0), search(1)]].tolist() == [False, False]
    assert run(env, [])[1]["action_mask"][search(1)]  # in the next episode it is new again


def test_a_query_that_is_issued_again_ends_the_episode_as_invalid():
    answers, reward = Answers(), OrderReward()
    env = make_env(retriever=answers, writers=(Fixed("the same"),), reward=reward)
    observation, value, ended, cut, info = run(env, [0, search(), search()])
    assert (value, ended, cut) == (-1.0, True, False)
    assert info["valid"] is False
    assert [passage.id for passage in info["evidence"]] == ["p0"]
    assert answers.calls == [["the same"]]
    assert reward.calls == []
    assert [turn.action for turn in info["path"].turns()] == ["start", "pick", "search", "invalid"]
    assert observation["action_mask"].tolist() == [0] * (N + K) + [1]


@pytest.mark.parametrize("query", [None, "", "  \n", "what about word0 and word4?"])
def test_a_writer_with_nothing_new_to_ask_is_not_allowed(query):
    """Neither nothing, nor an empty query, nor the question itself."""
    answers = Answers()
    env = make_env(retriever=answers, writers=(Fixed(query),))
    _, info = run(env, [])
    assert info["queries"] == (None,) * K
    assert not info["action_mask"][N:-1].any()
    *_, info = env.step(search())
    assert info["valid"] is False
    assert answers.calls == []


@pytest.mark.parametrize(
    "answer",
    [
        Hits(np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32)),
        Hits([], []),
        Hits(np.full((1, 3), -1), np.full((1, 3), -np.inf)),
    ],
)
def test_a_search_that_finds_nothing_takes_its_turn_and_the_episode_goes_on(answer):
    class Nothing:
        def search(self, questions, k):
            return answer

    env = make_env(retriever=Nothing(), writers=(Anew(),))
    observation, _, ended, _, info = run(env, [search()])
    assert not ended
    assert shown(env) == ["p0", "p1"]
    assert overall(observation, "turns") == pytest.approx(1 / (K + 2))
    assert column(observation, "newest_score") == [0.0, 0.0]
    *_, info = env.step(0)
    *_, info = env.step(int(env.action_space.n) - 1)
    assert info["path"].turns()[1].action == "search"
    assert info["path"].turns()[1].found == ()
    assert info["reward_terms"]["num_queries"] == 1.0


def test_hits_without_room_are_counted_and_a_hit_counts_once():
    answers = Answers({"Title 0": [5, 5, 6]})
    env = make_env(retriever=answers, writers=(OnTitle(),), settings={"num_slots": 3})
    run(env, [0, 3])
    path = env.step(int(env.action_space.n) - 1)[4]["path"].turns()
    assert shown(env) == ["p0", "p1", "p5"]
    assert path[2].query == "Title 0"
    assert path[2].num_left_out == 1


def test_searches_end_with_their_number():
    env = make_env(retriever=Answers(), writers=(Anew(),), settings={"max_queries": 1})
    *_, info = run(env, [search(), 0])
    assert info["queries"] == (None,) * K
    assert not info["action_mask"][search()]


def test_a_search_needs_a_turn_after_it():
    """Nobody could pick what it finds; the last turn is for a pick."""
    env = make_env(retriever=Answers(), writers=(Anew(),), settings={"max_turns": 2})
    _, info = run(env, [])
    assert info["action_mask"][search()]
    *_, info = env.step(0)
    assert not info["action_mask"][search()]
    assert info["action_mask"][1]


# The end


def test_the_turn_limit_forces_a_stop_that_is_rewarded():
    reward = OrderReward()
    env = make_env(reward=reward, edges=ring(), settings={"max_turns": 2})
    observation, value, ended, cut, info = run(env, [1, 0])
    assert (ended, cut) == (True, True)
    assert reward.calls == [[("q0", ("p1", "p0"))]]
    assert value == pytest.approx(1.0)
    assert info["valid"] is True
    assert info["answer"] == "p1 p0"
    assert observation["action_mask"].tolist() == [0] * N + [1]
    with pytest.raises(ResetNeeded):
        env.step(N)


def test_the_last_pick_ends_without_truncation_also_in_the_last_turn():
    env = make_env(num_selected=2, settings={"max_turns": 2})
    assert run(env, [1, 0])[2:4] == (True, False)


def test_without_auto_stop_only_the_stop_is_left_after_the_last_pick():
    env = make_env(
        num_selected=2,
        retriever=Answers(),
        writers=(Anew(),),
        settings={"auto_stop": False},
    )
    _, _, ended, _, info = run(env, [1, 0])
    assert not ended
    assert info["action_mask"].tolist() == [False] * (N + 2) + [True]
    assert env.step(N + 2)[2:4] == (True, False)


def test_a_pick_can_be_required_before_the_stop():
    env = make_env(settings={"require_pick": True})
    _, info = run(env, [])
    assert not info["action_mask"][-1]
    *_, info = env.step(0)
    assert info["action_mask"][-1]
    _, value, ended, _, info = run(env, [N])
    assert (value, ended, info["valid"]) == (-1.0, True, False)


def test_costs_are_taken_off_the_reward_and_counted():
    costs = {"pick_cost": 0.5, "query_cost": 0.25, "turn_cost": 0.125}
    env = make_env(retriever=Answers(), writers=(Anew(),), settings=costs)
    _, value, _, _, info = run(env, [search(), 1, 0, N + K])
    assert value == pytest.approx(1.0 - 2 * 0.5 - 0.25 - 3 * 0.125)
    terms = {"place": 1.0, "num_picks": 2.0, "num_queries": 1.0, "num_turns": 3.0}
    assert info["reward_terms"] == terms


@pytest.mark.parametrize("action", [3, 0])
def test_a_slot_that_is_empty_or_picked_ends_the_episode_as_invalid(action):
    env = make_env(invalid_reward=-7.0, settings={"pick_cost": 1.0})
    _, value, ended, _, info = run(env, [0, action])
    assert (value, ended, info["valid"]) == (-7.0, True, False)
    assert info["reward_terms"] == {}
    assert [turn.action for turn in info["path"].turns()] == ["start", "pick", "invalid"]


def test_the_path_tells_each_turn():
    answers = Answers({"Title 4": [9]})
    env = make_env(edges=ring(), retriever=answers, writers=(Anew(), OnTitle()))
    *_, info = run(env, [0, 2, search(1, 1), 3])
    path = info["path"].turns()
    assert path[0] == PathTurn(
        "start",
        query="what about word0 and word4?",
        found=(FoundPassage(0, "p0", "query"), FoundPassage(1, "p1", "query")),
    )
    assert path[1] == PathTurn(
        "pick",
        0,
        "p0",
        found=(
            FoundPassage(2, "p4", "hop", 0, "title_out"),
            FoundPassage(3, "p8", "hop", 0, "title_in"),
        ),
    )
    assert (path[2].slot, path[2].passage_id) == (2, "p4")
    assert path[3].action == "search"
    assert (path[3].slot, path[3].passage_id) == (2, "p4")
    assert (path[3].writer, path[3].query) == (1, "Title 4")
    assert [found.passage_id for found in path[3].found] == ["p9"]
    assert [turn.action for turn in path[4:]] == ["pick"]
    assert [passage.id for passage in info["evidence"]] == ["p0", "p4", "p8"]


def test_words_of_the_question_are_covered_by_picks():
    env = make_env()  # question 0 has about, word0, word4; passage i has word i and word i + 1
    observation, _ = run(env, [])
    assert column(observation, "uncovered") == pytest.approx([1 / 3, 0.0])
    observation, *_ = env.step(0)
    assert overall(observation, "covered") == pytest.approx(1 / 3)
    assert column(observation, "uncovered") == [0.0, 0.0]


# Gymnasium


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: gym.make(ID).unwrapped, id="registered"),
        pytest.param(lambda: gym.make(f"envs:{ID}", num_selected=1).unwrapped, id="one-pick"),
        pytest.param(
            lambda: (
                gym.make(
                    ID, **cases.arguments(candidates=cases.make_table(vector_size=0), edges=ring())
                ).unwrapped
            ),
            id="no-vectors",
        ),
        pytest.param(lambda: gym.make(ID, render_mode="ansi").unwrapped, id="ansi"),
    ],
)
def test_check_env_passes_without_warnings(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(build())


def test_random_masked_episodes_stay_in_the_space_and_are_valid():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(ID, settings={"num_first": 3, "num_slots": 10})
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    kinds, num_episodes = set(), 0
    while num_episodes < 60:
        assert observation in env.observation_space
        np.testing.assert_array_equal(observation["action_mask"], info["action_mask"])
        np.testing.assert_array_equal(info["action_mask"], env.get_wrapper_attr("action_masks")())
        mask = info["action_mask"].astype(np.int8)
        mask[-1] = mask[:-1].sum() == 0 or num_episodes % 7 == 0
        observation, _, ended, _, info = env.step(env.action_space.sample(mask=mask))
        if ended:
            assert info["valid"]
            kinds |= {found.by for turn in info["path"].turns() for found in turn.found}
            kinds |= {turn.action for turn in info["path"].turns()}
            num_episodes += 1
            observation, info = env.reset()
    assert kinds == {"query", "hop", "title", "start", "pick", "search", "stop"}


def test_changing_an_observation_changes_nothing_later():
    env = make_env(edges=ring())
    first, _ = env.reset(options={"question_row": 0})
    other = make_env(edges=ring())
    other.reset(options={"question_row": 0})
    for array in first.values():
        array[...] = 1
    assert data_equivalence(env.step(1)[0], other.step(1)[0], exact=True)


def test_actions_outside_the_space_are_refused():
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="outside"):
        env.step(N + 1)


def test_ansi_shows_searches_and_invalid_actions():
    env = make_env(retriever=Answers(), writers=(Anew(),), render_mode="ansi")
    run(env, [search(), 0, 0])
    assert env.render() == (
        "Question q0: what about word0 and word4?\n"
        "Picked 1 of at most 3:\n"
        "  1. Title 0 (candidate 0)\n"
        "Searched for: what about word0 and word4? 0\n"
        "Ended by an invalid action.\n"
        "Reward: -1.000\n"
    )


def test_pictures_have_a_column_for_each_slot():
    env = make_env(render_mode="rgb_array")
    run(env, [1])
    assert env.render().shape == (K * 16 + 1, N * 16 + 1, 3)


# What cannot be


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": {"num_first": 5}}, "num_first is 5 but a question has 4 candidates"),
        ({"settings": {"num_slots": 1}}, "num_slots is 1, less than the 2 hits"),
        ({"num_selected": 9}, "num_selected is 9 but a pool has 8 slots"),
        ({"writers": (Anew(),)}, "need a retriever"),
        (
            {"writers": (Anew(),), "retriever": Answers(), "settings": {"num_hits": 13}},
            "num_hits is 13 but the corpus has 12",
        ),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changed, said):
    with pytest.raises(ConfigError, match=said):
        make_env(**changed)


@pytest.mark.parametrize(
    ("edge", "said"),
    [
        ((12, 0, 1.0), "rows from 12 to 12, but the corpus has rows 0 to 11"),
        ((-1, 0, 1.0), "rows from -1"),
        ((1, 6, 1.0), r"kinds \[6\]"),
        ((1, 0, -1.0), "not negative"),
        ((1, 0, float("nan")), "finite"),
    ],
)
def test_a_graph_of_something_else_is_named(edge, said):
    env = make_env(edges=Edges({0: [edge]}))
    env.reset(options={"question_row": 0})
    with pytest.raises(EpisodeError, match=said):
        env.step(0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Hits(np.array([[99]]), np.ones((1, 1))), "not among the 12 of the corpus"),
        (Hits(np.array([[1]]), np.ones((1, 1)), (cases.PASSAGES[0],)), "not among the 12"),
        (Hits(np.array([[1]]), np.full((1, 1), np.nan)), "scores of the query 'what about"),
        (Hits(np.array([[1], [2]]), np.ones((2, 1))), r"answered 1 queries with rows of shape"),
        (Hits(np.array([[1]]), np.ones((1, 2))), r"scores of shape \(1, 2\)"),
    ],
)
def test_a_retriever_that_answers_something_else_is_named(answer, said):
    class Wrong:
        def search(self, questions, k):
            return answer

    env = make_env(retriever=Wrong(), writers=(Anew(),))
    env.reset(options={"question_row": 0})
    with pytest.raises(RetrievalError, match=said):
        env.step(search())


@pytest.mark.parametrize("written", [[], [1], ["one", "too many"]])
def test_a_writer_that_gives_something_else_is_named(written):
    class Wrong(Anew):
        def write(self, questions, picks, chosen):
            return written

    env = make_env(retriever=Answers(), writers=(Wrong(),))
    with pytest.raises(EpisodeError, match="query writer 0, Wrong"):
        env.reset(seed=0)


@pytest.mark.parametrize("broken", ["retriever", "writer", "graph"])
def test_a_step_that_a_part_failed_can_be_taken_again(broken):
    class Weak:
        fails = False

        def check(self, part):
            if self.fails and part == broken:
                raise RetrievalError("not now")

    weak = Weak()

    class WeakAnswers(Answers):
        def search(self, questions, k):
            weak.check("retriever")
            return super().search(questions, k)

    class WeakWriter(OnTitle):
        def write(self, questions, picks, chosen):
            weak.check("writer")
            return super().write(questions, picks, chosen)

    class WeakEdges(Edges):
        def neighbours(self, row):
            weak.check("graph")
            return super().neighbours(row)

    def build():
        return make_env(
            edges=WeakEdges(ring().edges),
            retriever=WeakAnswers({"Title 0": [9]}),
            writers=(WeakWriter(),),
        )

    action = search() if broken == "retriever" else 1
    env, other = build(), build()
    for each in (env, other):
        run(each, [0])
    weak.fails = True
    with pytest.raises(RetrievalError, match="not now"):
        env.step(action)
    weak.fails = False
    ours, theirs = env.step(action), other.step(action)
    assert data_equivalence(ours[0], theirs[0], exact=True)
    assert ours[4]["queries"] == theirs[4]["queries"]
    assert env.step(int(env.action_space.n) - 1)[4]["path"].turns() == (
        other.step(int(other.action_space.n) - 1)[4]["path"].turns()
    )


def test_a_failed_reward_is_raised_by_the_scalar_and_told_by_the_vector_environment():
    reward = OrderReward(failing=("q1",))
    env = make_env(reward=reward)
    with pytest.raises(GenerationError, match="no answer for q1"):
        run(env, [N], row=1)
    batch = make_batch(2, reward=reward)
    batch.reset(options={"question_rows": [1, 2]})
    _, rewards, ended, _, infos = batch.step([N, N])
    assert ended.all()
    assert np.isnan(rewards).tolist() == [True, False]
    assert isinstance(infos["error"][0], GenerationError)
    assert infos["path"][0].turns()[-1] == PathTurn("stop")


# Against DocumentSelection


def without_hops(**changed):
    """Arguments with which it plays as DocumentSelection does."""
    return {"candidates": cases.make_table(), "reward": OrderReward(), "num_selected": 3} | changed


SAME = ("question_embedding", "picked", "order", "action_mask")
SAME_INFOS = ("question_id", "question", "question_row", "passages", "golden_answers")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_without_hops_and_searches_it_is_document_selection(data):
    num_selected = data.draw(st.integers(1, 4))
    ours = DocumentHopsEnv(**without_hops(num_selected=num_selected))
    theirs = DocumentSelectionEnv(**without_hops(num_selected=num_selected))
    assert ours.action_space == theirs.action_space
    for name in SAME:
        assert ours.observation_space[name] == theirs.observation_space[name]
    seed = data.draw(st.integers(0, 99))
    results = [ours.reset(seed=seed), theirs.reset(seed=seed)]
    for _ in range(8):
        assert_same(*results)
        over = len(results[0]) == 5 and results[0][2]
        if over:
            assert ours.np_random.bit_generator.state == theirs.np_random.bit_generator.state
            results = [ours.reset(), theirs.reset()]
        else:
            action = data.draw(st.integers(0, 4))
            results = [ours.step(action), theirs.step(action)]


def assert_same(ours, theirs):
    for name in SAME:
        np.testing.assert_array_equal(ours[0][name], theirs[0][name])
        assert ours[0][name].dtype == theirs[0][name].dtype
    assert ours[1:-1] == theirs[1:-1]  # rewards and ends
    for name in theirs[-1]:
        if name == "reward_terms":
            assert theirs[-1][name].items() <= ours[-1][name].items()
        else:
            np.testing.assert_equal(ours[-1][name], theirs[-1][name])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_batch_without_hops_is_a_batch_of_document_selection(mode):
    ours = DocumentHopsVectorEnv(5, autoreset_mode=mode, **without_hops())
    theirs = DocumentSelectionVectorEnv(5, autoreset_mode=mode, **without_hops())
    ours.action_space.seed(1)
    results = [ours.reset(seed=3), theirs.reset(seed=3)]
    for _ in range(40):
        for name in SAME:
            np.testing.assert_array_equal(results[0][0][name], results[1][0][name])
        for name in SAME_INFOS:
            np.testing.assert_equal(results[0][-1][name], results[1][-1][name])
        if len(results[0]) == 5:
            for one, other in zip(results[0][1:4], results[1][1:4], strict=True):
                np.testing.assert_array_equal(one, other)
        actions = ours.action_space.sample()
        if mode is AutoresetMode.DISABLED:
            over = ~results[0][0]["action_mask"][:, :4].any(axis=1)
            if over.any():
                options = {"reset_mask": over}
                results = [ours.reset(options=options), theirs.reset(options=options)]
                results = [(each[0], {}) for each in results]
                results = [ours.step([4] * 5), theirs.step([4] * 5)]
                continue
        results = [ours.step(actions), theirs.step(actions)]


# Many at once


def full_world(**changed):
    answers = Answers({f"Title {i}": [(i + 6) % 12, (i + 3) % 12, i] for i in range(12)})
    return {
        "edges": ring(),
        "retriever": answers,
        "writers": (Anew(), OnTitle()),
        "settings": {"pick_cost": 0.1, "max_turns": 4},
    } | changed


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_batch_of_n_equals_n_scalar_environments(data):
    num_envs = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(0, 3), min_size=num_envs, max_size=num_envs))
    batch = make_batch(num_envs, **full_world())
    scalars = [make_env(**full_world()) for _ in range(num_envs)]
    stop = int(batch.single_action_space.n) - 1
    observations, infos = batch.reset(options={"question_rows": rows})
    for i, scalar in enumerate(scalars):
        check_row(i, observations, infos, *scalar.reset(options={"question_row": rows[i]}))
    over = np.zeros(num_envs, dtype=bool)
    for _ in range(5):
        # Mostly what is allowed, so that episodes get somewhere.
        actions = np.full(num_envs, stop)
        for i in np.flatnonzero(~over).tolist():
            allowed = np.flatnonzero(observations["action_mask"][i]).tolist()
            anything = st.integers(0, stop)
            actions[i] = data.draw(st.one_of(st.sampled_from(allowed), anything))
        observations, rewards, terminated, truncated, infos = batch.step(actions)
        for i, scalar in enumerate(scalars):
            if over[i]:
                assert (rewards[i], terminated[i], truncated[i]) == (0.0, False, False)
                continue
            observation, reward, is_over, is_cut, info = scalar.step(int(actions[i]))
            assert (rewards[i], terminated[i], truncated[i]) == (reward, is_over, is_cut)
            check_row(i, observations, infos, observation, info)
        over |= terminated
        if over.all():
            break


def check_row(i, observations, infos, observation, info):
    """Sub-environment i of the batch shows what the scalar environment shows."""
    assert data_equivalence({k: v[i] for k, v in observations.items()}, observation, exact=True)
    told = {name for name in infos if not name.startswith("_") and infos[f"_{name}"][i]}
    assert told == set(info)
    for name, value in info.items():
        if name == "reward_terms":
            terms = {
                n: a[i] for n, a in infos[name].items() if infos[name].get(f"_{n}", [0] * 9)[i]
            }
            assert terms == value
        else:
            np.testing.assert_equal(infos[name][i], value)


@given(st.lists(st.integers(0, 14), max_size=8))
@settings(max_examples=150, deadline=None)
def test_episodes_follow_the_rules_written_as_a_loop(actions):
    """Pools, masks and ends, from lists and dictionaries in place of arrays."""
    env = make_env(**full_world())
    stop = int(env.action_space.n) - 1
    _, info = run(env, [])
    table, answers, edges = cases.make_table(), full_world()["retriever"], ring().edges
    similarity_P = table.passage_vectors_PD @ table.question_vectors_QD[0]
    pool, order, issued = [0, 1], [], ["what about word0 and word4?"]
    for turns, action in enumerate(actions):
        may_search = len(issued) < 3 and turns + 1 < 4 and len(pool) < N and len(order) < K
        queries = {N: f"what about word0 and word4? {len(order)}"}
        queries |= {N + K + k: f"Title {pool[slot]}" for k, slot in enumerate(order)}
        allowed = {slot for slot in range(len(pool)) if slot not in order} | {stop}
        if may_search:
            allowed |= {a for a, query in queries.items() if query not in issued}
        assert set(np.flatnonzero(info["action_mask"])) == allowed
        _, _, ended, cut, info = env.step(action)
        if action not in allowed:
            assert (ended, cut, info["valid"]) == (True, False, False)
            break
        if action == stop:
            assert (ended, cut, info["valid"]) == (True, False, True)
            break
        if action < N:
            order.append(action)
            near: dict[int, float] = {}
            for row, _, weight in edges[pool[action]]:
                near[row] = max(weight, near.get(row, 0.0))
            ranked = sorted(near, key=lambda row: -(near[row] + similarity_P[row]))
            found = [row for row in ranked if row not in pool][:2]
        else:
            issued.append(queries[action])
            found = [row for row in answers.rows.get(queries[action], []) if row not in pool]
        ends = len(order) == K or turns == 3
        if not (ends and action < N):
            pool += found[: N - len(pool)]
        assert shown(env) == [f"p{row}" for row in pool]
        assert (ended, cut) == (ends, turns == 3 and len(order) < K)
        if ended:
            assert [p.id for p in info["evidence"]] == [f"p{pool[slot]}" for slot in order]
            break


def test_all_searches_of_a_step_are_one_call_with_equal_queries_once():
    answers, writer = Answers({"Title 0": [9], "Title 1": [8]}), OnTitle()
    batch = make_batch(4, retriever=answers, writers=(writer,))
    batch.reset(options={"question_rows": [0, 0, 1, 2]})
    batch.step([0, 0, 0, 0])
    assert answers.calls == []
    assert writer.calls == [4]
    observations, *_ = batch.step([search(), search(), search(), 1])
    assert answers.calls == [["Title 0", "Title 1"]]
    assert writer.calls == [4, 2]  # the pick's titles alone are new
    assert observations["filled"].sum(axis=1).tolist() == [3, 3, 3, 2]


def test_a_hop_asks_no_retriever_and_the_graph_once_a_question_and_passage():
    answers, edges = Answers(), ring()
    batch = make_batch(4, edges=edges, retriever=answers, writers=(OnTitle(),))
    batch.reset(options={"question_rows": [0, 0, 0, 1]})
    batch.step([0, 0, 1, 1])
    assert answers.calls == []
    assert sorted(edges.asked) == [0, 1, 2]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_equals_gymnasiums_own_vectorisation(mode):
    num_envs = 3
    ours = DocumentHopsVectorEnv(num_envs, autoreset_mode=mode, **cases.arguments(**full_world()))
    theirs = SyncVectorEnv([lambda: make_env(**full_world())] * num_envs, autoreset_mode=mode)
    ours.np_random, shared = np.random.default_rng(0), np.random.default_rng(0)
    for env in theirs.envs:
        env.unwrapped.np_random = shared
    rng = np.random.default_rng(1)
    ours_now, theirs_now = ours.reset(), theirs.reset()
    for _ in range(60):
        assert data_equivalence(ours_now[0], theirs_now[0], exact=True)
        for one, other in zip(ours_now[1:-1], theirs_now[1:-1], strict=True):
            np.testing.assert_array_equal(one, other)
        assert set(ours_now[-1]) == set(theirs_now[-1])
        for name in ("passages", "queries", "path"):
            if name in theirs_now[-1]:
                np.testing.assert_equal(ours_now[-1][name], theirs_now[-1][name])
        masks = ours_now[0]["action_mask"]
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        ours_now, theirs_now = ours.step(actions), theirs.step(actions)
        if mode is AutoresetMode.DISABLED and ours_now[2].any():
            options = {"reset_mask": ours_now[2]}
            ours_now, theirs_now = ours.reset(options=options), theirs.reset(options=options)


def test_a_reset_mask_starts_only_those_sub_environments():
    batch = make_batch(2, **full_world())
    batch.reset(options={"question_rows": [0, 1]})
    batch.step([0, 1])
    batch.step([int(batch.single_action_space.n) - 1, 0])
    options = {"reset_mask": np.array([True, False]), "question_rows": [3, -1]}
    observations, infos = batch.reset(options=options)
    assert infos["question_id"].tolist() == ["q3", None]
    assert observations["filled"].sum(axis=1).tolist() == [2, 6]
    assert observations["order"].tolist() == [[N] * K, [1, 0, N]]
    assert not observations["slot_embeddings"][0, 2:].any()


# Rollouts


class FirstAllowed:
    """Picks and searches in turns: the last allowed action but the stop."""

    def act(self, observations, infos, turn):
        mask_EA = observations["action_mask"].copy()
        mask_EA[:, -1] = 0
        actions_E = mask_EA.shape[1] - 1 - mask_EA[:, ::-1].argmax(axis=1)
        idle_E = ~mask_EA.any(axis=1)
        actions_E[idle_E] = mask_EA.shape[1] - 1
        nothing_E = np.zeros(len(mask_EA))
        return Actions(actions_E, nothing_E, nothing_E)


def test_rollouts_play_it_by_its_id():
    table = cases.make_table()
    batch = open_episodes(EnvironmentConfig(id=ID, num_selected=2), 3, table, Unrewarded())
    found = play(batch, FirstAllowed(), np.array([0, 1, 3]))
    assert [[p.id for p in passages] for passages in found.evidence] == [
        ["p3", "p2"],
        ["p4", "p3"],
        ["p6", "p5"],
    ]
    assert found.terms["num_picks"].tolist() == [2.0] * 3
