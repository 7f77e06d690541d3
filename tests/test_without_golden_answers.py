"""Questions without golden answers, and rewards of one's own: silence is never what counts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from loop_runs import changed, start, steps_of
from printed_tables import printed
from stand_ins import ReadingGenerator, WordPrompts, make_table
from test_evaluation_systems import LastFirst, three_questions

from rlrag.cli.model_card import _with_interval
from rlrag.config import EnvironmentConfig, EvaluationConfig, RewardConfig, RunConfig
from rlrag.data.split import remarks, training_questions
from rlrag.errors import DataError
from rlrag.evaluation.question_records import QuestionRecorder, read_questions
from rlrag.evaluation.report.page import render_report
from rlrag.evaluation.report.run_record import RunRecord
from rlrag.evaluation.systems import HeldBack, evaluate, judged_by_reward
from rlrag.evaluation.table import EvaluationTable
from rlrag.pipeline import TrainingData, open_reward
from rlrag.records import Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import _unscorable
from rlrag.selection.plackett_luce import PlackettLucePolicy
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.validation import best_retriever_by, validate_retriever

SYSTEMS = ("no_retrieval", "retriever_order", "retriever_reversed", "trained", "oracle")
RECALL = RewardConfig(functions=("selection_recall",))


class Silent(ReadingGenerator):
    """Answers nothing."""

    def generate(self, prompts, sampling):
        return [replace(found, text="") for found in super().generate(prompts, sampling)]


def without_answers(table: CandidateTable) -> CandidateTable:
    """The same questions with gold passages alone."""
    return replace(
        table,
        questions=tuple(
            Question(q.id, q.question, (), {"gold_ids": list(q.gold_ids) or ["p2-0"]})
            for q in table.questions
        ),
    )


def evaluated(table: CandidateTable, reward: RewardConfig, **more) -> EvaluationTable:
    config = RunConfig(
        environment=EnvironmentConfig(num_selected=2),
        reward=reward,
        evaluation=EvaluationConfig(systems=SYSTEMS),
    )
    answering = open_reward(config, Silent(), WordPrompts())
    return evaluate(config, PlackettLucePolicy(LastFirst(), 2), table, answering, **more)


def test_a_silent_model_is_not_right_where_no_question_has_golden_answers(tmp_path) -> None:
    recorder = QuestionRecorder(2)
    table = without_answers(three_questions())
    found = evaluated(table, RECALL, keep=recorder.keep, held_back=HeldBack(table))
    for name, system in found.systems.items():
        assert system.em is system.f1 is system.accuracy is system.em_ci95 is None, name
    # Gold: p0-1; p1-0 and p1-2; p2-0. The retriever's first two, the policy's last two, any one.
    rewards = {name: system.reward for name, system in found.systems.items()}
    assert rewards == pytest.approx(
        {
            "no_retrieval": 0,
            "retriever_order": (1 + 1 / 2 + 1) / 3,
            "retriever_reversed": (1 + 1 / 2 + 1) / 3,
            "trained": (1 + 1 / 2 + 0) / 3,
            "oracle": (1 + 1 / 2 + 1) / 3,
        }
    )
    [(name, pair)] = found.paired.items()
    assert name == "trained_vs_retriever_order"
    assert (pair.em_diff, pair.reward_diff) == (None, pytest.approx(-1 / 3))
    text = printed(found)
    [trained] = [line for line in text.splitlines() if line.startswith("trained  ")]
    assert trained.split()[1:4] == ["-", "-", "-"]
    assert "reward -0.333" in text
    assert "EM +" not in text
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    page = render_report([RunRecord("run", RunConfig(), ({"step": 0},), (), record)])
    assert "reward (95 %)" in page
    assert _with_interval(record["systems"]["trained"], "em") == "-"
    recorder.write(tmp_path / "q.jsonl", record)
    answer = read_questions(tmp_path / "q.jsonl").questions[0].systems["trained"]
    assert (answer.answer, answer.error, answer.em, answer.contained) == ("", None, None, None)


def test_where_some_questions_have_golden_answers_the_others_are_unanswerable() -> None:
    table = three_questions()
    some = replace(table, questions=(without_answers(table).questions[0], *table.questions[1:]))
    found = evaluated(some, RewardConfig()).systems["trained"]
    assert found.em == pytest.approx(1 / 3)
    assert found.reward is None


def test_a_reward_of_ones_own_is_shown_and_judges() -> None:
    cost = RewardConfig(functions=("exact_match", "selection_cost"), weights=(1.0, 0.25))
    found = evaluated(three_questions(), cost, held_back=HeldBack(three_questions()))
    assert found.systems["trained"].reward == -0.5
    assert found.systems["trained"].em == 0
    # By reward nothing is better than something that is wrong and costs.
    assert [baseline.system for baseline in found.baselines] == ["no_retrieval"]


def test_what_a_run_is_judged_by() -> None:
    table = three_questions()
    for functions, weights, by_reward in (
        (("answer_logp",), (1.0,), False),
        (("exact_match", "token_f1"), (1.0, 0.5), False),
        (("answer_logp", "selection_cost"), (1.0, 0.0), False),
        (("answer_logp", "selection_cost"), (1.0, 0.1), True),
        (("answer_logp",), (-1.0,), True),
        (("selection_recall",), (1.0,), True),
        (("my_rewards:short",), (1.0,), True),
    ):
        config = RunConfig(reward=RewardConfig(functions=functions, weights=weights))
        assert judged_by_reward(config, table) == by_reward, functions
        assert judged_by_reward(config, without_answers(table))


def test_the_checkpoint_is_chosen_by_the_reward(small_config, training_data, tmp_path) -> None:
    """A silent model has the F1 of 1 without golden answers at every step; recall rises."""
    config = changed(small_config, reward={"functions": ("selection_recall",)})
    bare = without_answers(make_table(40, seed=5))
    data = TrainingData(training_data.train, bare, training_data.hashes)
    loop = start(config, data, tmp_path / "run")
    loop.run()
    records = steps_of(tmp_path / "run")
    rewards = {r["step"]: r["validation/reward"] for r in records if "validation/reward" in r}
    assert not any("validation/f1" in record for record in records)
    assert loop.progress.best_score == max(rewards.values()) > rewards[0]
    assert rewards[loop.progress.best_step] == loop.progress.best_score


def test_the_default_reward_still_chooses_by_f1(small_config, training_data, tmp_path) -> None:
    loop = start(small_config, training_data, tmp_path / "run")
    assert loop.trainer.best_by == "validation/f1"


def test_a_reward_that_silence_would_win_is_refused(question_file) -> None:
    spec = question_file(0, 3)
    for functions in (("exact_match",), ("answer_logp",)):
        with pytest.raises(DataError, match=f"golden_answers, but .* {functions[0]} compare"):
            training_questions(over(spec, reward={"functions": functions}))
    for changes, said in (
        ({"algorithm": {"name": "sft"}}, "learns from them; give golden"),
        ({"algorithm": {"name": "openrag"}}, "learns from.*, or use algorithm.labels gold"),
    ):
        with pytest.raises(DataError, match=said):
            training_questions(over(spec, **changes))
    found = training_questions(over(spec, reward={"functions": ("selection_recall",)}))
    assert (len(found.train), found.num_left_out) == (3, 0)
    said = str(_unscorable(Question("q", "?", ())))
    assert "selection_recall" in said
    assert "exact_match" not in said


@pytest.fixture
def question_file(tmp_path):
    """Writes a file of questions, the first of them with golden answers."""

    def write(num_with: int, num_without: int) -> str:
        path = tmp_path / "questions.jsonl"
        records = [
            {"id": f"q{i}", "question": f"what is {i}?", "golden_answers": ["v"] * (i < num_with)}
            for i in range(num_with + num_without)
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def over(spec: str, **changes) -> RunConfig:
    values = {"batch_size": 2} | changes.pop("training", {})
    data = {"train_questions": spec, "num_validation_questions": 0} | changes.pop("data", {})
    of_retriever = changes.get("algorithm", {}).get("name") in ("openrag", "jsa")
    dense = {"retrieval": {"kind": "dense"}} if of_retriever else {}
    return changed(RunConfig(), data=data, training=values, **dense, **changes)


@pytest.mark.parametrize(
    ("changes", "leaves_out"),
    [
        ({}, True),
        ({"reward": {"functions": ("exact_match",)}}, True),
        (
            {"reward": {"functions": ("answer_logp", "selection_cost"), "weights": (0.0, 1.0)}},
            True,
        ),
        (
            {"reward": {"functions": ("exact_match", "selection_cost"), "weights": (0.0, 1.0)}},
            False,
        ),
        ({"reward": {"functions": ("selection_recall",)}}, False),
        ({"algorithm": {"name": "sft"}}, True),
        ({"algorithm": {"name": "openrag"}}, True),
        ({"algorithm": {"name": "openrag", "labels": "gold"}}, False),
        (
            {"algorithm": {"name": "openrag", "labels": "generator_else_gold"}},
            True,
        ),
    ],
)
def test_questions_without_golden_answers_are_left_out_and_counted(
    question_file, changes, leaves_out
) -> None:
    config = over(question_file(6, 5), **changes, data={"num_validation_questions": 2})
    found = training_questions(config)
    assert (found.num_found, found.num_left_out) == (11, 5 if leaves_out else 0)
    assert len(found.train) == (4 if leaves_out else 9)
    assert found.held_back is not None
    assert len(found.held_back) == 2
    with_answers = [q for q in found.sampled.questions if q.golden_answers]
    assert len(with_answers) == 6
    said = " ".join(remarks(config, found))
    assert ("5 of 11 questions of" in said) == leaves_out
    assert ("no golden answers and are left out of training" in said) == leaves_out


def test_questions_that_jsa_leaves_out_are_counted(question_file) -> None:
    config = over(question_file(6, 5), algorithm={"name": "jsa"})
    found = training_questions(config)
    assert len(found.train) == 11
    [said] = remarks(config, found)
    assert said.startswith("5 of 11 questions of")


def test_a_retriever_is_chosen_by_recall_where_nothing_says_what_is_right() -> None:
    table = without_answers(three_questions())
    answering = open_reward(RunConfig(), Silent(), WordPrompts())

    def search(questions, num_shown):
        return table.rows_QN[:, :num_shown]

    def validated(table):
        return validate_retriever(table, search, table.corpus, answering, 2, SingleWorker())

    assert best_retriever_by(table) == "validation/recall"
    assert best_retriever_by(three_questions()) == best_retriever_by(None) == "validation/accuracy"
    found = validated(table)
    assert found["validation/recall"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert not {"validation/accuracy", "validation/em", "validation/f1"} & found.keys()
    nothing = replace(table, questions=tuple(Question(q.id, "?", ()) for q in table.questions))
    with pytest.raises(DataError, match="none of the 3 validation questions has golden_answers or"):
        validated(nothing)
    assert np.isfinite(found["validation/answer_words"])
