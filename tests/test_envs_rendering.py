"""The text of an episode, whole and line by line."""

from __future__ import annotations

from rlrag.environment.rendering import draw_episode, render_episode
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


def cells(picture) -> list[list[tuple[int, ...]]]:
    return [[tuple(pixel) for pixel in row] for row in picture[8::16, 8::16].tolist()]


def test_a_picture_has_a_row_for_each_place_and_a_column_for_each_candidate():
    free, picked, invalid = (205, 205, 205), (40, 90, 200), (210, 50, 40)
    running = draw_episode((2,), num_candidates=3, num_selected=2, outcome=None)
    assert (running.shape, running.dtype.name) == ((33, 49, 3), "uint8")
    assert cells(running) == [[free, free, picked], [free] * 3]
    assert (running[[0, 16, 32]] == 255).all()
    assert (running[:, [0, 16, 32, 48]] == 255).all()
    ended = draw_episode((1, 0), 2, 2, Outcome(0.8, PASSAGES[::-1], True, None, {}))
    assert cells(ended) == [[free, picked], [picked, free]]
    refused = draw_episode((1,), 2, 2, Outcome(-1.0, PASSAGES[1:], False, None, {}))
    assert cells(refused) == [[free, invalid], [free, free]]
