"""Data, reward and limits of episodes that hop and search, and what is looked up for them.

Shape letters: B episodes, N slots, K picks, S searches by writer and pick, M passages that an
action finds, D vector length, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gymnasium import spaces

from rlrag.config import HopSettings
from rlrag.environment import hop_transitions as rules
from rlrag.environment import transitions
from rlrag.environment.hop_parts import PassageEdges, Search
from rlrag.environment.hop_path import HopPath, paths_of
from rlrag.environment.hop_transitions import EMPTY, FOUND, Limits, Paths
from rlrag.environment.sample_task import (
    SampleEdges,
    SampleSearch,
    SampleWriter,
    sample_candidates,
)
from rlrag.environment.task import (
    DEFAULT_COST_PER_PASSAGE,
    EpisodeTexts,
    Outcome,
    check_task,
    conclude,
    finite,
)
from rlrag.errors import ConfigError, EpisodeError, RetrievalError
from rlrag.records import Passage
from rlrag.retrieval.candidates import CandidateTable, vectors_at
from rlrag.rewards.answering import PassageReward
from rlrag.rewards.protocol import SelectionReward
from rlrag.selection.features import content_words
from rlrag.selection.queries.protocol import QueryWriter
from rlrag.selection.slot_features import EDGE_KINDS, GLOBAL_FEATURES, SLOT_FEATURES

_KEPT_QUESTIONS, _KEPT_PASSAGES, _KEPT_HOPS = 4_096, 16_384, 16_384
"""Entries of the caches: of what an episode starts with, of texts, and of neighbours."""

_MAX_WORDS = 64  # bits of SLOT["words"]; no question has more content words that matter
_COMPARISON_WORDS = frozenset(
    # One string is easier to read and change than a list of quoted words.
    """both same than older oldest younger youngest earlier earliest later latest first last more
    most less least fewer larger largest longer longest taller higher
    """.split()  # noqa: SIM905
)

_NOTHING = np.zeros((), dtype=FOUND)
_NOTHING["row"] = _NOTHING["kind"] = -1


@dataclass(frozen=True, slots=True)
class HopTexts(EpisodeTexts):
    """The texts of an episode whose pool grows: the filled slots, and what it could ask next.

    `queries` has an entry for each search action, None where there is nothing new to ask.
    """

    queries: tuple[str | None, ...] = ()

    def with_passages(self, new: Sequence[tuple[Passage, str]]) -> HopTexts:
        """The texts with these passages and their contents in the next slots."""
        return HopTexts(  # which takes a fraction of what `dataclasses.replace` does
            self.question_row,
            self.question,
            self.passages + tuple([passage for passage, _ in new]),
            self.contents + tuple([contents for _, contents in new]),
            self.queries,
        )

    def with_queries(self, queries: tuple[str | None, ...]) -> HopTexts:
        """The texts with these queries to ask."""
        return HopTexts(self.question_row, self.question, self.passages, self.contents, queries)

    def info(self) -> dict[str, Any]:
        """See `EpisodeTexts.info`."""
        return EpisodeTexts.info(self) | {"queries": self.queries}


@dataclass(frozen=True, slots=True)
class Opening:
    """What every episode of a question starts with.

    `bits` gives each of the question's words its bit in `SLOT["words"]`.
    """

    texts: HopTexts
    slots_N: np.ndarray
    num_left_out: int
    words: frozenset[str]
    bits: dict[str, int]
    named_rows: frozenset[int]
    compares: bool


class HopTask:
    """The data, the parts and the limits of episodes that hop and search, checked once."""

    def __init__(
        self,
        candidates: CandidateTable | None,
        reward: SelectionReward | None,
        num_selected: int,
        invalid_reward: float,
        edges: PassageEdges | None,
        retriever: Search | None,
        writers: Sequence[QueryWriter],
        settings: HopSettings | dict[str, object] | None,
    ) -> None:
        if candidates is None:
            candidates = sample_candidates()
            edges = SampleEdges() if edges is None else edges
            retriever = SampleSearch() if retriever is None else retriever
            writers = writers or (SampleWriter(),)
        self.candidates = candidates
        self.reward = (
            PassageReward(cost_per_passage=DEFAULT_COST_PER_PASSAGE) if reward is None else reward
        )
        self.invalid_reward = float(invalid_reward)
        self.edges, self.retriever, self.writers = edges, retriever, tuple(writers)
        self.settings = HopSettings.model_validate({} if settings is None else settings)
        self._follows_E = np.isin(EDGE_KINDS, self.settings.edges)
        check_task(candidates, self.invalid_reward)
        self.num_first = self._num_first()
        self.limits = self._limits(num_selected)
        self.num_searches = self.limits.num_writers * num_selected
        self.action_space = spaces.Discrete(self.limits.num_actions)
        self.observation_space = self._observation_space()
        self.opening = functools.lru_cache(_KEPT_QUESTIONS)(self._opening)
        self.passage = functools.lru_cache(_KEPT_PASSAGES)(self._passage)
        self.neighbours = functools.lru_cache(_KEPT_HOPS)(self._neighbours)

    def _num_first(self) -> int:
        num_first, most = self.settings.num_first, self.candidates.num_candidates
        if num_first is not None and num_first > most:
            raise ConfigError(
                f"num_first is {num_first} but a question has {most} candidates; choose a number "
                f"from 1 to {most}"
            )
        return most if num_first is None else num_first

    def _limits(self, num_selected: int) -> Limits:
        settings = self.settings
        max_queries = settings.max_queries if self.writers else 0
        if self.writers and self.retriever is None:
            raise ConfigError("query writers need a retriever that searches; give `retriever`")
        num_passages = len(self.candidates.corpus)
        if self.writers and settings.num_hits > num_passages:
            raise ConfigError(
                f"num_hits is {settings.num_hits} but the corpus has {num_passages} passages; "
                f"choose a number from 1 to {num_passages}"
            )
        num_slots = settings.num_slots
        if num_slots is None:
            found_by_hops = settings.num_revealed * num_selected if self.edges is not None else 0
            num_slots = self.num_first + found_by_hops + settings.num_hits * max_queries
        if num_slots < self.num_first:
            raise ConfigError(
                f"num_slots is {num_slots}, less than the {self.num_first} hits that an episode "
                "starts with; raise it, or lower num_first"
            )
        if not 1 <= num_selected <= num_slots:
            raise ConfigError(
                f"num_selected is {num_selected} but a pool has {num_slots} slots; choose a "
                f"number from 1 to {num_slots}"
            )
        return Limits(
            num_slots=num_slots,
            num_picks=num_selected,
            num_writers=len(self.writers),
            max_queries=max_queries,
            max_turns=settings.max_turns or num_selected + max_queries,
            auto_stop=settings.auto_stop,
            require_pick=settings.require_pick,
        )

    def _observation_space(self) -> spaces.Dict:
        limits, vector_size = self.limits, self.candidates.vector_size
        num_slots, num_actions = limits.num_slots, limits.num_actions
        parts: dict[str, spaces.Space[Any]] = {
            "slot_features": finite(num_slots, len(SLOT_FEATURES)),
            "filled": spaces.Box(0, 1, (num_slots,), dtype=np.int8),
            "picked": spaces.Box(0, 1, (num_slots,), dtype=np.int8),
            "order": spaces.Box(0, num_slots, (limits.num_picks,), dtype=np.int64),
            "global": finite(len(GLOBAL_FEATURES)),
            "action_mask": spaces.Box(0, 1, (num_actions,), dtype=np.int8),
        }
        if vector_size:
            parts["question_embedding"] = finite(vector_size)
            parts["slot_embeddings"] = finite(num_slots, vector_size)
        return spaces.Dict(parts)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows of the corpus, float32 with D behind the shape of `rows`."""
        table = self.candidates
        return vectors_at(rows, table.passage_vectors_PD, table.brought_vectors_XD)

    def _passage(self, row: int) -> tuple[Passage, str, frozenset[str]]:
        """A passage, its contents and its different words."""
        passage = self.candidates.corpus[row]
        return passage, passage.contents, frozenset(content_words(passage.contents))

    def _opening(self, question_row: int) -> Opening:
        """The pool of a question's first hits and of the passages whose titles it names."""
        table = self.candidates
        question = table.questions[question_row]
        words = sorted(content_words(question.question))[:_MAX_WORDS]
        named_rows = [] if self.edges is None else self._named(question.question)
        first_rows = table.rows_QN[question_row, : self.num_first]
        first = set(first_rows.tolist())
        later_rows = [row for row in named_rows if row not in first]
        room = self.limits.num_slots - len(first_rows)
        rows = np.array([*first_rows, *later_rows[:room]], dtype=np.int64)
        texts = HopTexts(
            question_row=question_row,
            question=question,
            passages=tuple(self.passage(row)[0] for row in rows.tolist()),
            contents=tuple(self.passage(row)[1] for row in rows.tolist()),
            queries=(None,) * self.num_searches,
        )
        opening = Opening(
            texts=texts,
            slots_N=np.full(self.limits.num_slots, EMPTY),
            num_left_out=max(0, len(later_rows) - room),
            words=frozenset(words),
            bits={word: 1 << place for place, word in enumerate(words)},
            named_rows=frozenset(named_rows),
            compares=bool(_COMPARISON_WORDS & set(question.question.lower().split())),
        )
        slots = opening.slots_N[: len(rows)]
        found = self._described([(opening, row) for row in rows.tolist()])
        for name in FOUND.names or ():
            slots[name] = found[name]
        num_first = len(first_rows)
        slots["query"][:num_first] = 0
        slots["rank"][:num_first] = np.arange(1, num_first + 1)
        slots["rank"][num_first:] = np.arange(1, len(rows) - num_first + 1)
        scores = standardised(table.scores_QNC[question_row : question_row + 1, :num_first, 0])[0]
        slots["newest_score"][:num_first] = slots["best_score"][:num_first] = scores
        return opening

    def _named(self, text: str) -> list[int]:
        """Rows of the passages that a text names, each once and in the graph's order."""
        assert self.edges is not None
        rows = np.asarray(self.edges.named_in(text))
        self._check_rows(rows, "the graph's named_in")
        return list(dict.fromkeys(rows.tolist()))

    def _check_rows(self, rows: np.ndarray, who: str) -> None:
        num_passages = len(self.candidates.corpus)
        if rows.size and not (rows.min() >= 0 and rows.max() < num_passages):
            raise EpisodeError(
                f"{who} gave rows from {rows.min()} to {rows.max()}, but the corpus has rows 0 to "
                f"{num_passages - 1}; use a graph of this corpus"
            )

    def _described(self, pairs: Sequence[tuple[Opening, int]]) -> np.ndarray:
        """Passages as they look to questions, of type `FOUND` and shape (X,), without edges."""
        found_X = np.zeros(len(pairs), dtype=FOUND)
        rows_X = np.array([row for _, row in pairs], dtype=np.int64)
        found_X["row"], found_X["kind"] = rows_X, -1
        words = [
            sum(opening.bits[word] for word in self.passage(row)[2] & opening.words)
            for opening, row in pairs
        ]
        found_X["words"] = np.array(words, dtype=np.uint64)
        found_X["named"] = [row in opening.named_rows for opening, row in pairs]
        if self.candidates.vector_size and len(pairs):
            questions = [opening.texts.question_row for opening, _ in pairs]
            vectors_XD = np.asarray(self.candidates.question_vectors_QD[questions], np.float32)
            found_X["similarity"] = np.einsum("xd,xd->x", self.vectors(rows_X), vectors_XD)
        else:
            num_words_X = np.array([max(len(opening.words), 1) for opening, _ in pairs])
            found_X["similarity"] = np.bitwise_count(found_X["words"]) / num_words_X
        return found_X

    def _neighbours(self, question_row: int, row: int) -> np.ndarray:
        """The neighbours of a passage, those that a pick reveals first before the others.

        They stand by the weight of their strongest edge plus their similarity to the question, the
        lower row first among equals. A passage without edges has none, and neither has one that the
        retriever brought, which no graph knows.

        Raises:
            EpisodeError: when the graph gives something else than edges of this corpus.
        """
        assert self.edges is not None
        if row >= len(self.candidates.passage_vectors_PD):
            return np.zeros(0, dtype=FOUND)
        near = self.edges.neighbours(row)
        rows_M, kinds_M = np.asarray(near.rows), np.asarray(near.kinds)
        weights_M = np.asarray(near.weights)
        self._check_rows(rows_M, f"the graph's edges of passage row {row}")
        is_known = not kinds_M.size or (kinds_M.min() >= 0 and kinds_M.max() < len(EDGE_KINDS))
        if not is_known or not np.isfinite(weights_M).all() or (weights_M < 0).any():
            raise EpisodeError(
                f"the graph's edges of passage row {row} have kinds {kinds_M.tolist()} and weights "
                f"{weights_M.tolist()}; kinds go from 0 to {len(EDGE_KINDS) - 1} and weights are "
                "finite and not negative"
            )
        others = (rows_M != row) & self._follows_E[kinds_M]
        rows_U, place_M = np.unique(rows_M[others], return_inverse=True)
        opening = self.opening(question_row)
        found_U = self._described([(opening, other) for other in rows_U.tolist()])
        np.maximum.at(found_U["edges"], (place_M, kinds_M[others]), weights_M[others])
        found_U["kind"] = found_U["edges"].argmax(axis=1)
        strength_U = found_U["edges"].max(axis=1) + found_U["similarity"]
        order_U = np.lexsort((rows_U, -strength_U))
        return found_U[order_U]

    def hits(
        self, question_rows: Sequence[int], queries: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One search for all these queries, equal ones asked once.

        An answer may be shorter than was asked, or empty: rows below 0 and columns that are missing
        are no hits.

        Returns:
            Hits of type `FOUND` and their `standardised` scores, both of shape (P, M).

        Raises:
            RetrievalError: when the retriever gives something else than rows of the corpus.
        """
        assert self.retriever is not None
        different = list(dict.fromkeys(queries))
        answer = self.retriever.search(different, self.settings.num_hits)
        rows_UM, scores_UM = np.asarray(answer.rows_BK), np.asarray(answer.scores_BK)
        if not rows_UM.size:
            rows_UM = scores_UM = np.zeros((len(different), 0), dtype=np.int64)
        fits = rows_UM.ndim == 2 and len(rows_UM) == len(different)
        if not fits or scores_UM.shape != rows_UM.shape:
            raise RetrievalError(
                f"the retriever answered {len(different)} queries with rows of shape "
                f"{rows_UM.shape} and scores of shape {scores_UM.shape}; it must give a line of "
                "each for every query"
            )
        num_passages = len(self.candidates.corpus)
        if answer.brought or (rows_UM >= num_passages).any():
            raise RetrievalError(
                f"the retriever found passages that are not among the {num_passages} of the "
                "corpus; searches of this environment need a retriever over its own corpus"
            )
        is_hit_UM = rows_UM >= 0
        if not np.isfinite(scores_UM[is_hit_UM]).all():
            line = int(np.argwhere(is_hit_UM & ~np.isfinite(scores_UM))[0, 0])
            raise RetrievalError(
                f"the scores of the query {different[line]!r} are not all finite: "
                f"{scores_UM[line].tolist()}"
            )
        # A row that stands twice in a line counts where it stands first.
        again_UMM = (rows_UM[:, :, None] == rows_UM[:, None, :]) & np.tri(
            rows_UM.shape[1], k=-1, dtype=np.bool_
        )
        rows_UM = np.where(again_UMM.any(axis=2), -1, rows_UM)
        line_of = {query: line for line, query in enumerate(different)}
        lines_P = [line_of[query] for query in queries]
        rows_PM = rows_UM[lines_P]
        found_PM = np.full(rows_PM.shape, _NOTHING)
        is_hit_PM = rows_PM >= 0
        openings = [self.opening(row) for row in question_rows]
        owners, _ = np.nonzero(is_hit_PM)
        found_PM[is_hit_PM] = self._described(
            [
                (openings[p], row)
                for p, row in zip(owners.tolist(), rows_PM[is_hit_PM].tolist(), strict=True)
            ]
        )
        return found_PM, standardised(np.where(is_hit_UM, scores_UM, np.nan))[lines_P]

    def observe(
        self, paths: Paths, num_words_B: np.ndarray, compares_B: np.ndarray, mask_BA: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Batched observations but for embeddings, in new arrays."""
        limits = self.limits
        return {
            "slot_features": rules.slot_features(paths, num_words_B, limits.max_turns),
            "filled": rules.filled(paths).astype(np.int8),
            "picked": transitions.picked(paths.picks).astype(np.int8),
            "order": paths.picks.order_BK.copy(),
            "global": rules.global_features(paths, num_words_B, compares_B, limits),
            "action_mask": mask_BA.astype(np.int8),
        }

    def conclude(
        self,
        texts: Sequence[HopTexts],
        paths: Paths,
        rows: Sequence[int],
        valid: Sequence[bool],
        queries: Sequence[Sequence[str]],
    ) -> list[Outcome]:
        """How these episodes ended: one call of the reward for all that ended validly, less costs.

        Args:
            texts: Of the episodes that ended.
            paths: All episodes.
            rows: Which of them ended.
            valid: Whether the last action of each was allowed.
            queries: What each has issued, the question first.
        """
        selections = [paths.picks.selection(row) for row in rows]
        outcomes = conclude(self.reward, self.invalid_reward, texts, selections, valid)
        needs_pick = tuple(writer.needs_pick for writer in self.writers)
        ways = paths_of(self.limits, needs_pick, texts, paths, rows, valid, queries)
        return [
            self._less_costs(outcome, paths, row, way)
            for outcome, row, way in zip(outcomes, rows, ways, strict=True)
        ]

    def _less_costs(self, outcome: Outcome, paths: Paths, row: int, path: HopPath) -> Outcome:
        if not outcome.valid or outcome.error is not None:
            return replace(outcome, path=path)
        settings = self.settings
        counts = {
            "num_picks": float(paths.picks.num_picked_B[row]),
            "num_queries": float(paths.num_queries_B[row]),
            "num_turns": float(paths.num_turns_B[row]),
        }
        cost = (
            settings.pick_cost * counts["num_picks"]
            + settings.query_cost * counts["num_queries"]
            + settings.turn_cost * counts["num_turns"]
        )
        return replace(
            outcome,
            reward=outcome.reward - cost,
            reward_terms={**outcome.reward_terms, **counts},
            path=path,
        )


def standardised(scores_QM: np.ndarray) -> np.ndarray:
    """Scores of each query's hits less their mean, in standard deviations; NaN is no hit's score.

    So the scores of any retriever look alike. Equal scores give zeros.

    Example:
        >>> standardised(np.array([[30.0, 10.0, np.nan]])).tolist()
        [[1.0, -1.0, nan]]
    """
    exact_QM = scores_QM.astype(np.float64)
    counts_Q1 = np.maximum((~np.isnan(exact_QM)).sum(axis=1, keepdims=True), 1)
    apart_QM = exact_QM - np.nansum(exact_QM, axis=1, keepdims=True) / counts_Q1
    spread_Q1 = np.sqrt(np.nansum(apart_QM**2, axis=1, keepdims=True) / counts_Q1)
    return (apart_QM / np.where(spread_Q1 > 0, spread_Q1, 1.0)).astype(np.float32)


def padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Found passages of P episodes, filled up with nothing to the longest: (P, M)."""
    sizes_P = np.array([len(part) for part in parts])
    found_PM = np.full((len(parts), sizes_P.max()), _NOTHING)
    # With its type given NumPy need not find a common one, which takes as long as all the rest.
    flat = np.concatenate(parts, dtype=FOUND)
    found_PM[np.arange(found_PM.shape[1]) < sizes_P[:, None]] = flat
    return found_PM
