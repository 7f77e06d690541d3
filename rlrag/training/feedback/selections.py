"""Reads a service's logged selections as training episodes.

A policy is judged on the candidates that the one which served had, in their order. The log names
them by id; their scores and vectors are computed anew by the configured retriever. What a path
found beyond them follows from its actions, which are played again.

What is left out, and counted: selections that nothing was left to chance in (propensity 1), which
say nothing about any other selection; those with a candidate that the corpus lacks; and those with
another number of candidates or picks than is configured, or of another graph or store than there is
now, so that their actions cannot be played: these are another task.

Rewards outside `algorithm.reward_range` are clipped to it, and counted: inverse propensities
multiply a reward by up to the inverse of its probability, so that a single extreme value would
decide every estimate and gradient. Within the range one selection of Q moves the self-normalised
estimate by at most its share of the weight times the range.

Shape letters: Q logged selections, U different lists of candidates, B those of a chunk,
N candidates, C retriever scores, D vector length, T actions of the longest episode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rlrag.config import RunConfig
from rlrag.data.feedback import LoggedSelection, SelectionEvent, count_selections, read_feedback
from rlrag.environment.rollout import can_replay
from rlrag.errors import DataError
from rlrag.pipeline import Library
from rlrag.records import Question
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answer_match import exact_match

_CHUNK = 256
_MAX_CLIPPED_SHARE = 0.05


@dataclass(frozen=True)
class LoggedPart:
    """Q logged selections; row q of the candidates belongs to selection q.

    `actions_QT` are the picks, and -1 beyond the end of an episode. `propensity_logp_Q` are the
    log-probabilities, in nats, with which they were drawn.
    """

    candidates: CandidateTable
    actions_QT: np.ndarray
    propensity_logp_Q: np.ndarray
    rewards_Q: np.ndarray

    def __len__(self) -> int:
        return len(self.candidates)

    @cached_property
    def questions_Q(self) -> np.ndarray:
        """A number for the question of each selection, equal where its text is."""
        number: dict[str, int] = {}
        texts = [question.question for question in self.candidates.questions]
        return np.array([number.setdefault(text, len(number)) for text in texts])


@dataclass(frozen=True)
class LoggedData:
    """Selections to train on and those held back, by question; what was left out of the log.

    `content_hash` is the SHA-256 of what was kept.
    """

    train: LoggedPart
    held_back: LoggedPart | None
    content_hash: str
    num_certain: int
    num_unknown: int
    num_other_shape: int
    num_clipped: int

    def describe(self) -> str:
        """One line for people."""
        held_back = len(self.held_back) if self.held_back else 0
        return (
            f"{len(self.train):,} logged selections to train on, {held_back:,} held back; left out "
            f"{self.num_certain:,} without exploration, {self.num_unknown:,} with passages that "
            f"the corpus lacks, {self.num_other_shape:,} of another shape"
            + (f"; {self.num_clipped:,} rewards clipped" if self.num_clipped else "")
        )


def reward_of(record: LoggedSelection) -> float:
    """The reward as it was given, or whether the answer is right: exact match, 1 or 0."""
    if record.golden_answers is not None:
        return exact_match(record.event.answer, record.golden_answers)
    assert record.reward is not None  # one or the other is always given
    return record.reward


def open_logged_data(config: RunConfig, library: Library, path: Path) -> LoggedData:
    """Read a log, describe its candidates and hold back part of its questions.

    The held-back questions are the same for every `seed`. Where `algorithm.held_back_share` is 0
    there are none.

    Raises:
        DataError: when the log is no such file, or too little of it is left to train on.
    """
    settings = config.feedback
    assert settings is not None
    records = read_feedback(path)
    if not records:
        raise DataError(
            f"{path} has {count_selections(path):,} selections, but no feedback on any of them; "
            "collect feedback first"
        )
    drawn = [record for record in records if record.event.propensity_logp < 0]
    if not drawn:
        raise DataError(
            f"all {len(records):,} selections of {path} have propensity 1: they were not "
            "sampled, so they contain no information about other selections; serve with "
            "feedback.explore_share above 0"
        )
    shape = (config.retrieval.num_candidates, config.environment.num_selected)
    by_shape = [r for r in drawn if _fits(r.event, shape, config)]
    found = [
        record
        for record in by_shape
        if all(library.corpus.row_of(id_) is not None for id_ in record.event.candidate_ids)
    ]
    known = _playable(found, config, library)
    num_unknown = len(by_shape) - len(found)
    num_other_shape = len(drawn) - len(by_shape) + len(found) - len(known)
    counts = (len(records) - len(drawn), num_unknown, num_other_shape)
    if not known:
        raise DataError(_nothing_left(path, drawn, shape, *counts))
    num_clipped = _num_outside(known, settings.reward_range, path)
    train, held_back = _split(known, settings.held_back_share)
    if len(train) < config.training.batch_size:
        raise DataError(
            f"{path} leaves {len(train)} selections to train on, fewer than training.batch_size "
            f"{config.training.batch_size}; lower it or algorithm.held_back_share, or log more"
        )
    return LoggedData(
        _part(train, library, settings.reward_range),
        _part(held_back, library, settings.reward_range) if held_back else None,
        _content_hash(known),
        *counts,
        num_clipped,
    )


def _num_outside(
    records: Sequence[LoggedSelection], reward_range: tuple[float, float], path: Path
) -> int:
    """How many rewards will be clipped; refuses a log on another scale."""
    rewards_Q = np.array([reward_of(record) for record in records])
    low, high = reward_range
    num_outside = int(((rewards_Q < low) | (rewards_Q > high)).sum())
    if num_outside > _MAX_CLIPPED_SHARE * len(records):
        raise DataError(
            f"{num_outside:,} of the {len(records):,} rewards of {path} are outside "
            f"algorithm.reward_range {low:g} to {high:g}, and range from {rewards_Q.min():g} "
            f"to {rewards_Q.max():g}; set it to the scale of the feedback"
        )
    return num_outside


def _nothing_left(
    path: Path,
    drawn: Sequence[LoggedSelection],
    shape: tuple[int, int],
    num_certain: int,
    num_unknown: int,
    num_other_shape: int,
) -> str:
    first = drawn[0].event
    return (
        f"none of the {num_certain + len(drawn):,} selections of {path} can be trained on: "
        f"{num_certain:,} have propensity 1; {num_other_shape:,} have another shape than "
        f"retrieval.num_candidates {shape[0]} and environment.num_selected {shape[1]} (the first "
        f"has {len(first.candidate_ids)} and {len(first.actions)}); {num_unknown:,} name a "
        "passage that the corpus lacks; give the corpus and the numbers that were served"
    )


def _split(
    records: Sequence[LoggedSelection], share: float
) -> tuple[list[LoggedSelection], list[LoggedSelection]]:
    """By question text, so that no question stands on both sides."""
    texts = sorted({r.event.question for r in records}, key=lambda text: _digest(["split", text]))
    num_held_back = round(share * len(texts))
    if share and not 0 < num_held_back < len(texts):
        raise DataError(
            f"the log has {len(texts)} different questions, of which algorithm.held_back_share "
            f"{share} holds out {num_held_back}; log more selections, or set it to 0"
        )
    chosen = set(texts[:num_held_back])
    return (
        [record for record in records if record.event.question not in chosen],
        [record for record in records if record.event.question in chosen],
    )


def _part(
    records: Sequence[LoggedSelection], library: Library, reward_range: tuple[float, float]
) -> LoggedPart:
    """Equal questions with equal candidates are described once."""
    lists = [(record.event.question, record.event.candidate_ids) for record in records]
    number = {key: place for place, key in enumerate(dict.fromkeys(lists))}
    texts = [text for text, _ in number]
    rows_UN = np.array(
        [[library.corpus.row_of(id_) for id_ in ids] for _, ids in number], dtype=np.int64
    )
    scores_UNC, question_vectors_UD = _describe(texts, rows_UN, library.retrievers)
    places_Q = np.array([number[key] for key in lists])
    table = CandidateTable(
        questions=tuple(Question(r.event.request_id, r.event.question, ()) for r in records),
        corpus=library.corpus,
        rows_QN=rows_UN[places_Q],
        scores_QNC=scores_UNC[places_Q],
        score_names=library.retrievers.score_names,
        question_vectors_QD=question_vectors_UD[places_Q],
        passage_vectors_PD=library.retrievers.passage_vectors,
    )
    return LoggedPart(
        candidates=library.with_sources(table),
        actions_QT=_padded([record.event.actions for record in records]),
        propensity_logp_Q=np.array([record.event.propensity_logp for record in records]),
        rewards_Q=np.clip([reward_of(record) for record in records], *reward_range),
    )


def _playable(
    records: list[LoggedSelection], config: RunConfig, library: Library
) -> list[LoggedSelection]:
    """Those whose actions the environment allows, where it looks further than the candidates."""
    if not config.environment.looks_further or not records:
        return records
    part = _part(records, library, (-np.inf, np.inf))
    rows = np.arange(len(records))
    fits_Q = can_replay(config.environment, part.candidates, rows, part.actions_QT)
    return [record for record, fits in zip(records, fits_Q, strict=True) if fits]


def _describe(
    texts: Sequence[str], rows_UN: np.ndarray, retrievers: RetrieverSet
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (U, N, C) and question vectors (U, D), as for candidates that were just retrieved."""
    others = [retrievers.components[name] for name in retrievers.score_names[1:]]
    scores, vectors = [], []
    for start in range(0, len(texts), _CHUNK):
        chunk, rows_BN = texts[start : start + _CHUNK], rows_UN[start : start + _CHUNK]
        columns = [each.scores(chunk, rows_BN) for each in (retrievers.primary, *others)]
        scores.append(np.stack(columns, axis=-1))
        vectors.append(retrievers.question_vectors(chunk))
    return np.concatenate(scores), np.concatenate(vectors)


def _fits(event: SelectionEvent, shape: tuple[int, int], config: RunConfig) -> bool:
    """Whether a policy for so many candidates and picks could have done the same."""
    num_candidates, num_selected = shape
    if config.environment.looks_further:  # whose actions tell picks from searches when played
        return len(event.candidate_ids) == num_candidates and event.num_selected == num_selected
    may_stop = config.selector.may_stop
    stopped = event.actions[-1] == num_candidates
    num_picks = len(event.actions) - stopped
    right = num_picks < num_selected if stopped else num_picks == num_selected
    return len(event.candidate_ids) == num_candidates and right and may_stop >= stopped


def _padded(actions: Sequence[Sequence[int]]) -> np.ndarray:
    """Actions of episodes as an array, -1 beyond the end of an episode."""
    longest = max(map(len, actions))
    return np.array([[*one, *[-1] * (longest - len(one))] for one in actions], dtype=np.int64)


def _content_hash(records: Iterable[LoggedSelection]) -> str:
    return _digest([repr((astuple(r.event), r.reward, r.golden_answers)) for r in records])


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()
