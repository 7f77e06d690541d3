"""The rules of selection episodes, by hand and against a plain loop."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlrag.environment import transitions

ALL = np.array([True])


def one_episode(num_candidates: int, num_selected: int, actions: list[int]):
    """The episode after these actions, with the last `ended` and `valid`."""
    episodes = transitions.start(1, num_candidates, num_selected)
    ended = valid = np.array([False])
    for action in actions:
        episodes, ended, valid = transitions.advance(episodes, np.array([action]), ALL)
    return episodes, bool(ended[0]), bool(valid[0])


def test_a_fresh_episode_has_no_picks_and_allows_every_action():
    episodes = transitions.start(num_episodes=2, num_candidates=3, num_selected=2)
    assert episodes.order_BK.tolist() == [[3, 3], [3, 3]]
    assert not transitions.picked(episodes).any()
    assert transitions.action_masks(episodes).tolist() == [[True] * 4] * 2
    assert episodes.selection(0) == ()


def test_a_pick_is_recorded_in_order_and_masked():
    episodes, ended, valid = one_episode(4, 3, [2, 0])
    assert (ended, valid) == (False, True)
    assert episodes.order_BK.tolist() == [[2, 0, 4]]
    assert episodes.selection(0) == (2, 0)
    assert transitions.picked(episodes).tolist() == [[True, False, True, False]]
    assert transitions.action_masks(episodes).tolist() == [[False, True, False, True, True]]


def test_the_last_pick_ends_the_episode_and_leaves_only_the_stop():
    episodes, ended, valid = one_episode(4, 2, [3, 1])
    assert (ended, valid) == (True, True)
    assert episodes.over_B.tolist() == [True]
    assert transitions.action_masks(episodes).tolist() == [[False] * 4 + [True]]


def test_the_stop_ends_the_episode_with_what_was_picked():
    episodes, ended, valid = one_episode(4, 3, [1, 4])
    assert (ended, valid) == (True, True)
    assert episodes.selection(0) == (1,)


def test_the_stop_at_once_gives_an_empty_selection():
    episodes, ended, valid = one_episode(4, 3, [4])
    assert (ended, valid) == (True, True)
    assert episodes.selection(0) == ()


def test_a_repeated_pick_is_invalid_and_ends_the_episode_unchanged():
    episodes, ended, valid = one_episode(4, 3, [1, 1])
    assert (ended, valid) == (True, False)
    assert episodes.selection(0) == (1,)


def test_all_candidates_may_be_picked():
    episodes, ended, valid = one_episode(2, 2, [1, 0])
    assert (ended, valid) == (True, True)
    assert episodes.selection(0) == (1, 0)


def test_episodes_that_do_not_act_stay_as_they_are():
    before = transitions.start(2, 3, 2)
    after, ended, valid = transitions.advance(before, np.array([1, 3]), np.array([True, False]))
    assert after.order_BK.tolist() == [[1, 3], [3, 3]]
    assert ended.tolist() == [False, False]
    assert valid.tolist() == [True, False]
    assert after.over_B.tolist() == [False, False]


def test_advance_and_restart_change_no_argument():
    before = transitions.start(2, 3, 2)
    after, _, _ = transitions.advance(before, np.array([0, 3]), np.array([True, True]))
    again = transitions.restart(after, np.array([False, True]))
    assert before.order_BK.tolist() == [[3, 3], [3, 3]]
    assert after.over_B.tolist() == [False, True]
    assert again.over_B.tolist() == [False, False]
    assert again.order_BK.tolist() == [[0, 3], [3, 3]]
    fresh = transitions.restart(again, np.array([True, False]))
    assert fresh.order_BK.tolist() == [[3, 3], [3, 3]]
    assert (fresh.selection(0), again.selection(0)) == ((), (0,))


def plain_rules(num_candidates: int, num_selected: int, actions: list[int]):
    """The same rules with lists: picks, over and valid after the actions that were played."""
    picks: list[int] = []
    for action in actions:
        if action == num_candidates:
            return picks, True, True
        if action in picks:
            return picks, True, False
        picks.append(action)
        if len(picks) == num_selected:
            return picks, True, True
    return picks, False, True


@given(st.data())
def test_a_batch_follows_the_rules_written_as_a_loop(data):
    num_candidates = data.draw(st.integers(1, 6))
    num_selected = data.draw(st.integers(1, num_candidates))
    num_episodes = data.draw(st.integers(1, 5))
    plays = data.draw(
        st.lists(
            st.lists(st.integers(0, num_candidates), min_size=num_episodes, max_size=num_episodes),
            max_size=num_selected + 1,
        )
    )
    episodes = transitions.start(num_episodes, num_candidates, num_selected)
    valid_B = np.ones(num_episodes, dtype=bool)
    for play in plays:
        acting = ~episodes.over_B
        episodes, _, valid = transitions.advance(episodes, np.array(play), acting)
        valid_B[acting] = valid[acting]
    for i in range(num_episodes):
        picks, over, valid = plain_rules(num_candidates, num_selected, [play[i] for play in plays])
        assert episodes.selection(i) == tuple(picks)
        assert (bool(episodes.over_B[i]), bool(valid_B[i])) == (over, valid)
        allowed = [not over and c not in picks for c in range(num_candidates)]
        assert transitions.action_masks(episodes)[i].tolist() == [*allowed, True]
