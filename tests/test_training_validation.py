"""Validation during training, against the answers to its questions counted by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from loop_runs import changed
from stand_ins import ReadingGenerator, WordPrompts, make_table

from rlrag.config import RunConfig
from rlrag.environment.rollout import play_greedy
from rlrag.errors import GenerationError
from rlrag.pipeline import open_policy, open_reward
from rlrag.records import Generation
from rlrag.testing.thread_workers import make_group, run_together
from rlrag.training.distributed.workers import SingleWorker
from rlrag.training.validation import validate

TABLE = make_table(40)


class Wordy(ReadingGenerator):
    """Says two words where it is asked of an even value, and nothing of every fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def generate(self, prompts, sampling):
        numbers = [int(p.text.split()[-1].removesuffix("?")) for p in prompts]
        self.asked += numbers
        said = super().generate(prompts, sampling)
        return [
            GenerationError("the engine died")
            if number % 5 == 0
            else Generation(f"{found.text} {'indeed' if number % 2 == 0 else ''}", -1.0, 1, 1)
            for number, found in zip(numbers, said, strict=True)
        ]


@pytest.fixture
def config(small_config) -> RunConfig:
    return changed(small_config, environment={"num_selected": 2})


def untrained(config: RunConfig):
    return open_policy(config, TABLE)


def moved(config: RunConfig):
    """A policy that mixes up what the retriever ranks."""
    policy = open_policy(config, TABLE)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return policy


def test_answers_are_counted_over_the_questions_that_were_answered(config):
    """A right answer with a word too many has precision 1/2 and recall 1, so F1 2/3."""
    reward = open_reward(config, Wordy(), WordPrompts())
    found = validate(config.environment, untrained(config), TABLE, reward, SingleWorker())
    answered = [row for row in range(40) if row % 5]
    right = {row for row in answered if TABLE.passages(row)[0].id in TABLE.questions[row].gold_ids}
    exact = [float(row in right and row % 2 == 1) for row in answered]
    f1 = [float(row in right) * (1.0 if row % 2 else 2 / 3) for row in answered]
    assert 0 < np.mean(exact) < np.mean(f1)
    assert found["validation/em"] == pytest.approx(np.mean(exact))
    assert found["validation/f1"] == pytest.approx(np.mean(f1))
    assert found["validation/answer_words"] == pytest.approx(
        np.mean([2 - row % 2 for row in answered])
    )


def test_workers_answer_a_part_each_and_find_what_one_finds(config):
    alone, policy = Wordy(), moved(config)

    def work(workers, generator):
        reward = open_reward(config, generator, WordPrompts())
        return validate(config.environment, policy, TABLE, reward, workers)

    expected = work(SingleWorker(), alone)
    parts = [Wordy(), Wordy()]
    found = run_together([partial(work, *pair) for pair in zip(make_group(2), parts, strict=True)])
    assert found[0] == found[1] == pytest.approx(expected)
    assert sorted(alone.asked) == list(range(40))
    assert [sorted(part.asked) for part in parts] == [
        list(range(0, 40, 2)),
        list(range(1, 40, 2)),
    ]


def test_selections_that_differ_from_the_retrievers_are_counted(config):
    policy = moved(config)
    reward = open_reward(config, ReadingGenerator(), WordPrompts())
    found = validate(config.environment, policy, TABLE, reward, SingleWorker())
    picks = [
        [passage.id for passage in passages]
        for passages in play_greedy(config.environment, policy, TABLE).evidence
    ]
    first = [[passage.id for passage in TABLE.passages(row)[:2]] for row in range(40)]
    both = list(zip(picks, first, strict=True))
    changed_share = np.mean([one != other for one, other in both])
    other_set_share = np.mean([set(one) != set(other) for one, other in both])
    assert 0 < other_set_share < changed_share < 1
    assert found["validation/changed_share"] == pytest.approx(changed_share)
    assert found["validation/other_set_share"] == pytest.approx(other_set_share)
    assert "constant_policy" not in found


@pytest.mark.parametrize("reverses", [False, True])
def test_an_order_that_is_the_same_for_all_is_told_where_it_is_not_the_retrievers(config, reverses):
    policy = open_policy(changed(config, selector={"prior_scale": 100.0}), TABLE)

    class Reversing:
        """Takes the last candidate that is left in place of the first."""

        num_selected = policy.num_selected

        def act(self, observations, infos, turn):
            mask = observations["action_mask"][:, :-1].astype(bool)  # without that of stopping
            chosen = policy.act(observations, infos, turn)
            last_E = mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)
            return type(chosen)(last_E, chosen.logp_E, chosen.log_ratios_E)

    reward = open_reward(config, ReadingGenerator(), WordPrompts())
    player = Reversing() if reverses else policy
    found = validate(config.environment, player, TABLE, reward, SingleWorker())
    assert found["validation/changed_share"] == float(reverses)
    if reverses:
        assert found["constant_policy"].startswith("the policy picks positions (5, 4) for")
    else:
        assert "constant_policy" not in found
