"""Rewards of ordered picks, with a small deterministic generator and without any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import gymnasium
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlrag.config import RewardConfig
from rlrag.errors import ConfigError, GenerationError, PromptTooLongError, RewardError
from rlrag.generation.protocol import Generator, Sampling, TokenCount
from rlrag.generation.weights import GeneratorWeights
from rlrag.records import Generation, Passage, Prompt, Question, Score
from rlrag.rewards.answering import AnsweringReward, PassageReward
from rlrag.rewards.composite import RewardModel

SAMPLING = Sampling(max_new_tokens=4)
FRANCE = Passage(id="fr", title="France", text="Its capital is Paris.")
ITALY = Passage(id="it", title="Italy", text="Its capital is Rome.")
PASSAGES = (FRANCE, ITALY, Passage(id="no", title="Norway", text="Oslo, the capital."))
CAPITAL = Question(id="q1", question="capital of France?", golden_answers=("Paris",))
EITHER = Question(id="q2", question="a capital?", golden_answers=("Roma city", "Rome"))
UNANSWERABLE = Question(id="q3", question="capital of nowhere?", golden_answers=())
TOO_LONG = Question(id="q4", question="long " * 50, golden_answers=("Paris",))


class CharacterPrompts:
    """Writes passages and question one after another; every character is a token."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        text = "".join(passage.contents + "\n" for passage in passages) + question.question
        if len(question.question) > 100:
            raise PromptTooLongError(f"question {question.id!r} is too long")
        return Prompt(tuple(map(ord, text)), text, num_passages=len(passages))

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        return tuple(map(ord, answer))


class LastWordGenerator:
    """Answers with the last word of the first line that ends in a full stop.

    Each answer character costs -0.1 nats if the prompt has the answer and -1 otherwise.
    """

    identity = "last-word"

    def __init__(self) -> None:
        self.tokens = TokenCount()
        self.num_generated: list[int] = []
        self.num_scored: list[int] = []
        self.version = 0

    def load_weights(self, weights: GeneratorWeights) -> None:
        raise GenerationError("it has no weights")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        assert sampling == SAMPLING
        self.num_generated.append(len(prompts))
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> Generation:
        lines = [line for line in prompt.text.split("\n") if line.endswith(".")]
        text = lines[0].rstrip(".").split()[-1] if lines else ""
        return Generation(text, -1.0, len(text), len(prompt.token_ids))

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        self.num_scored.append(len(prompts))
        return [
            Score(
                (-0.1 if "".join(map(chr, answer)) in prompt.text else -1.0) * len(answer),
                len(answer),
                len(prompt.token_ids),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def close(self) -> None:
        pass


class NanGenerator(LastWordGenerator):
    """Scores everything as NaN, as broken weights do."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[tuple[int, ...]]) -> list[Score]:
        return [Score(math.nan, len(answer), 1) for answer in answers]


class DeadGenerator(LastWordGenerator):
    """Fails as a whole."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Generation]:
        raise GenerationError("all actors are gone")


def answering(*functions: str, generator: LastWordGenerator | None = None) -> AnsweringReward:
    config = RewardConfig(functions=functions, weights=(1.0,) * len(functions))
    return AnsweringReward(
        generator or LastWordGenerator(), CharacterPrompts(), RewardModel(config), SAMPLING
    )


def test_the_stand_in_is_a_generator() -> None:
    assert isinstance(LastWordGenerator(), Generator)


def test_an_environment_tells_its_spec_without_a_second_generator() -> None:
    reward = answering("exact_match")
    env = gymnasium.make("envs:rlrag/DocumentSelection-v1", reward=reward, num_selected=1)
    assert env.spec is not None
    assert env.spec.kwargs["reward"] is reward


class ShortPrompts(CharacterPrompts):
    """Shows the first passage only."""

    def build(self, question: Question, passages: Sequence[Passage]) -> Prompt:
        cut = sum(len(passage.contents) + 1 for passage in passages[1:])
        return replace(super().build(question, passages[:1]), num_cut_tokens=cut)


def test_what_prompts_leave_out_is_counted() -> None:
    config = RewardConfig(functions=("answer_logp",), weights=(1.0,))
    reward = AnsweringReward(LastWordGenerator(), ShortPrompts(), RewardModel(config), SAMPLING)
    reward([CAPITAL, CAPITAL, TOO_LONG], [[FRANCE, ITALY], [FRANCE], PASSAGES])
    reward.answer([EITHER], [[ITALY]])
    counts = reward.prompt_counts
    assert (counts.num_given, counts.num_dropped) == (4, 1)
    assert counts.num_cut_tokens == len(ITALY.contents) + 1
    shown = [(CAPITAL, FRANCE), (CAPITAL, FRANCE), (EITHER, ITALY)]
    assert counts.num_tokens == sum(len(p.contents) + 1 + len(q.question) for q, p in shown)
    assert counts.shares()["dropped_passage_share"] == 1 / 4


def test_answers_and_scores_by_hand() -> None:
    reward = answering("exact_match", "answer_logp", "answer_logp_mean")
    right, wrong, none = reward([CAPITAL] * 3, [[FRANCE, ITALY], [ITALY], []])
    assert right.answer == "Paris"
    assert right.terms == pytest.approx(
        {"exact_match": 1.0, "answer_logp": -0.5, "answer_logp_mean": -0.1}
    )
    assert right.total == pytest.approx(0.4)
    assert right.answer_logp == pytest.approx(-0.5)
    assert (wrong.answer, wrong.terms["answer_logp"]) == ("Rome", -5.0)
    assert (none.answer, none.terms["exact_match"]) == ("", 0.0)


def test_the_order_of_the_picks_counts() -> None:
    reward = answering("exact_match")
    results = reward([CAPITAL] * 2, [[FRANCE, ITALY], [ITALY, FRANCE]])
    assert [result.total for result in results] == [1.0, 0.0]


def test_the_likeliest_of_several_golden_answers_counts() -> None:
    # Without passages: "Roma city" -9 and "Rome" -4; with Italy: -9 and -0.4.
    reward = answering("answer_logp", "answer_logp_mean")
    bare, shown = reward([EITHER] * 2, [[], [ITALY]])
    assert bare.terms == {"answer_logp": -4.0, "answer_logp_mean": -1.0}
    assert shown.terms == pytest.approx({"answer_logp": -0.4, "answer_logp_mean": -0.1})


def test_one_call_each_for_the_distinct_pairs() -> None:
    generator = LastWordGenerator()
    reward = answering("exact_match", "answer_logp", generator=generator)
    questions = [CAPITAL, EITHER, CAPITAL, CAPITAL, EITHER]
    picks = [[FRANCE], [FRANCE], [FRANCE], [ITALY], [FRANCE]]
    results = reward(questions, picks)
    assert generator.num_generated == [3]
    assert generator.num_scored == [1 + 2 + 1]
    assert results[0] == results[2]
    assert results[1] == results[4]
    assert results[0] != results[3]


@pytest.mark.parametrize(
    ("functions", "num_generate", "num_score"),
    [
        (("selection_cost", "selection_contains_answer"), 0, 0),
        (("token_f1",), 1, 0),
        (("answer_logp",), 0, 1),
        (("answer_logp_mean", "rouge_l"), 1, 1),
    ],
)
def test_only_what_is_wanted_is_computed(functions, num_generate, num_score) -> None:
    generator = LastWordGenerator()
    answering(*functions, generator=generator)([CAPITAL, EITHER], [[FRANCE], [ITALY]])
    assert len(generator.num_generated) == num_generate
    assert len(generator.num_scored) == num_score


def test_an_unanswerable_question_cannot_be_scored_but_can_be_answered() -> None:
    scored, fine = answering("answer_logp")([UNANSWERABLE, CAPITAL], [[ITALY], [ITALY]])
    assert isinstance(scored, RewardError)
    assert "'q3'" in str(scored)
    assert "no golden answer" in str(scored)
    assert fine.total == -5.0
    right, wrong = answering("exact_match")([UNANSWERABLE] * 2, [[], [ITALY]])
    assert (right.total, wrong.total) == (1.0, 0.0)


def test_a_failed_rollout_is_not_answered_any_more() -> None:
    generator = LastWordGenerator()
    results = answering("exact_match", "answer_logp", generator=generator)(
        [UNANSWERABLE, TOO_LONG, CAPITAL], [[ITALY]] * 3
    )
    assert [type(result).__name__ for result in results] == [
        "RewardError",
        "PromptTooLongError",
        "RewardResult",
    ]
    assert (generator.num_generated, generator.num_scored) == ([1], [1])


def test_nothing_left_asks_the_generator_nothing() -> None:
    generator = LastWordGenerator()
    reward = answering("exact_match", "answer_logp", generator=generator)
    assert reward([], []) == []
    assert isinstance(reward([TOO_LONG], [[ITALY]])[0], PromptTooLongError)
    assert (generator.num_generated, generator.num_scored) == ([], [])


def test_a_score_that_is_not_finite_is_an_error() -> None:
    [result] = answering("answer_logp", generator=NanGenerator())([CAPITAL], [[FRANCE]])
    assert isinstance(result, RewardError)
    assert "'q1'" in str(result)
    assert "nan" in str(result)


def test_blank_golden_answers_are_not_scored() -> None:
    blank = Question(id="q5", question="?", golden_answers=("", " "))
    half = Question(id="q6", question="?", golden_answers=("", "Rome"))
    empty, rome = answering("answer_logp")([blank, half], [[ITALY]] * 2)
    assert isinstance(empty, RewardError)
    assert rome.total == pytest.approx(-0.4)


def test_a_generator_that_fails_as_a_whole_is_raised() -> None:
    with pytest.raises(GenerationError, match="actors are gone"):
        answering("exact_match", generator=DeadGenerator())([CAPITAL], [[FRANCE]])


def test_questions_and_picks_must_pair_up() -> None:
    with pytest.raises(ValueError, match="shorter"):
        answering("exact_match")([CAPITAL], [])
    with pytest.raises(ValueError, match="shorter"):
        PassageReward()([CAPITAL], [])


PAIRS = st.lists(
    st.tuples(st.sampled_from([CAPITAL, EITHER, UNANSWERABLE]), st.permutations(PASSAGES)),
    max_size=8,
)


@given(PAIRS, st.integers(0, 3))
def test_a_batch_equals_its_pairs_one_by_one(pairs, num_picks) -> None:
    questions = [question for question, _ in pairs]
    picks = [passages[:num_picks] for _, passages in pairs]
    for reward in (answering("token_f1", "selection_cost"), PassageReward(0.25)):
        alone = [reward([q], [p])[0] for q, p in zip(questions, picks, strict=True)]
        assert reward(questions, picks) == alone


def test_answers_alone_for_evaluation() -> None:
    generator = LastWordGenerator()
    reward = answering("selection_cost", generator=generator)
    answers = reward.answer([CAPITAL, UNANSWERABLE, CAPITAL], [[FRANCE], [], [FRANCE]])
    assert [answer.text for answer in answers] == ["Paris", "", "Paris"]
    assert generator.num_generated == [2]
    assert reward.answer([], []) == []
    answers = reward.answer([TOO_LONG, CAPITAL], [[], [FRANCE]])
    assert isinstance(answers[0], PromptTooLongError)
    assert answers[1].text == "Paris"


def test_passage_reward_by_hand() -> None:
    reward = PassageReward(cost_per_passage=0.25)
    picks = [[FRANCE], [ITALY, FRANCE], [ITALY], []]
    results = reward([CAPITAL] * 4, picks)
    assert [result.total for result in results] == [0.75, 0.5, -0.25, 0.0]
    assert results[1].terms == {"selection_contains_answer": 1.0, "selection_cost": -2.0}
    assert [r.total for r in reward([UNANSWERABLE] * 2, [[], [ITALY]])] == [1.0, -0.25]


def test_passage_reward_does_not_depend_on_the_order() -> None:
    reward = PassageReward()
    there, back = reward([CAPITAL] * 2, [[FRANCE, ITALY], [ITALY, FRANCE]])
    assert there == back


@pytest.mark.parametrize("cost", [-0.1, math.nan, math.inf])
def test_a_cost_must_be_a_price(cost: float) -> None:
    with pytest.raises(ConfigError, match="cost_per_passage"):
        PassageReward(cost)


class PickyGenerator(LastWordGenerator):
    """Does not survive prompts about Norway."""

    def generate(self, prompts, sampling):
        return [
            _survived(p, g)
            for p, g in zip(prompts, super().generate(prompts, sampling), strict=True)
        ]

    def score(self, prompts, answers):
        return [
            _survived(p, s) for p, s in zip(prompts, super().score(prompts, answers), strict=True)
        ]


def _survived(prompt, result):
    return GenerationError("the engine died") if "Norway" in prompt.text else result


@pytest.mark.parametrize("function", ["exact_match", "answer_logp"])
def test_an_error_of_one_prompt_is_the_reward_of_its_pair_alone(function) -> None:
    reward = answering(function, generator=PickyGenerator())
    fine, failed = reward([CAPITAL, EITHER], [[FRANCE], [PASSAGES[2]]])
    assert fine.total == (1.0 if function == "exact_match" else pytest.approx(-0.5))
    assert isinstance(failed, GenerationError)
    assert str(failed) == "question 'q2': the engine died"


def test_an_answer_that_could_not_be_given_names_its_question() -> None:
    found = answering("exact_match", generator=PickyGenerator()).answer(
        [EITHER, CAPITAL, EITHER], [[PASSAGES[2]], [FRANCE], [PASSAGES[2]]]
    )
    assert [str(found[0]), str(found[2])] == ["question 'q2': the engine died"] * 2
    assert found[1].text == "Paris"
