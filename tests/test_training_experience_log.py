"""What DRO paid for is kept, survives a stop, and labels passages for the retriever."""

from __future__ import annotations

import json
from dataclasses import replace

import episodes
import numpy as np
import pytest
from stand_ins import make_table

from rlrag.algorithms.rag_labels import marginal_contributions
from rlrag.errors import DataError
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.dro.batch import RewardedBatch
from rlrag.training.dro.experience_log import ExperienceLog, labels_from_experience


def batch(rows: list[int], positions, rewards, generator_version: int = 0) -> RewardedBatch:
    return episodes.experience(
        make_table(max(rows) + 1), rows, positions, rewards, version=generator_version
    )


def test_a_clear_contribution_labels_a_passage_and_an_unclear_one_does_not(tmp_path):
    """Candidate 0 adds (-1 - 3) / 2 + 5 = 3 nats, 1 adds 0, 2 takes 3; 3, 4 were never drawn."""
    table = make_table(2)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([1], [[[0, 1], [0, 2], [1, 2]]], [[-1.0, -3.0, -5.0]]))
    rows = table.rows_QN[1].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {
        "q1": {rows[0]: 1, rows[1]: 0, rows[2]: 0}
    }


def test_selections_of_a_policy_that_may_stop_differ_in_length(tmp_path):
    """Action 5 stops: 0; 0, 1; 1; none. 0 adds -1 + 5 = 4, and 1 adds -3 + 3 = 0."""
    table = make_table(1)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([0], [[[0, 5], [0, 1], [1, 5], [5, -1]]], [[-1.0, -1.0, -5.0, -5.0]]))
    (line,) = (tmp_path / "worker-0.jsonl").read_text().splitlines()
    assert json.loads(line)["selections"] == [[0], [0, 1], [1], []]
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {rows[0]: 1, rows[1]: 0}}


def test_a_question_for_which_nothing_was_ever_picked_has_no_labels(tmp_path):
    log = ExperienceLog(tmp_path, SingleWorker(), make_table(1))
    log.append(0, batch([0], [[[5], [5]]], [[-1.0, -5.0]]))
    assert labels_from_experience(tmp_path, margin=1.0) == {}


def test_what_lies_between_stays_open(tmp_path):
    table = make_table(1)
    ExperienceLog(tmp_path, SingleWorker(), table).append(
        0, batch([0], [[[0], [1]]], [[-1.0, -1.5]])
    )
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {}}
    assert labels_from_experience(tmp_path, margin=0.5) == {"q0": {rows[0]: 1, rows[1]: 0}}


def test_a_good_passage_is_no_negative_because_a_better_one_was_drawn_without_it(tmp_path):
    """A alone has log p -.1, B -.3, the others -6; a selection has that of its best passage.

    B's contribution is -.1 although the answer has 74 % with it. C's is below 0 too, and C did not
    once stand without A or B; D and E neither. What is not labelled is judged.
    """
    alone, draws = (-0.1, -0.3, -6.0, -6.0, -6.0), "AC AD AE BC AB DA AC CA"
    selections = [["ABCDE".index(letter) for letter in draw] for draw in draws.split()]
    rewards = [max(alone[n] for n in selection) for selection in selections]
    contributions = marginal_contributions(np.array(selections), np.array(rewards), 5)
    assert contributions[:2].tolist() == pytest.approx([0.2, -0.1])
    table = make_table(1)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([0], [selections], [rewards]))
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {}}
    # One answer of theirs without A and B tells on C and D.
    log.append(1, batch([0], [[[2, 3]]], [[-6.0]]))
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {
        "q0": {rows[0]: 1, rows[2]: 0, rows[3]: 0}
    }


def test_a_bad_answer_counts_against_the_best_by_the_same_generator(tmp_path):
    table = make_table(1)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([0], [[[0], [1]]], [[-1.0, -1.5]], generator_version=0))
    log.append(1, batch([0], [[[0], [1]]], [[-8.0, -8.5]], generator_version=1))
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {}}


def test_selections_of_all_steps_and_workers_count_together(tmp_path):
    table = make_table(1)
    ExperienceLog(tmp_path, SingleWorker(), table).append(0, batch([0], [[[0]]], [[-1.0]]))
    assert labels_from_experience(tmp_path, margin=1.0) == {}
    ExperienceLog(tmp_path, make_group(2)[1], table).append(4, batch([0], [[[1]]], [[-9.0]]))
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {rows[0]: 1, rows[1]: 0}}


def test_rewards_of_two_generators_are_never_compared(tmp_path):
    table = make_table(1)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([0], [[[0]]], [[-1.0]], generator_version=0))
    log.append(1, batch([0], [[[1]]], [[-9.0]], generator_version=1))
    assert labels_from_experience(tmp_path, margin=1.0) == {}


def test_positions_are_those_in_the_list_that_was_drawn_from(tmp_path):
    """Another worker had the same candidates in the reverse order."""
    table = make_table(1)
    turned = replace(table, rows_QN=table.rows_QN[:, ::-1])
    for worker, candidates in zip(make_group(2), (table, turned), strict=True):
        log = ExperienceLog(tmp_path, worker, candidates)
        log.append(0, batch([0], [[[0], [1]]], [[-1.0, -9.0]]))
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {
        "q0": {rows[0]: 1, rows[1]: 0, rows[4]: 1, rows[3]: 0}
    }


def test_failed_rewards_are_left_out(tmp_path):
    table = make_table(1)
    log = ExperienceLog(tmp_path, SingleWorker(), table)
    log.append(0, batch([0], [[[0], [1], [2]]], [[-1.0, np.nan, -4.0]]))
    rows = table.rows_QN[0].tolist()
    assert labels_from_experience(tmp_path, margin=1.0) == {"q0": {rows[0]: 1, rows[2]: 0}}


def test_a_resumed_run_drops_what_it_collects_again(tmp_path):
    log = ExperienceLog(tmp_path, SingleWorker(), make_table(1))
    for step in range(4):
        log.append(step, batch([0], [[[step]]], [[-1.0]]))
    log.truncate(2)
    lines = (tmp_path / "worker-0.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]


def test_workers_meet_once_the_logs_are_shortened(tmp_path):
    """Any of them may shorten any log, to which its owner appends from then on."""

    class Arriving(SingleWorker):
        def barrier(self) -> None:
            lines = (tmp_path / "worker-0.jsonl").read_text().splitlines()
            self.steps = [json.loads(line)["step"] for line in lines]

    worker = Arriving()
    log = ExperienceLog(tmp_path, worker, make_table(1))
    for step in range(4):
        log.append(step, batch([0], [[[step]]], [[-1.0]]))
    log.truncate(2)
    assert worker.steps == [0, 1]


def test_fewer_workers_drop_what_those_that_are_gone_had_collected_too(tmp_path):
    table = make_table(1)
    for worker in make_group(3):
        for step in range(4):
            ExperienceLog(tmp_path, worker, table).append(step, batch([0], [[[step]]], [[-1.0]]))
    logs = [ExperienceLog(tmp_path, worker, table) for worker in make_group(2)]
    run_together([lambda log=log: log.truncate(2) for log in logs])
    for rank in range(3):
        lines = (tmp_path / f"worker-{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1], rank


def test_a_line_that_was_cut_by_a_kill_is_passed_over_and_a_foreign_one_is_named(tmp_path):
    log = ExperienceLog(tmp_path, SingleWorker(), make_table(1))
    log.append(0, batch([0], [[[0], [1]]], [[-1.0, -9.0]]))
    path = tmp_path / "worker-0.jsonl"
    path.write_text(path.read_text() + '{"step": 1, "quest')
    assert len(labels_from_experience(tmp_path, 1.0)["q0"]) == 2
    path.write_text("what is this\n")
    with pytest.raises(DataError, match=rf"{path}, line 1: not JSON"):
        labels_from_experience(tmp_path, 1.0)
