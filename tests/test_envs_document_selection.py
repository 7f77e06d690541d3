"""The scalar environment against Gymnasium's contract and its own documentation."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env

import envs  # noqa: F401  registers the environment
from rlrag.data.corpus import MemoryCorpus
from rlrag.environment.document_selection import DocumentSelectionEnv
from rlrag.errors import ConfigError, DataError, GenerationError, RewardError
from rlrag.records import Passage, Question, RewardResult
from rlrag.retrieval.candidates import CandidateTable

ID = "rlrag/DocumentSelection-v1"
PASSAGES = tuple(
    Passage(id=f"p{i}", title=f"Title {i}", text=f"Text number {i}.") for i in range(6)
)


class RecordingReward:
    """Rewards with 1 / (1 + picks) and keeps what it was asked."""

    def __init__(self, answer: str | None = "an answer") -> None:
        self.calls: list[list[tuple[str, tuple[str, ...]]]] = []
        self.answer = answer

    def __call__(self, questions, selections):
        asked = [(q.id, tuple(p.id for p in s)) for q, s in zip(questions, selections, strict=True)]
        self.calls.append(asked)
        return [
            RewardResult(1 / (1 + len(s)), {"size": float(len(s))}, answer=self.answer)
            for s in selections
        ]


class FixedReward:
    """Gives the same result for everything."""

    def __init__(self, *results) -> None:
        self.results = list(results)

    def __call__(self, questions, selections):
        return self.results


def make_table(num_questions: int = 3, num_candidates: int = 4, vector_size: int = 2):
    """Question q has candidates q, q + 1, ... of six passages, and falling scores."""
    rows = (np.arange(num_questions)[:, None] + np.arange(num_candidates)) % len(PASSAGES)
    scores = -np.arange(num_questions * num_candidates * 2, dtype=np.float64)
    return CandidateTable(
        questions=tuple(
            # A plain dict: check_env copies the arguments of `make`, and a mapping proxy refuses.
            Question(f"q{i}", f"question {i}?", (f"gold {i}", "other"), metadata={})
            for i in range(num_questions)
        ),
        corpus=MemoryCorpus(PASSAGES),
        rows_QN=rows,
        scores_QNC=scores.reshape(num_questions, num_candidates, 2),
        score_names=("fused", "bm25"),
        question_vectors_QD=np.arange(num_questions * vector_size, dtype=np.float32).reshape(
            num_questions, vector_size
        ),
        passage_vectors_PD=np.arange(len(PASSAGES) * vector_size, dtype=np.float32).reshape(
            len(PASSAGES), vector_size
        ),
    )


def make_env(reward=None, **kwargs) -> DocumentSelectionEnv:
    return DocumentSelectionEnv(make_table(), reward or RecordingReward(), **kwargs)


def play(env, actions, **reset):
    """The result of the last action."""
    env.reset(**reset)
    result = None
    for action in actions:
        result = env.step(action)
    return result


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: gym.make(ID).unwrapped, id="registered"),
        pytest.param(lambda: gym.make(f"envs:{ID}", num_selected=1).unwrapped, id="one-pick"),
        pytest.param(lambda: gym.make(ID, candidates=make_table()).unwrapped, id="own-table"),
        pytest.param(
            lambda: gym.make(ID, candidates=make_table(vector_size=0)).unwrapped, id="no-vectors"
        ),
        pytest.param(lambda: gym.make(ID, render_mode="ansi").unwrapped, id="ansi"),
    ],
)
def test_check_env_passes_without_warnings(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(build())


def test_check_env_finds_only_the_missing_spec_on_a_bare_environment():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(DocumentSelectionEnv())
    assert ["spec" in str(warning.message) for warning in caught] == [True]


def test_whole_episodes_through_make_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(ID)
        env.action_space.seed(0)
        _, info = env.reset(seed=0)
        for _ in range(50):
            mask = info["action_mask"].astype(np.int8)
            _, _, terminated, _, info = env.step(env.action_space.sample(mask=mask))
            if terminated:
                _, info = env.reset()


def test_reset_shows_the_question_that_the_option_names():
    env, table = make_env(), make_table()
    env.reset(options={"question_row": 0})  # which another one then follows
    observation, info = env.reset(options={"question_row": 1})
    assert info["question_id"] == "q1"
    assert info["question"] == "question 1?"
    assert info["question_row"] == 1
    assert info["golden_answers"] == ("gold 1", "other")
    assert info["passages"] == tuple(f"Title {i}\nText number {i}." for i in (1, 2, 3, 4))
    assert info["action_mask"].tolist() == [True] * 5
    assert info["action_mask"].dtype == np.bool_
    np.testing.assert_array_equal(observation["question_embedding"], table.question_vectors_QD[1])
    np.testing.assert_array_equal(
        observation["candidate_embeddings"], table.passage_vectors_PD[[1, 2, 3, 4]]
    )
    np.testing.assert_array_equal(observation["retriever_scores"], table.scores_QNC[1])
    assert observation["order"].tolist() == [4, 4, 4]


def test_observations_have_fixed_shapes_and_types():
    env = make_env()
    env.reset(seed=0)
    observation, *_ = env.step(2)
    kinds = {name: (array.shape, array.dtype.name) for name, array in observation.items()}
    assert kinds == {
        "question_embedding": ((2,), "float32"),
        "candidate_embeddings": ((4, 2), "float32"),
        "retriever_scores": ((4, 2), "float32"),
        "picked": ((4,), "int8"),
        "order": ((3,), "int64"),
        "action_mask": ((5,), "int8"),
    }
    assert observation in env.observation_space
    assert observation["picked"].tolist() == [0, 0, 1, 0]
    assert observation["order"].tolist() == [2, 4, 4]
    assert observation["action_mask"].tolist() == [1, 1, 0, 1, 1]


def test_without_vectors_the_observation_has_no_embeddings():
    env = DocumentSelectionEnv(make_table(vector_size=0), RecordingReward())
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"retriever_scores", "picked", "order", "action_mask"}
    assert set(env.observation_space.spaces) == set(observation)


def test_changing_an_observation_changes_nothing_later():
    env = make_env()
    first, _ = env.reset(options={"question_row": 0})
    for array in first.values():
        array[...] = 1
    second, *_ = env.step(3)
    np.testing.assert_array_equal(second["retriever_scores"], make_table().scores_QNC[0])
    assert second["order"].tolist() == [3, 4, 4]


def test_picks_reach_the_reward_in_the_order_of_the_actions():
    reward = RecordingReward()
    observation, value, terminated, truncated, info = play(
        make_env(reward), [2, 0, 1], options={"question_row": 1}
    )
    assert reward.calls == [[("q1", ("p3", "p1", "p2"))]]
    assert (value, terminated, truncated) == (0.25, True, False)
    assert info["selection"] == ("p3", "p1", "p2")
    assert info["reward_terms"] == {"size": 3.0}
    assert info["answer"] == "an answer"
    assert info["valid"] is True
    assert observation["order"].tolist() == [2, 0, 1]
    assert observation["action_mask"].tolist() == [0, 0, 0, 0, 1]


def test_steps_before_the_last_give_zero_and_ask_for_nothing():
    reward = RecordingReward()
    _, value, terminated, truncated, info = play(make_env(reward), [2, 0])
    assert (value, terminated, truncated) == (0.0, False, False)
    assert reward.calls == []
    assert not {"answer", "reward_terms", "selection", "valid"} & set(info)


def test_stopping_at_once_rewards_the_empty_selection():
    reward = RecordingReward()
    _, value, terminated, truncated, info = play(make_env(reward), [4], options={"question_row": 2})
    assert reward.calls == [[("q2", ())]]
    assert (value, terminated, truncated) == (1.0, True, False)
    assert info["selection"] == ()
    assert info["valid"] is True


def test_stopping_after_one_pick_rewards_that_pick():
    reward = RecordingReward()
    _, value, terminated, *_ = play(make_env(reward), [3, 4], options={"question_row": 0})
    assert reward.calls == [[("q0", ("p3",))]]
    assert (value, terminated) == (0.5, True)


def test_a_repeated_pick_ends_the_episode_without_asking_the_reward():
    reward = RecordingReward()
    observation, value, terminated, truncated, info = play(make_env(reward), [2, 2])
    assert (value, terminated, truncated) == (-1.0, True, False)
    assert reward.calls == []
    assert info["valid"] is False
    assert info["reward_terms"] == {}
    assert info["answer"] is None
    assert len(info["selection"]) == 1
    assert observation["action_mask"].tolist() == [0, 0, 0, 0, 1]


def test_the_reward_of_an_invalid_action_can_be_chosen():
    assert play(make_env(invalid_reward=-50.0), [1, 1])[1] == -50.0


@pytest.mark.parametrize("action", [-1, 5, 1.0, "0", None])
def test_an_action_outside_the_space_is_refused(action):
    env = make_env()
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="outside"):
        env.step(action)


def test_stepping_before_reset_or_after_the_end_is_refused():
    env = make_env()
    with pytest.raises(ResetNeeded):
        env.step(0)
    play(env, [4])
    with pytest.raises(ResetNeeded):
        env.step(4)


def test_the_mask_is_the_same_everywhere():
    env = make_env()
    observation, info = env.reset(seed=3)
    for action in (1, 3, 4):
        np.testing.assert_array_equal(info["action_mask"], env.action_masks())
        np.testing.assert_array_equal(observation["action_mask"], env.action_masks())
        assert env.action_masks()[action]
        observation, _, _, _, info = env.step(action)
    np.testing.assert_array_equal(info["action_mask"], [False] * 4 + [True])


def questions_drawn(seed: int) -> list[str]:
    env = DocumentSelectionEnv()
    drawn = [env.reset(seed=seed)[1]["question_id"]]
    return drawn + [env.reset()[1]["question_id"] for _ in range(20)]


def test_one_seed_repeats_and_two_differ():
    assert questions_drawn(1) == questions_drawn(1)
    assert questions_drawn(1) != questions_drawn(2)


def test_every_question_is_drawn():
    env = make_env()
    drawn = {env.reset(seed=seed)[1]["question_row"] for seed in range(60)}
    assert drawn == {0, 1, 2}


def test_global_generators_do_not_matter():
    np.random.seed(0)  # noqa: NPY002
    first = make_env().reset(seed=5)[1]["question_id"]
    np.random.seed(1)  # noqa: NPY002
    assert make_env().reset(seed=5)[1]["question_id"] == first


def test_a_chosen_question_draws_nothing():
    env, other = make_env(), make_env()
    env.reset(seed=7)
    other.reset(seed=7)
    env.reset(options={"question_row": 0})
    assert env.np_random.bit_generator.state == other.np_random.bit_generator.state


@pytest.mark.parametrize("row", [-1, 3, 0.0, "0", True])
def test_a_row_that_the_table_lacks_is_refused(row):
    with pytest.raises(ConfigError, match="0 to 2"):
        make_env().reset(options={"question_row": row})


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'question_row'"):
        make_env().reset(options={"question_rows": 1})


def test_a_failed_reward_is_raised_and_the_next_episode_works():
    env = make_env(FixedReward(GenerationError("the generator is gone")))
    with pytest.raises(GenerationError, match="is gone"):
        play(env, [4])
    with pytest.raises(ResetNeeded):
        env.step(4)
    _, info = env.reset(seed=0)
    assert info["action_mask"].all()


@pytest.mark.parametrize("total", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_raised_with_the_question(total):
    env = make_env(FixedReward(RewardResult(total, {})))
    with pytest.raises(RewardError, match="'q1'"):
        play(env, [4], options={"question_row": 1})


def test_a_reward_that_forgets_a_question_is_refused():
    with pytest.raises(RewardError, match="0 results for 1"):
        play(make_env(FixedReward()), [4])


@pytest.mark.parametrize("result", [None, 1.0])
def test_a_reward_that_gives_something_else_than_results_is_refused(result):
    with pytest.raises(RewardError, match=f"gave {result} for question 'q1'.*a RewardResult"):
        play(make_env(FixedReward(result)), [4], options={"question_row": 1})


@pytest.mark.parametrize("num_selected", [0, 5])
def test_more_picks_than_candidates_are_refused(num_selected):
    with pytest.raises(ConfigError, match=f"{num_selected} but a question has 4 candidates"):
        make_env(num_selected=num_selected)


def test_all_candidates_may_be_selected():
    _, value, terminated, *_ = play(make_env(num_selected=4), [3, 2, 1, 0])
    assert (value, terminated) == (0.2, True)


def test_bad_tables_and_arguments_are_refused():
    table = make_table()
    with pytest.raises(DataError, match="no questions"):
        DocumentSelectionEnv(make_table(num_questions=0), RecordingReward())
    table.scores_QNC[2, 1, 0] = np.nan
    with pytest.raises(DataError, match="'q2'"):
        DocumentSelectionEnv(table, RecordingReward())
    with pytest.raises(ConfigError, match="invalid_reward is nan"):
        make_env(invalid_reward=float("nan"))
    with pytest.raises(ConfigError, match="'human'"):
        make_env(render_mode="human")


def test_the_sample_reward_prefers_the_passage_with_the_answer():
    env = gym.make(ID)
    gains = []
    for row in range(5):
        _, info = env.reset(options={"question_row": row})
        holds = [
            any(answer.lower() in text.lower() for answer in info["golden_answers"])
            for text in info["passages"]
        ]
        if not any(holds) or all(holds):
            continue
        stop = len(holds)
        env.step(holds.index(True))
        right = env.step(stop)[1]
        assert right == pytest.approx(1 - 0.1)
        env.reset(options={"question_row": row})
        env.step(holds.index(False))
        gains.append(right - env.step(stop)[1])
    assert gains
    assert gains == pytest.approx([1.0] * len(gains))


def test_ansi_shows_question_picks_answer_and_reward():
    env = make_env(render_mode="ansi")
    env.reset(options={"question_row": 1})
    env.step(2)
    running = env.render()
    assert "Question q1: question 1?" in running
    assert "1. Title 3 (candidate 2)" in running
    assert "Still picking." in running
    env.step(4)
    assert env.render() == (
        "Question q1: question 1?\n"
        "Picked 1 of at most 3:\n"
        "  1. Title 3 (candidate 2)\n"
        "Answer: an answer\n"
        "Reward: 0.500 (size 1.000)\n"
    )
    env.reset(options={"question_row": 0})
    assert env.render() == "Question q0: question 0?\nPicked 0 of at most 3:\nStill picking.\n"


def test_render_needs_a_mode_and_an_episode():
    with pytest.warns(UserWarning, match="render_mode='ansi' or 'rgb_array'"):
        assert make_env().render() is None
    with pytest.raises(ResetNeeded):
        make_env(render_mode="ansi").render()
