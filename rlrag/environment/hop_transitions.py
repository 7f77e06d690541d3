"""The rules of episodes that hop and search: what an action does to a pool that grows.

Everything works on B episodes at once; the scalar environment is the case B = 1. `start`, `restart`
and `act` change no argument and give arrays of their own, which `add`, `link` and `score` complete
in place: a copy of all pools for each would take most of a step. Picks and stops are those of
`rlrag.environment.transitions`, with slots in place of candidates.

Shape letters: B episodes, P some of them, N slots, K picks, R query writers, A = N + R K + 1
actions, H turns, M passages that an action finds, E kinds of edges, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rlrag.environment import transitions
from rlrag.environment.transitions import Episodes
from rlrag.selection.slot_features import EDGE_KINDS, SLOT_FEATURES

FOUND = np.dtype(
    [
        ("row", np.int64),
        ("words", np.uint64),
        ("similarity", np.float32),
        ("named", np.bool_),
        ("kind", np.int8),
        ("edges", np.float32, (len(EDGE_KINDS),)),
    ]
)
"""A passage that was found for a question.

`row` of the corpus, -1 where there is none; `words`, a bit for each of the question's words that it
has; `similarity` to the question; whether the question names its title; the `kind` of its
strongest edge from the pick that revealed it, -1 without; and the weight of each kind of edge.
"""

SLOT = np.dtype(
    [
        *FOUND.descr,
        ("newest_edges", np.float32, (len(EDGE_KINDS),)),
        ("turn", np.int32),
        ("query", np.int32),
        ("source", np.int32),
        ("rank", np.int32),
        ("newest_score", np.float32),
        ("best_score", np.float32),
    ]
)
"""A slot of the pool: a passage and how it was found.

`edges` are the largest weights from any pick, `newest_edges` those from the newest one. `turn` is
the one in which it was found, 0 at the start. `query` is the number of the query that found it, 0
for the question and -1 where a hop or a title did; `source` is the slot whose passage was hopped
from or whose query it was, -1 without. `rank` is the place in the list of what found it, from 1:
among the hits of its query, the neighbours of its source, or the passages that the question names.
Scores are those of the newest query and the best of all, -inf where no query found it.
"""

EMPTY = np.zeros((), dtype=SLOT)
for _name, _value in {"row": -1, "kind": -1, "query": -1, "source": -1}.items():
    EMPTY[_name] = _value
EMPTY["newest_score"] = EMPTY["best_score"] = -np.inf


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an episode may go; turns are picks and searches together."""

    num_slots: int
    num_picks: int
    num_writers: int
    max_queries: int
    max_turns: int
    auto_stop: bool = True
    require_pick: bool = False

    @property
    def num_actions(self) -> int:
        """Picks of slots, searches by writer and pick, and the stop (A)."""
        return self.num_slots + self.num_writers * self.num_picks + 1


@dataclass(frozen=True, slots=True)
class Paths:
    """The state of B episodes.

    `actions_BH` are the actions so far, -1 where none was taken, and `left_out_BT` the passages
    that were found and had no room: at the start, and in each of H turns.
    """

    picks: Episodes
    slots_BN: np.ndarray
    num_filled_B: np.ndarray
    num_turns_B: np.ndarray
    num_queries_B: np.ndarray
    actions_BH: np.ndarray
    left_out_BT: np.ndarray


@dataclass(frozen=True, slots=True)
class Taken:
    """What the actions of a step were, each array bool of shape (B,).

    `picks_B` and `searches_B` are valid ones; `cut_B` are episodes that the turn limit ended.
    """

    ended_B: np.ndarray
    cut_B: np.ndarray
    valid_B: np.ndarray
    picks_B: np.ndarray
    searches_B: np.ndarray


def start(num_episodes: int, limits: Limits) -> Paths:
    """B episodes with empty pools."""
    zeros_B = np.zeros(num_episodes, dtype=np.int64)
    return Paths(
        picks=transitions.start(num_episodes, limits.num_slots, limits.num_picks),
        slots_BN=np.full((num_episodes, limits.num_slots), EMPTY),
        num_filled_B=zeros_B,
        num_turns_B=zeros_B,
        num_queries_B=zeros_B,
        actions_BH=np.full((num_episodes, limits.max_turns), -1, dtype=np.int64),
        left_out_BT=np.zeros((num_episodes, limits.max_turns + 1), dtype=np.int64),
    )


def restart(
    paths: Paths, where_B: np.ndarray, slots_PN: np.ndarray, left_out_P: np.ndarray
) -> Paths:
    """The same episodes, with those in `where_B` fresh again and their pools as given."""
    slots_BN, num_filled_B = paths.slots_BN.copy(), paths.num_filled_B.copy()
    slots_BN[where_B] = slots_PN
    num_filled_B[where_B] = (slots_PN["row"] >= 0).sum(axis=1)
    left_out_BT = np.where(where_B[:, None], 0, paths.left_out_BT)
    left_out_BT[where_B, 0] = left_out_P
    return Paths(
        picks=transitions.restart(paths.picks, where_B),
        slots_BN=slots_BN,
        num_filled_B=num_filled_B,
        num_turns_B=np.where(where_B, 0, paths.num_turns_B),
        num_queries_B=np.where(where_B, 0, paths.num_queries_B),
        actions_BH=np.where(where_B[:, None], -1, paths.actions_BH),
        left_out_BT=left_out_BT,
    )


def filled(paths: Paths) -> np.ndarray:
    """Which slots hold a passage: bool (B, N)."""
    return np.arange(paths.slots_BN.shape[1]) < paths.num_filled_B[:, None]


def may_search(paths: Paths, limits: Limits) -> np.ndarray:
    """Which episodes may search again: bool (B,).

    A search needs a query that is left, room in the pool, and a pick and a turn after it, without
    which nobody could pick what it finds.
    """
    return (
        ~paths.picks.over_B
        & (paths.num_queries_B < limits.max_queries)
        & (paths.num_turns_B + 1 < limits.max_turns)
        & (paths.num_filled_B < limits.num_slots)
        & (paths.picks.num_picked_B < limits.num_picks)
    )


def action_masks(paths: Paths, ready_BS: np.ndarray, limits: Limits) -> np.ndarray:
    """Which actions are allowed: bool (B, A), the last one being the stop.

    Args:
        paths: The episodes.
        ready_BS: Searches that have a query which has not been issued, bool (B, R K).
        limits: Of the episodes. With `require_pick` the stop is not allowed before the first pick,
            unless nothing else is.
    """
    plain_BA = transitions.action_masks(paths.picks)
    mask_BA = np.concatenate(
        [
            plain_BA[:, :-1] & filled(paths),
            ready_BS & may_search(paths, limits)[:, None],
            plain_BA[:, -1:],
        ],
        axis=1,
    )
    if limits.require_pick:
        mask_BA[:, -1] = (paths.picks.num_picked_B > 0) | ~mask_BA[:, :-1].any(axis=1)
    return mask_BA


def act(
    paths: Paths,
    actions_B: np.ndarray,
    acting_B: np.ndarray,
    allowed_BA: np.ndarray,
    limits: Limits,
) -> tuple[Paths, Taken]:
    """Take one action in each episode in `acting_B`; the others stay as they are.

    What the action finds is left to `add`. An action that is not allowed is invalid: it ends the
    episode and leaves its picks as they were. A pick or search in the last turn ends it too.
    """
    valid_B = acting_B & allowed_BA[np.arange(len(actions_B)), actions_B]
    picks_B = valid_B & (actions_B < limits.num_slots)
    stops_B = valid_B & (actions_B == limits.num_actions - 1)
    searches_B = valid_B & ~picks_B & ~stops_B
    picks, ended_B, _ = transitions.advance(
        paths.picks,
        np.where(stops_B, limits.num_slots, actions_B),
        picks_B | stops_B,
        limits.auto_stop,
    )
    num_turns_B = paths.num_turns_B + (picks_B | searches_B)
    cut_B = acting_B & valid_B & ~ended_B & (num_turns_B == limits.max_turns)
    ended_B = ended_B | cut_B | (acting_B & ~valid_B)
    actions_BH = paths.actions_BH.copy()
    actions_BH[acting_B, paths.num_turns_B[acting_B]] = actions_B[acting_B]
    after = Paths(
        picks=replace(picks, over_B=picks.over_B | ended_B),
        slots_BN=paths.slots_BN.copy(),
        num_filled_B=paths.num_filled_B.copy(),
        num_turns_B=num_turns_B,
        num_queries_B=paths.num_queries_B + searches_B,
        actions_BH=actions_BH,
        left_out_BT=paths.left_out_BT.copy(),
    )
    return after, Taken(ended_B, cut_B, valid_B, picks_B, searches_B)


def places(paths: Paths, at_P: np.ndarray, rows_PM: np.ndarray) -> np.ndarray:
    """The slot of each row in its episode's pool, -1 for those that are in none: (P, M)."""
    same_PMN = rows_PM[:, :, None] == paths.slots_BN["row"][at_P][:, None, :]
    same_PMN &= (rows_PM >= 0)[:, :, None]
    return np.where(same_PMN.any(axis=2), same_PMN.argmax(axis=2), -1)


def add(
    paths: Paths,
    at_P: np.ndarray,
    found_PM: np.ndarray,
    most: int,
    shared_P: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Put what was found into the next free slots of the pools, in its order.

    What is in the pool already stays where it is. Of the others the first `most` are added; what
    has no room among them is counted in `left_out_BT` of the present turn.

    Args:
        paths: All episodes.
        at_P: Those that found something.
        found_PM: What they found, of type `FOUND`; a row stands once in an episode's.
        most: Passages to add to each.
        shared_P: Further fields of the slots, one value an episode.

    Returns:
        The slot of everything found, -1 for what is in no slot: (P, M).
    """
    known_PM = places(paths, at_P, found_PM["row"])
    new_PM = (found_PM["row"] >= 0) & (known_PM < 0)
    number_PM = new_PM.cumsum(axis=1)
    wanted_PM = new_PM & (number_PM <= most)
    place_PM = paths.num_filled_B[at_P][:, None] + number_PM - 1
    added_PM = wanted_PM & (place_PM < paths.slots_BN.shape[1])
    p, m = np.nonzero(added_PM)
    fresh = np.full(len(p), EMPTY)
    for name in FOUND.names or ():
        fresh[name] = found_PM[name][p, m]
    turn_P = paths.num_turns_B[at_P]
    fresh["turn"], fresh["rank"] = turn_P[p], m + 1
    for name, values_P in shared_P.items():
        fresh[name] = values_P[p]
    paths.slots_BN[at_P[p], place_PM[p, m]] = fresh
    paths.num_filled_B[at_P] += added_PM.sum(axis=1)
    paths.left_out_BT[at_P, turn_P] += (wanted_PM & ~added_PM).sum(axis=1)
    return np.where(added_PM, place_PM, known_PM)


def link(
    paths: Paths, at_P: np.ndarray, places_PM: np.ndarray, edges_PME: np.ndarray, newest: bool
) -> None:
    """Tell slots the weights of their edges from one pick of each episode.

    Args:
        paths: All episodes.
        at_P: Those whose pick it is.
        places_PM: Slots of the pick's neighbours, -1 for those that are in none.
        edges_PME: Weights of the edges to them, by kind.
        newest: The pick is the newest one of each.
    """
    p, m = np.nonzero(places_PM >= 0)
    at = (at_P[p], places_PM[p, m])
    slots_BN = paths.slots_BN
    slots_BN["edges"][at] = np.maximum(slots_BN["edges"][at], edges_PME[p, m])
    if newest:
        slots_BN["newest_edges"][at_P] = 0.0
        slots_BN["newest_edges"][at] = edges_PME[p, m]


def score(paths: Paths, at_P: np.ndarray, places_PM: np.ndarray, scores_PM: np.ndarray) -> None:
    """Tell slots their score for the query that was just issued."""
    p, m = np.nonzero(places_PM >= 0)
    at = (at_P[p], places_PM[p, m])
    slots_BN = paths.slots_BN
    slots_BN["newest_score"][at_P] = -np.inf
    slots_BN["newest_score"][at] = scores_PM[p, m]
    slots_BN["best_score"][at] = np.maximum(slots_BN["best_score"][at], scores_PM[p, m])


def slot_features(paths: Paths, num_words_B: np.ndarray, max_turns: int) -> np.ndarray:
    """Features of the slots as `SLOT_FEATURES` names them, float32 (B, N, F); 0 where empty.

    Scores are 0 where no query found the passage. `uncovered` is the share of the question's words
    that the passage has and no pick has; `turn` that of the turns after which it was found.
    """
    slots_BN = paths.slots_BN
    is_filled_BN = filled(paths)
    left_BN = slots_BN["words"] & ~_covered(paths)[:, None]
    num_edges = len(EDGE_KINDS)
    features_BNF = np.empty((*slots_BN.shape, len(SLOT_FEATURES)), dtype=np.float32)
    for place, column_BN in enumerate(
        (
            slots_BN["similarity"],
            1.0 / np.maximum(slots_BN["rank"], 1),
            _finite(slots_BN["newest_score"]),
            _finite(slots_BN["best_score"]),
            slots_BN["named"],
            np.bitwise_count(left_BN) / np.maximum(num_words_B, 1)[:, None],
            slots_BN["query"] == 0,
            slots_BN["turn"] / max_turns,
        )
    ):
        features_BNF[..., place] = column_BN
    features_BNF[..., -2 * num_edges : -num_edges] = slots_BN["edges"]
    features_BNF[..., -num_edges:] = slots_BN["newest_edges"]
    features_BNF[~is_filled_BN] = 0.0
    return features_BNF


def global_features(
    paths: Paths, num_words_B: np.ndarray, compares_B: np.ndarray, limits: Limits
) -> np.ndarray:
    """Features of the episodes as `GLOBAL_FEATURES` names them, float32 (B, F).

    Counts are shares of their limits; `named_left` counts the slots that the question names and
    nobody picked, and `comparison` says whether the question compares.
    """
    named_BN = paths.slots_BN["named"] & ~transitions.picked(paths.picks)
    return np.stack(
        [
            paths.num_turns_B / limits.max_turns,
            paths.picks.num_picked_B / limits.num_picks,
            paths.num_queries_B / max(limits.max_queries, 1),
            np.bitwise_count(_covered(paths)) / np.maximum(num_words_B, 1),
            named_BN.sum(axis=1),
            compares_B,
            paths.num_filled_B / limits.num_slots,
        ],
        axis=1,
    ).astype(np.float32)


def _covered(paths: Paths) -> np.ndarray:
    """The question's words that the picks have, a bit each: uint64 (B,)."""
    words_BN = np.where(transitions.picked(paths.picks), paths.slots_BN["words"], np.uint64(0))
    covered_B: np.ndarray = np.bitwise_or.reduce(words_BN, axis=1)
    return covered_B


def _finite(scores_BN: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(scores_BN), scores_BN, np.float32(0))
