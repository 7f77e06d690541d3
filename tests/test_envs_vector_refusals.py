"""What the vector environment refuses, on the built-in sample: every message names the way out."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded

from rlrag.environment.sample_task import NUM_CANDIDATES, sample_candidates
from rlrag.environment.vector import DocumentSelectionVectorEnv
from rlrag.errors import ConfigError


@pytest.mark.parametrize(
    "mask", [[True, False], [0, 1, 0], [False] * 3, "all"], ids=["short", "int", "none", "text"]
)
def test_a_bad_reset_mask(mask):
    batch = DocumentSelectionVectorEnv(3)
    batch.reset(seed=0)
    with pytest.raises(ConfigError, match=r"reset_mask.*3 booleans"):
        batch.reset(options={"reset_mask": mask})


def test_a_first_reset_that_leaves_one_out():
    with pytest.raises(ResetNeeded, match="first reset"):
        DocumentSelectionVectorEnv(2).reset(options={"reset_mask": np.array([True, False])})


@pytest.mark.parametrize(
    "rows", [[0, 1], [0, 1, len(sample_candidates())], [-1, 0, 0], [0.0, 1.0, 2.0], 0]
)
def test_bad_question_rows(rows):
    with pytest.raises(ConfigError, match="question_rows"):
        DocumentSelectionVectorEnv(3).reset(options={"question_rows": rows})


def test_a_refused_reset_changes_nothing():
    batch = DocumentSelectionVectorEnv(2)
    batch.reset(seed=0, options={"question_rows": [0, 1]})
    batch.step([2, 3])
    state = batch.np_random.bit_generator.state
    with pytest.raises(ConfigError):
        batch.reset(seed=1, options={"question_rows": [0, -1]})
    assert batch.np_random.bit_generator.state == state
    assert batch.step([0, 0])[0]["order"][:, :2].tolist() == [[2, 0], [3, 0]]


def test_a_misspelt_option():
    with pytest.raises(ConfigError, match="did you mean 'question_rows'"):
        DocumentSelectionVectorEnv(2).reset(options={"question_row": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"autoreset_mode": "Never"}, "'Never'"),
        ({"render_mode": "human"}, "'human'"),
        ({"num_selected": NUM_CANDIDATES + 1}, "num_selected is 9"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        DocumentSelectionVectorEnv(**arguments)


@pytest.mark.parametrize(
    "actions", [[0, 1], [0, 1, NUM_CANDIDATES + 1], [-1, 0, 0], [0.0, 1.0, 2.0]]
)
def test_actions_outside_the_space(actions):
    batch = DocumentSelectionVectorEnv(3)
    with pytest.raises(ResetNeeded):
        batch.step(actions)
    batch.reset(seed=0)
    with pytest.raises(InvalidAction):
        batch.step(actions)
