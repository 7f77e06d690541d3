"""What an episode that hops and searches did, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlrag.environment.hop_transitions import Limits, Paths
from rlrag.environment.task import EpisodeTexts
from rlrag.records import FoundPassage, PathTurn
from rlrag.selection.slot_features import EDGE_KINDS


@dataclass(frozen=True, slots=True)
class HopPath:
    """The way of one episode, for reports and the service; `turns` spells it out.

    Most episodes are played for their reward alone, so that this holds plain numbers. The lists
    `turn`, `query`, `source` and `kind` are those of the slots, see `hop_transitions.SLOT`.
    """

    limits: Limits
    needs_pick: tuple[bool, ...]
    texts: EpisodeTexts
    valid: bool
    queries: Sequence[str]
    actions: list[int]
    order: list[int]
    left_out: list[int]
    turn: list[int]
    query: list[int]
    source: list[int]
    kind: list[int]

    def turns(self) -> tuple[PathTurn, ...]:
        """Its start, and every action with what it found."""
        found = self._found()
        turns = [self._spelled(PathTurn("start", query=self.queries[0]), 0, found)]
        actions = [action for action in self.actions if action >= 0]
        num_searches = 0
        for turn, action in enumerate(actions, start=1):
            if not self.valid and turn == len(actions):
                told = PathTurn("invalid")
            elif action < self.limits.num_slots:
                told = PathTurn("pick", action, self.texts.passages[action].id)
            elif action < self.limits.num_actions - 1:
                num_searches += 1
                writer, pick = divmod(action - self.limits.num_slots, self.limits.num_picks)
                on = self.order[pick] if self.needs_pick[writer] else None
                name = None if on is None else self.texts.passages[on].id
                told = PathTurn("search", on, name, self.queries[num_searches], writer)
            else:
                told = PathTurn("stop")
            turns.append(self._spelled(told, turn, found))
        return tuple(turns)

    def _found(self) -> dict[int, list[FoundPassage]]:
        """What each turn found."""
        found: dict[int, list[FoundPassage]] = {}
        for slot, passage in enumerate(self.texts.passages):
            if self.query[slot] >= 0:
                one = FoundPassage(slot, passage.id, "query")
            elif self.source[slot] < 0:
                one = FoundPassage(slot, passage.id, "title")
            else:
                edge = EDGE_KINDS[self.kind[slot]]
                one = FoundPassage(slot, passage.id, "hop", self.source[slot], edge)
            found.setdefault(self.turn[slot], []).append(one)
        return found

    def _spelled(self, told: PathTurn, turn: int, found: dict[int, list[FoundPassage]]) -> PathTurn:
        """A turn with what it found; a stop has no turn of its own, and finds nothing."""
        if told.action in ("stop", "invalid"):
            return told
        return PathTurn(
            told.action,
            told.slot,
            told.passage_id,
            told.query,
            told.writer,
            tuple(found.get(turn, ())),
            self.left_out[turn],
        )


def paths_of(
    limits: Limits,
    needs_pick: tuple[bool, ...],
    texts: Sequence[EpisodeTexts],
    paths: Paths,
    rows: Sequence[int],
    valid: Sequence[bool],
    queries: Sequence[Sequence[str]],
) -> list[HopPath]:
    """The ways of some episodes.

    Args:
        limits: Of the episodes.
        needs_pick: Of each query writer.
        texts: Of these episodes.
        paths: All episodes.
        rows: Which of them these are.
        valid: Whether their last actions were allowed.
        queries: What each has issued, the question first.
    """
    slots_PN = paths.slots_BN[rows]
    numbers = [
        paths.actions_BH[rows].tolist(),
        paths.picks.order_BK[rows].tolist(),
        paths.left_out_BT[rows].tolist(),
        *(slots_PN[name].tolist() for name in ("turn", "query", "source", "kind")),
    ]
    return [
        HopPath(limits, needs_pick, text, ok, asked, *each)
        for text, ok, asked, *each in zip(texts, valid, queries, *numbers, strict=True)
    ]
