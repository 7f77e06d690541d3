"""A question that leaves no room in the prompt ends neither validation nor evaluation."""

from __future__ import annotations

import pytest
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import RunConfig
from rlrag.errors import PromptTooLongError
from rlrag.evaluation.systems import evaluate
from rlrag.pipeline import open_policy, open_reward
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import AnsweringReward
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.validation import validate, validate_retriever


class RoomForShort(WordPrompts):
    """Has none for questions with more characters than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def build(self, question, passages):
        if len(question.question) > self._limit:
            raise PromptTooLongError(f"question {question.id!r} leaves no room")
        return super().build(question, passages)


@pytest.fixture
def table() -> CandidateTable:
    """Twelve questions; the number in the last two has two digits, one character more."""
    return make_table(12)


def answering(config: RunConfig, table: CandidateTable, room: int) -> AnsweringReward:
    """An answering with room for questions that are so much longer than the first."""
    limit = len(table.questions[0].question) + room
    return open_reward(config, ReadingGenerator(), RoomForShort(limit))


def test_evaluation_leaves_it_out_and_names_it(small_config, table):
    policy = open_policy(small_config, table)
    found = evaluate(small_config, policy, table, answering(small_config, table, 0))
    assert found.num_questions == 10
    long = [question.id for question in table.questions[10:]]
    assert found.left_out == {name: f"question {name!r} leaves no room" for name in long}
    with pytest.raises(PromptTooLongError, match="leaves no room"):
        evaluate(small_config, policy, table, answering(small_config, table, -1))


def test_validation_is_that_of_the_others(small_config, table):
    policy, reward = open_policy(small_config, table), answering(small_config, table, 0)
    environment = small_config.environment
    found = validate(environment, policy, table, reward, SingleWorker())
    assert found["validation/answer_words"] > 0
    nobody = answering(small_config, table, -1)
    with pytest.raises(PromptTooLongError, match="leaves no room"):
        validate(environment, policy, table, nobody, SingleWorker())


def test_validation_of_a_retriever_is_that_of_the_others(small_config, table):
    def search(questions, k):
        return table.rows_QN[:, :k]

    reward = answering(small_config, table, 0)
    found = validate_retriever(table, search, table.corpus, reward, 2, SingleWorker())
    assert found["validation/answer_words"] > 0
    short = answering(small_config, table, -1)
    with pytest.raises(PromptTooLongError, match="leaves no room"):
        validate_retriever(table, search, table.corpus, short, 2, SingleWorker())
