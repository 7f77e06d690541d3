"""Episodes that hop and search, side by side: one search and one call of each writer a turn.

Shape letters: B episodes, N slots, S searches by writer and pick, D vector length, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np

from rlrag.environment import hop_transitions as rules
from rlrag.environment.hop_task import HopTask, HopTexts, padded
from rlrag.environment.hop_transitions import SLOT, Paths
from rlrag.environment.rendering import draw_episode, render_episode
from rlrag.environment.simulation import Advance
from rlrag.environment.task import Outcome
from rlrag.selection.queries.protocol import (
    MAX_QUERY_CHARACTERS,
    fresh_query,
    write_queries,
)


class HopSimulation:
    """Episodes of one hop task; implements `rlrag.environment.simulation.Simulation`.

    A step changes nothing before retriever, graph and writers have all answered, so that a step
    which one of them failed can be taken again.
    """

    def __init__(self, task: HopTask, num_episodes: int) -> None:
        self._task = task
        self.action_space = task.action_space
        self.observation_space = task.observation_space
        self.num_questions = len(task.candidates)
        self.texts: list[HopTexts] = []
        num_slots, vector_size = task.limits.num_slots, task.candidates.vector_size
        self._paths = rules.start(num_episodes, task.limits)
        self._ready_BS = np.zeros((num_episodes, task.num_searches), dtype=np.bool_)
        self._mask_BA = rules.action_masks(self._paths, self._ready_BS, task.limits)
        self._issued: list[tuple[str, ...]] = [()] * num_episodes
        self._question_BD = np.zeros((num_episodes, vector_size), dtype=np.float32)
        self._slot_BND = np.zeros((num_episodes, num_slots, vector_size), dtype=np.float32)
        self._num_words_B = np.zeros(num_episodes, dtype=np.int64)
        self._compares_B = np.zeros(num_episodes, dtype=np.bool_)

    @property
    def over_B(self) -> np.ndarray:
        """See `Simulation.over_B`."""
        return self._paths.picks.over_B

    def begin(self, where_B: np.ndarray, question_rows: np.ndarray) -> None:
        """See `Simulation.begin`."""
        task, begun = self._task, np.flatnonzero(where_B).tolist()
        openings = [task.opening(row) for row in question_rows.tolist()]
        slots_PN = np.stack([opening.slots_N for opening in openings], dtype=SLOT)
        left_out_P = np.array([opening.num_left_out for opening in openings])
        paths = rules.restart(self._paths, where_B, slots_PN, left_out_P)
        issued = list(self._issued)
        texts = {}
        for e, opening in zip(begun, openings, strict=True):
            texts[e] = opening.texts
            issued[e] = (opening.texts.question.question,)
        texts = self._with_queries(paths, texts, issued)
        if not self.texts:
            self.texts = [texts[e] for e in begun]
        self._paths, self._issued = paths, issued
        if task.candidates.vector_size:
            vectors_QD = task.candidates.question_vectors_QD
            self._question_BD[begun] = vectors_QD[question_rows]
            self._slot_BND[begun] = 0.0
            p, slot = np.nonzero(slots_PN["row"] >= 0)
            self._slot_BND[np.array(begun)[p], slot] = task.vectors(slots_PN["row"][p, slot])
        self._num_words_B[begun] = [len(opening.words) for opening in openings]
        self._compares_B[begun] = [opening.compares for opening in openings]
        self._show(texts)

    def advance(self, actions_B: np.ndarray, acting_B: np.ndarray) -> Advance:
        """See `Simulation.advance`."""
        task, before = self._task, self._paths
        paths, taken = rules.act(before, actions_B, acting_B, self._mask_BA, task.limits)
        issued = list(self._issued)
        searching, picking = np.flatnonzero(taken.searches_B), np.flatnonzero(taken.picks_B)
        if len(searching):
            self._search(paths, searching, actions_B[searching], issued)
        hopping = picking[~paths.picks.over_B[picking]]
        if task.edges is not None and len(hopping):
            self._hop(paths, hopping, actions_B[hopping])
        grown = np.flatnonzero(paths.num_filled_B > before.num_filled_B)
        texts = {
            e: self.texts[e].with_passages([task.passage(row)[:2] for row in rows_N[old:new]])
            for e, rows_N, old, new in zip(
                grown.tolist(),
                paths.slots_BN["row"][grown].tolist(),
                before.num_filled_B[grown].tolist(),
                paths.num_filled_B[grown].tolist(),
                strict=True,
            )
        }
        if task.num_searches:
            asking = np.flatnonzero(taken.picks_B | taken.searches_B | taken.ended_B).tolist()
            written = {e: texts.get(e, self.texts[e]) for e in asking}
            texts |= self._with_queries(paths, written, issued, taken.picks_B)
        self._paths, self._issued = paths, issued
        if task.candidates.vector_size and len(grown):
            is_new_BN = rules.filled(paths) & ~rules.filled(before)
            rows = paths.slots_BN["row"][is_new_BN]
            self._slot_BND[is_new_BN] = task.vectors(rows)
        self._show(texts)
        changed_B = np.zeros(len(actions_B), dtype=np.bool_)
        changed_B[list(texts)] = True
        return Advance(taken.ended_B, taken.cut_B, taken.valid_B, changed_B)

    def conclude(self, rows: Sequence[int], valid: Sequence[bool]) -> list[Outcome]:
        """See `Simulation.conclude`."""
        texts, issued = [self.texts[row] for row in rows], [self._issued[row] for row in rows]
        return self._task.conclude(texts, self._paths, rows, valid, issued)

    def observe(self) -> dict[str, np.ndarray]:
        """See `Simulation.observe`."""
        shown = self._task.observe(self._paths, self._num_words_B, self._compares_B, self._mask_BA)
        if self._task.candidates.vector_size:
            shown["question_embedding"] = self._question_BD.copy()
            shown["slot_embeddings"] = self._slot_BND.copy()
        return shown

    def action_masks(self) -> np.ndarray:
        """See `Simulation.action_masks`."""
        return self._mask_BA.copy()

    def rendered(self, row: int, mode: str, outcome: Outcome | None) -> str | np.ndarray:
        """See `Simulation.rendered`."""
        selection, limits = self._paths.picks.selection(row), self._task.limits
        if mode == "rgb_array":
            return draw_episode(selection, limits.num_slots, limits.num_picks, outcome)
        return render_episode(
            self.texts[row], selection, limits.num_picks, outcome, self._issued[row][1:]
        )

    def _search(
        self, paths: Paths, at_P: np.ndarray, actions_P: np.ndarray, issued: list[tuple[str, ...]]
    ) -> None:
        """Issue the queries of these episodes in one search and add what is found."""
        task = self._task
        episodes, searches_P = at_P.tolist(), actions_P - task.limits.num_slots
        queries = []
        for e, search in zip(episodes, searches_P.tolist(), strict=True):
            query = self.texts[e].queries[search]
            assert query is not None  # or the action would not be allowed
            queries.append(query)
            issued[e] = (*issued[e], query)
        found_PM, scores_PM = task.hits([self.texts[e].question_row for e in episodes], queries)
        shared_P = {"query": paths.num_queries_B[at_P]}
        places_PM = rules.add(paths, at_P, found_PM, task.settings.num_hits, shared_P)
        rules.score(paths, at_P, places_PM, scores_PM)
        if task.edges is not None:
            self._link_picks(paths, at_P, num_newest=0)

    def _hop(self, paths: Paths, at_P: np.ndarray, slots_P: np.ndarray) -> None:
        """Reveal the best neighbours of what these episodes just picked."""
        task, num_filled_P = self._task, paths.num_filled_B[at_P]
        found_PM = self._neighbours(at_P, paths.slots_BN["row"][at_P, slots_P])
        places_PM = rules.add(
            paths, at_P, found_PM, task.settings.num_revealed, {"source": slots_P}
        )
        rules.link(paths, at_P, places_PM, found_PM["edges"], newest=True)
        grown_P = paths.num_filled_B[at_P] > num_filled_P
        self._link_picks(paths, at_P[grown_P], num_newest=1)

    def _link_picks(self, paths: Paths, at_P: np.ndarray, num_newest: int) -> None:
        """Tell new slots their edges from earlier picks, but for the `num_newest` newest ones."""
        num_picked_B = paths.picks.num_picked_B
        for pick in range(self._task.limits.num_picks):
            at = at_P[pick < num_picked_B[at_P] - num_newest]
            if not len(at):
                break
            slots = paths.picks.order_BK[at, pick]
            found = self._neighbours(at, paths.slots_BN["row"][at, slots])
            places = rules.places(paths, at, found["row"])
            rules.link(paths, at, places, found["edges"], newest=False)
            last = pick == num_picked_B[at] - 1
            if last.any():
                rules.link(paths, at[last], places[last], found["edges"][last], newest=True)

    def _neighbours(self, at_P: np.ndarray, rows_P: np.ndarray) -> np.ndarray:
        neighbours = self._task.neighbours
        return padded(
            [
                neighbours(self.texts[e].question_row, row)
                for e, row in zip(at_P.tolist(), rows_P.tolist(), strict=True)
            ]
        )

    def _with_queries(
        self,
        paths: Paths,
        texts: dict[int, HopTexts],
        issued: Sequence[tuple[str, ...]],
        asked_B: np.ndarray | None = None,
    ) -> dict[int, HopTexts]:
        """The texts with what each episode could ask next.

        Writers are asked in the episodes of `asked_B`, all when unset: what they write depends on
        the picks alone; `fresh_query` says which of it is something to ask.
        """
        task, limits = self._task, self._task.limits
        if not task.num_searches:
            return texts
        may_B = rules.may_search(paths, limits).tolist()
        renewed = may_B if asked_B is None else (asked_B & may_B).tolist()
        queries: dict[int, list[str | None]] = {}
        for e, text in texts.items():
            queries[e] = [None] * task.num_searches
            if may_B[e] and not renewed[e]:
                queries[e] = [query and fresh_query(query, issued[e]) for query in text.queries]
        writing = [e for e in texts if renewed[e]]
        picks = {
            e: tuple([texts[e].passages[slot] for slot in paths.picks.selection(e)])
            for e in writing
        }
        for number, writer in enumerate(task.writers):
            asked = [
                (e, chosen)
                for e in writing
                for chosen in range(len(picks[e]) if writer.needs_pick else 1)
            ]
            if not asked:
                continue
            written = write_queries(
                writer,
                [texts[e].question for e, _ in asked],
                [picks[e] for e, _ in asked],
                [picks[e][chosen] if writer.needs_pick else None for e, chosen in asked],
                [issued[e] for e, _ in asked],
                number,
            )
            if written.num_cut:
                gymnasium.logger.warn(
                    f"query writer {number}, {type(writer).__name__}, wrote {written.num_cut} "
                    f"queries of more than {MAX_QUERY_CHARACTERS} characters, which are cut"
                )
            for (e, chosen), query in zip(asked, written.queries, strict=True):
                queries[e][number * limits.num_picks + chosen] = query
        return {e: text.with_queries(tuple(queries[e])) for e, text in texts.items()}

    def _show(self, texts: dict[int, HopTexts]) -> None:
        """Take over new texts, and allow what they and the episodes allow."""
        for e, text in texts.items():
            self.texts[e] = text
        if texts and self._task.num_searches:
            self._ready_BS[list(texts)] = [
                [query is not None for query in text.queries] for text in texts.values()
            ]
        self._mask_BA = rules.action_masks(self._paths, self._ready_BS, self._task.limits)
