"""The text of an episode, whole and line by line."""

from __future__ import annotations

from rlrag.environment.rendering import render_episode
from rlrag.environment.task import EpisodeTexts, Outcome
from rlrag.errors import GenerationError
from rlrag.records import Passage, Question

PASSAGES = (Passage("p0", "First", "one"), Passage("p1", "", "two"))
TEXTS = EpisodeTexts(
    question_row=0,
    question=Question("q0", "what?", ("one",)),
    passages=PASSAGES,
    contents=tuple(passage.contents for passage in PASSAGES),
)


def test_a_running_episode():
    assert render_episode(TEXTS, (), num_selected=2, outcome=None) == (
        "Question q0: what?\nPicked 0 of at most 2:\nStill picking.\n"
    )


def test_a_finished_episode_lists_picks_best_first_and_names_untitled_ones_by_id():
    outcome = Outcome(0.8, PASSAGES[::-1], True, "one", {"contained": 1.0, "cost": 0.2})
    assert render_episode(TEXTS, (1, 0), num_selected=2, outcome=outcome) == (
        "Question q0: what?\n"
        "Picked 2 of at most 2:\n"
        "  1. p1 (candidate 1)\n"
        "  2. First (candidate 0)\n"
        "Answer: one\n"
        "Reward: 0.800 (contained 1.000, cost 0.200)\n"
    )


def test_an_invalid_end_without_answer_or_terms():
    text = render_episode(TEXTS, (1,), 2, Outcome(-1.0, PASSAGES[1:], False, None, {}))
    assert text.endswith("Ended by a candidate that was already picked.\nReward: -1.000\n")
    assert "Answer" not in text


def test_a_failed_reward_says_why():
    error = GenerationError("out of memory")
    outcome = Outcome(float("nan"), (), True, None, {}, error=error)
    assert render_episode(TEXTS, (), 2, outcome).endswith("Reward: not computed: out of memory\n")
