"""Transition rules of the selection environment: how an action changes an episode.

Everything works on B episodes at once; the scalar environment is the case B = 1. The functions
change no argument. Shape letters: B episodes, N candidates, A = N + 1 actions, K selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Episodes:
    """The state of B episodes.

    `order_BK` holds the candidate positions picked so far, best first, and N where nothing has been
    picked yet; `over_B` is True from an episode's last action on.
    """

    order_BK: np.ndarray
    num_picked_B: np.ndarray
    over_B: np.ndarray
    num_candidates: int

    def selection(self, row: int) -> tuple[int, ...]:
        """Candidate positions that episode `row` has picked, best first."""
        return tuple(self.order_BK[row, : self.num_picked_B[row]].tolist())


def start(num_episodes: int, num_candidates: int, num_selected: int) -> Episodes:
    """B fresh episodes: nothing picked, none over.

    Example:
        >>> start(num_episodes=2, num_candidates=4, num_selected=3).order_BK.tolist()
        [[4, 4, 4], [4, 4, 4]]
    """
    return Episodes(
        order_BK=np.full((num_episodes, num_selected), num_candidates, dtype=np.int64),
        num_picked_B=np.zeros(num_episodes, dtype=np.int64),
        over_B=np.zeros(num_episodes, dtype=np.bool_),
        num_candidates=num_candidates,
    )


def restart(episodes: Episodes, where_B: np.ndarray) -> Episodes:
    """The same episodes, with those in `where_B` fresh again."""
    return Episodes(
        order_BK=np.where(where_B[:, None], episodes.num_candidates, episodes.order_BK),
        num_picked_B=np.where(where_B, 0, episodes.num_picked_B),
        over_B=episodes.over_B & ~where_B,
        num_candidates=episodes.num_candidates,
    )


def picked(episodes: Episodes) -> np.ndarray:
    """Which candidates have been picked: bool [B, N].

    Example:
        >>> one = start(num_episodes=1, num_candidates=3, num_selected=2)
        >>> one, _, _ = advance(one, np.array([1]), np.array([True]))
        >>> picked(one).tolist()
        [[False, True, False]]
    """
    num_episodes = len(episodes.order_BK)
    # The last column collects the entries "not yet picked" of the order, which are N.
    picked_BA = np.zeros((num_episodes, episodes.num_candidates + 1), dtype=np.bool_)
    picked_BA[np.arange(num_episodes)[:, None], episodes.order_BK] = True
    return picked_BA[:, :-1]


def action_masks(episodes: Episodes) -> np.ndarray:
    """Which actions are allowed: bool [B, N + 1], the last one being the stop.

    A candidate is allowed until it is picked, and none once K are picked or the episode is over;
    the stop always is.
    """
    num_episodes, num_selected = episodes.order_BK.shape
    mask_BA = np.ones((num_episodes, episodes.num_candidates + 1), dtype=np.bool_)
    done_B = episodes.over_B | (episodes.num_picked_B == num_selected)
    mask_BA[:, :-1] = ~(picked(episodes) | done_B[:, None])
    return mask_BA


def advance(
    episodes: Episodes, actions_B: np.ndarray, acting_B: np.ndarray, auto_stop: bool = True
) -> tuple[Episodes, np.ndarray, np.ndarray]:
    """Apply one action to each episode in `acting_B`; the others stay as they are.

    Args:
        episodes: the states before.
        actions_B: an integer from 0 to N for each episode; N stops.
        acting_B: the episodes that act; none of them may be over.
        auto_stop: the K-th pick ends the episode; without, only the stop is left after it.

    Returns:
        The states after, the episodes that this action ended, and the actions that were valid. An
        action is invalid when it names a candidate already picked; it ends the episode and leaves
        the picks as they were. Both arrays are bool [B], and False where an episode did not act.

    Example:
        >>> two = start(num_episodes=2, num_candidates=4, num_selected=1)
        >>> after, ended, valid = advance(two, np.array([2, 4]), np.array([True, True]))
        >>> after.order_BK.tolist(), ended.tolist(), valid.tolist()
        ([[2], [4]], [True, True], [True, True])
    """
    stops_B = acting_B & (actions_B == episodes.num_candidates)
    repeats_B = (episodes.order_BK == actions_B[:, None]).any(axis=1)
    picks_B = acting_B & ~stops_B & ~repeats_B
    valid_B = picks_B | stops_B

    order_BK = episodes.order_BK.copy()
    order_BK[picks_B, episodes.num_picked_B[picks_B]] = actions_B[picks_B]
    num_picked_B = episodes.num_picked_B + picks_B
    ended_B = acting_B & ~picks_B
    if auto_stop:
        ended_B |= acting_B & (num_picked_B == order_BK.shape[1])
    after = Episodes(
        order_BK=order_BK,
        num_picked_B=num_picked_B,
        over_B=episodes.over_B | ended_B,
        num_candidates=episodes.num_candidates,
    )
    return after, ended_B, valid_B
