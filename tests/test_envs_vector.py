"""The vector environment: Gymnasium's contract, one reward call a step, equal to scalar ones."""

from __future__ import annotations

import itertools
import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_selection import DocumentSelectionEnv
from rlrag.environment.rendering import draw_episode
from rlrag.environment.task import Outcome
from rlrag.environment.vector import DocumentSelectionVectorEnv
from rlrag.errors import GenerationError
from rlrag.records import Passage, Question, RewardResult
from rlrag.retrieval.candidates import CandidateTable

ID = "rlrag/DocumentSelection-v1"
STOP = 4
PASSAGES = tuple(
    Passage(id=f"p{i}", title=f"Title {i}", text=f"Text number {i}.") for i in range(6)
)


class OrderReward:
    """A reward that depends on question and order, and fails for the questions it is told to."""

    def __init__(self, failing: tuple[str, ...] = ()) -> None:
        self.failing = failing
        self.calls: list[list[tuple[str, tuple[str, ...]]]] = []

    def __call__(self, questions, selections):
        asked = [(q.id, tuple(p.id for p in s)) for q, s in zip(questions, selections, strict=True)]
        self.calls.append(asked)
        return [self.one(question_id, ids) for question_id, ids in asked]

    def one(self, question_id, ids):
        if question_id in self.failing:
            return GenerationError(f"no answer for {question_id}")
        place = sum(int(name[1:]) * 10.0**-i for i, name in enumerate(ids))
        terms = {"place": place} | ({"empty": 1.0} if not ids else {})
        return RewardResult(place + int(question_id[1:]), terms, answer=" ".join(ids) or None)


def make_table(num_questions: int = 5):
    """Question q has the candidates q, q + 1, q + 2, q + 3 of six passages."""
    generator = np.random.default_rng(0)
    return CandidateTable(
        questions=tuple(
            Question(f"q{i}", f"question {i}?", (f"gold {i}",)) for i in range(num_questions)
        ),
        corpus=MemoryCorpus(PASSAGES),
        rows_QN=(np.arange(num_questions)[:, None] + np.arange(4)) % len(PASSAGES),
        scores_QNC=generator.normal(size=(num_questions, 4, 2)),
        score_names=("fused", "bm25"),
        question_vectors_QD=generator.normal(size=(num_questions, 3)).astype(np.float32),
        passage_vectors_PD=generator.normal(size=(len(PASSAGES), 3)).astype(np.float32),
    )


def make_batch(num_envs: int = 3, reward=None, num_questions: int = 5, **kwargs):
    return DocumentSelectionVectorEnv(
        num_envs,
        candidates=make_table(num_questions),
        reward=reward or OrderReward(),
        **{"num_selected": 2, "autoreset_mode": AutoresetMode.DISABLED, **kwargs},
    )


def test_make_vec_builds_it_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = gym.make_vec(ID, num_envs=4, vectorization_mode="vector_entry_point")
        observations, infos = batch.reset(seed=0)
        batch.action_space.seed(0)
        for _ in range(20):
            observations, rewards, terminated, truncated, infos = batch.step(
                batch.action_space.sample()
            )
    assert isinstance(batch, DocumentSelectionVectorEnv)
    assert batch.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert observations in batch.observation_space
    assert rewards.shape == terminated.shape == truncated.shape == (4,)
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
    assert not truncated.any()
    assert isinstance(infos["passages"][0][0], str)
    batch.close()


def test_spaces_are_the_scalar_ones_batched():
    batch, scalar = make_batch(3), DocumentSelectionEnv(make_table(), OrderReward(), num_selected=2)
    assert batch.single_action_space == scalar.action_space
    assert batch.single_observation_space == scalar.observation_space
    assert batch.action_space == batch_space(scalar.action_space, 3)
    assert batch.observation_space == batch_space(scalar.observation_space, 3)
    observations, _ = batch.reset(seed=0)
    assert observations in batch.observation_space


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_mode_is_in_the_metadata_of_the_instance_alone(mode):
    for given_mode in (mode, mode.value):
        assert make_batch(autoreset_mode=given_mode).metadata["autoreset_mode"] is mode
    assert DocumentSelectionVectorEnv.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_it_equals_gymnasiums_own_vectorisation(mode):
    """Many questions, drawn in the order of the sub-environments from generators that are equal."""
    num_envs, table = 3, make_table(num_questions=5)
    ours = make_batch(num_envs, num_questions=5, autoreset_mode=mode)
    theirs = SyncVectorEnv(
        [lambda: DocumentSelectionEnv(table, OrderReward(), num_selected=2)] * num_envs,
        autoreset_mode=mode,
    )
    ours.action_space.seed(1)
    ours.np_random, shared = np.random.default_rng(0), np.random.default_rng(0)
    for env in theirs.envs:
        env.unwrapped.np_random = shared
    assert_same(ours.reset(), theirs.reset())
    for _ in range(60):
        actions = ours.action_space.sample()
        ours_now, theirs_now = ours.step(actions), theirs.step(actions)
        assert_same(ours_now, theirs_now)
        over = ours_now[2]
        if mode is AutoresetMode.DISABLED and over.any():
            assert_same(
                ours.reset(options={"reset_mask": over}),
                theirs.reset(options={"reset_mask": over}),
            )


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert plain(one) == plain(other)
        if not isinstance(one, dict):
            assert one.dtype == other.dtype


def plain(value):
    """Nested dicts and lists of Python values, with array types, for exact comparison."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return value.dtype.name, [
            plain(part) if value.dtype == object else part for part in value.tolist()
        ]
    return value


@given(st.data())
@settings(max_examples=50)
def test_a_batch_of_n_equals_n_scalar_environments(data):
    num_envs = data.draw(st.integers(1, 4))
    num_selected = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(0, 4), min_size=num_envs, max_size=num_envs))
    batch = make_batch(num_envs, num_selected=num_selected)
    scalars = [
        DocumentSelectionEnv(make_table(), OrderReward(), num_selected) for _ in range(num_envs)
    ]
    observations, infos = batch.reset(options={"question_rows": rows})
    for i, scalar in enumerate(scalars):
        check_row(i, observations, infos, *scalar.reset(options={"question_row": rows[i]}))
    over = np.zeros(num_envs, dtype=bool)
    while not over.all():
        drawn = data.draw(st.lists(st.integers(0, STOP), min_size=num_envs, max_size=num_envs))
        actions = np.where(over, STOP, drawn)
        observations, rewards, terminated, truncated, infos = batch.step(actions)
        for i, scalar in enumerate(scalars):
            if over[i]:
                assert (rewards[i], terminated[i]) == (0.0, False)
                continue
            observation, reward, is_over, is_cut, info = scalar.step(int(actions[i]))
            assert (rewards[i], terminated[i], truncated[i]) == (reward, is_over, is_cut)
            np.testing.assert_array_equal(batch.action_masks()[i], scalar.action_masks())
            check_row(i, observations, infos, observation, info)
        over |= terminated


def check_row(i, observations, infos, observation, info):
    """Sub-environment i of the batch shows what the scalar environment shows."""
    assert data_equivalence({k: v[i] for k, v in observations.items()}, observation, exact=True)
    shown = {name for name in infos if not name.startswith("_") and infos[f"_{name}"][i]}
    assert shown == set(info)
    for name, value in info.items():
        if name == "reward_terms":
            terms = {
                n: a[i] for n, a in infos[name].items() if infos[name].get(f"_{n}", [0] * 9)[i]
            }
            assert terms == value
        else:
            np.testing.assert_equal(infos[name][i], value)


def test_all_rewards_of_a_step_are_asked_for_in_one_call():
    reward = OrderReward()
    batch = make_batch(4, reward)
    batch.reset(options={"question_rows": [0, 1, 2, 2]})
    batch.step([3, STOP, 1, 0])
    assert reward.calls == [[("q1", ())]]
    _, rewards, terminated, _, infos = batch.step([0, STOP, 1, 3])
    # Sub-environment 1 was over and sub-environment 2 repeats a pick: neither is asked for.
    assert reward.calls[1:] == [[("q0", ("p3", "p0")), ("q2", ("p2", "p5"))]]
    assert terminated.tolist() == [True, False, True, True]
    np.testing.assert_allclose(rewards, [3.0, 0.0, -1.0, 2 + 2.5])
    assert infos["selection"].tolist() == [("p3", "p0"), None, ("p3",), ("p2", "p5")]
    assert infos["_selection"].tolist() == [True, False, True, True]
    assert infos["valid"].tolist() == [True, False, False, True]


def test_a_step_that_ends_nothing_asks_for_nothing():
    reward = OrderReward()
    batch = make_batch(2, reward)
    batch.reset(seed=0)
    _, rewards, terminated, _, infos = batch.step([0, 1])
    assert reward.calls == []
    assert rewards.tolist() == [0.0, 0.0]
    assert not terminated.any()
    assert "valid" not in infos


def test_question_rows_give_each_sub_environment_its_question():
    batch = make_batch(4)
    _, infos = batch.reset(options={"question_rows": np.array([2, 2, 0, 4])})
    assert infos["question_id"].tolist() == ["q2", "q2", "q0", "q4"]
    assert infos["question_row"].tolist() == [2, 2, 0, 4]
    assert infos["golden_answers"].tolist() == [("gold 2",), ("gold 2",), ("gold 0",), ("gold 4",)]
    assert infos["passages"][2] == tuple(f"Title {i}\nText number {i}." for i in range(4))
    assert infos["_passages"].tolist() == [True] * 4


def questions_drawn(seed: int) -> list[list[str]]:
    batch = make_batch(4, autoreset_mode="NextStep")
    drawn = [batch.reset(seed=seed)[1]["question_id"].tolist()]
    for _ in range(6):
        drawn.append(batch.step([STOP] * 4)[4]["question_id"].tolist())
    return drawn


def test_one_seed_repeats_and_two_differ():
    assert questions_drawn(1) == questions_drawn(1)
    assert questions_drawn(1) != questions_drawn(2)
    assert len({tuple(row) for row in questions_drawn(1)}) > 1


def test_sub_environments_draw_independently():
    _, infos = make_batch(64).reset(seed=0)
    assert set(infos["question_row"].tolist()) == set(range(5))


def test_next_step_ignores_the_action_and_starts_again():
    reward = OrderReward()
    batch = make_batch(2, reward, autoreset_mode="NextStep")
    batch.reset(seed=0, options={"question_rows": [0, 1]})
    observations, _, terminated, _, _ = batch.step([STOP, 2])
    assert terminated.tolist() == [True, False]
    assert observations["action_mask"].tolist() == [[0, 0, 0, 0, 1], [1, 1, 0, 1, 1]]
    observations, rewards, terminated, _, infos = batch.step([3, STOP])
    assert rewards[0] == 0.0
    assert terminated.tolist() == [False, True]
    assert observations["order"].tolist() == [[4, 4], [2, 4]]
    assert observations["action_mask"][0].tolist() == [1] * 5
    assert infos["_valid"].tolist() == [False, True]
    assert reward.calls == [[("q0", ())], [("q1", ("p3",))]]


def test_same_step_keeps_the_last_observation_and_info():
    batch = make_batch(2, autoreset_mode="SameStep")
    batch.reset(seed=0, options={"question_rows": [3, 1]})
    observations, rewards, terminated, _, infos = batch.step([STOP, 0])
    assert terminated.tolist() == [True, False]
    assert rewards.tolist() == [3.0, 0.0]
    assert infos["_final_obs"].tolist() == infos["_final_info"].tolist() == [True, False]
    assert infos["final_obs"][1] is None
    assert infos["final_obs"][0]["action_mask"].tolist() == [0, 0, 0, 0, 1]
    assert infos["final_obs"][0] in batch.single_observation_space
    final = infos["final_info"]
    assert final["question_id"].tolist() == ["q3", None]
    assert final["_question_id"].tolist() == [True, False]
    assert final["selection"].tolist() == [(), None]
    assert final["reward_terms"]["empty"].tolist() == [1.0, 0.0]
    assert "valid" not in infos
    assert observations["action_mask"][0].tolist() == [1] * 5
    assert infos["_question_id"].tolist() == [True, True]


def test_disabled_takes_the_stop_until_the_batch_is_over():
    reward = OrderReward()
    batch = make_batch(2, reward)
    batch.reset(options={"question_rows": [0, 1]})
    batch.step([STOP, 0])
    assert batch.action_masks()[0].tolist() == [False] * 4 + [True]
    _, rewards, terminated, _, infos = batch.step([STOP, STOP])
    assert terminated.tolist() == [False, True]
    assert rewards.tolist() == [0.0, 2.0]
    assert infos["_valid"].tolist() == [False, True]
    assert [len(call) for call in reward.calls] == [1, 1]
    with pytest.raises(ResetNeeded, match=r"\[0, 1\] are over"):
        batch.step([0, 1])


def test_gymnasiums_statistics_count_each_episode_once():
    """Also while sub-environments that are over wait for the others; the first ends three times."""
    batch = RecordEpisodeStatistics(make_batch(2, num_selected=3))
    batch.reset(options={"question_rows": [0, 1]})
    batch.step(np.array([STOP, 0]))
    batch.step(np.array([STOP, 1]))
    batch.step(np.array([STOP, 2]))
    for _ in range(2):
        batch.reset(options={"reset_mask": np.array([True, False])})
        batch.step(np.array([2, STOP]))
        batch.step(np.array([STOP, STOP]))
        batch.step(np.array([STOP, STOP]))
    assert batch.episode_count == 4
    assert list(batch.length_queue) == [1, 3, 2, 2]


def test_a_reset_mask_starts_only_those_sub_environments():
    batch = make_batch(3)
    batch.reset(options={"question_rows": [0, 1, 2]})
    batch.step([STOP, 3, STOP])
    options = {"reset_mask": np.array([True, False, False]), "question_rows": [4, -1, -1]}
    observations, infos = batch.reset(options=options)
    assert set(options) == {"reset_mask", "question_rows"}
    assert infos["question_id"].tolist() == ["q4", None, None]
    assert infos["question_row"].tolist() == [4, 0, 0]
    assert infos["_question_id"].tolist() == [True, False, False]
    assert infos["_action_mask"].tolist() == [True, False, False]
    assert observations["order"].tolist() == [[4, 4], [3, 4], [4, 4]]
    assert batch.action_masks()[:, 0].tolist() == [True, True, False]
    _, _, terminated, _, infos = batch.step([0, 1, STOP])
    assert terminated.tolist() == [False, True, False]
    assert infos["question_id"].tolist() == ["q4", "q1", "q2"]
    assert infos["selection"][1] == ("p4", "p2")
    options = {"reset_mask": np.array([False, False, True]), "question_rows": [0, 1, 3]}
    assert batch.reset(options=options)[1]["question_id"].tolist() == [None, None, "q3"]


def test_a_failed_reward_is_nan_with_its_error_and_spares_the_others():
    batch = make_batch(3, OrderReward(failing=("q1",)))
    batch.reset(options={"question_rows": [0, 1, 2]})
    _, rewards, terminated, _, infos = batch.step([STOP] * 3)
    assert terminated.all()
    assert math.isnan(rewards[1])
    assert rewards[[0, 2]].tolist() == [0.0, 2.0]
    assert infos["_error"].tolist() == [False, True, False]
    assert isinstance(infos["error"][1], GenerationError)
    assert "no answer for q1" in str(infos["error"][1])
    assert infos["valid"].tolist() == [True] * 3
    assert infos["reward_terms"]["_place"].tolist() == [True, False, True]


def test_without_failures_there_is_no_error_key():
    batch = make_batch(2)
    batch.reset(seed=0)
    assert "error" not in batch.step([STOP, STOP])[4]


def test_an_exception_of_the_reward_itself_is_not_swallowed():
    def broken(questions, selections):
        raise GenerationError("the pool is closed")

    batch = make_batch(2, broken)
    batch.reset(seed=0)
    with pytest.raises(GenerationError, match="pool is closed"):
        batch.step([STOP, STOP])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_returned_arrays_are_the_callers_own(mode):
    batch = make_batch(2, autoreset_mode=mode, num_selected=1)
    results = [batch.reset(options={"question_rows": [0, 1]})]
    for _ in range(2):
        observations, *_, infos = batch.step([STOP, STOP])
        results.append((observations, infos))
    arrays = [list(leaves(observations)) + list(leaves(infos)) for observations, infos in results]
    for earlier, later in itertools.pairwise(arrays):
        assert not any(np.shares_memory(a, b) for a in earlier for b in later)


def leaves(value):
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, np.ndarray):
        yield value


def test_gymnasiums_episode_statistics_work_on_it():
    batch = gym.wrappers.vector.RecordEpisodeStatistics(make_batch(2, autoreset_mode="NextStep"))
    batch.reset(options={"question_rows": [0, 1]})
    batch.step([3, STOP])
    _, _, _, _, infos = batch.step([STOP, 0])
    assert infos["episode"]["r"].tolist() == [3.0, 0.0]
    assert infos["episode"]["l"].tolist() == [2, 0]


def test_pictures_show_each_sub_environment():
    batch = make_batch(2, render_mode="rgb_array")
    batch.reset(options={"question_rows": [0, 1]})
    batch.step([3, 2])
    batch.step([3, 0])  # a repeated pick, and a second one
    first, second = batch.render()
    refused = Outcome(-1.0, (), False, None, {})
    np.testing.assert_array_equal(first, draw_episode((3,), 4, 2, refused))
    np.testing.assert_array_equal(second, draw_episode((2, 0), 4, 2, None))


def test_ansi_gives_one_text_for_each_sub_environment():
    batch = make_batch(2, render_mode="ansi")
    with pytest.raises(ResetNeeded):
        batch.render()
    batch.reset(options={"question_rows": [0, 1]})
    batch.step([STOP, 2])
    first, second = batch.render()
    assert "Question q0" in first
    assert "Reward: 0.000" in first
    assert "Title 3 (candidate 2)" in second
    assert "Still picking." in second
    batch.reset(options={"reset_mask": np.array([True, False])})
    assert "Picked 0 of at most 2:\nStill picking." in batch.render()[0]
    assert batch.render()[1] == second
    silent = make_batch(1)
    with pytest.warns(UserWarning, match="render_mode='ansi' or 'rgb_array'"):
        assert silent.render() is None
