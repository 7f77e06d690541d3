"""Observation spaces, observations and final results of selection episodes.

What the scalar and the vector environment share. Shape letters: B episodes, N candidates,
K selected, C retriever scores, D vector length.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from rlrag.environment import transitions
from rlrag.environment.sample_task import sample_candidates
from rlrag.environment.transitions import Episodes
from rlrag.errors import ConfigError, DataError, RewardError, RlragError
from rlrag.records import Passage, Question, RewardResult
from rlrag.retrieval.candidates import CandidateTable
from rlrag.rewards.answering import PassageReward
from rlrag.rewards.protocol import SelectionReward

DEFAULT_NUM_SELECTED = 3
DEFAULT_INVALID_REWARD = -1.0
DEFAULT_COST_PER_PASSAGE = 0.1

# The spaces promise finite numbers and nothing tighter: the range of scores and vectors differs
# between retrievers, and an agent must be able to move to another table with its spaces unchanged.
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class EpisodeTexts:
    """The texts of one episode: its question and candidates, which stay as they are."""

    question_row: int
    question: Question
    passages: tuple[Passage, ...]
    contents: tuple[str, ...]

    def info(self) -> dict[str, Any]:
        """The entries of `info` that every step of the episode carries."""
        return {
            "question_id": self.question.id,
            "question": self.question.question,
            "passages": self.contents,
            "golden_answers": self.question.golden_answers,
            "question_row": self.question_row,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one episode ended; `error` says why a reward could not be computed.

    `path` is what the environment tells about the way there, where it tells anything.
    """

    reward: float
    evidence: tuple[Passage, ...]
    valid: bool
    answer: str | None
    reward_terms: Mapping[str, float]
    error: RlragError | None = None
    golden_logps: tuple[float, ...] | None = None
    path: Any = None

    def info(self) -> dict[str, Any]:
        """The entries of `info` that the last step adds."""
        info: dict[str, Any] = {
            "answer": self.answer,
            "reward_terms": dict(self.reward_terms),
            "evidence": self.evidence,
            "selection": tuple(passage.id for passage in self.evidence),
            "valid": self.valid,
        }
        if self.error is not None:
            info["error"] = self.error
        if self.golden_logps is not None:
            info["golden_logps"] = self.golden_logps
        if self.path is not None:
            info["path"] = self.path
        return info


class SelectionTask:
    """The data, the reward and the limits of selection episodes, checked once."""

    def __init__(
        self,
        candidates: CandidateTable | None,
        reward: SelectionReward | None,
        num_selected: int,
        invalid_reward: float,
    ) -> None:
        self.candidates = sample_candidates() if candidates is None else candidates
        self.reward = (
            PassageReward(cost_per_passage=DEFAULT_COST_PER_PASSAGE) if reward is None else reward
        )
        self.num_selected = num_selected
        self.invalid_reward = float(invalid_reward)
        self._check()
        self.action_space = spaces.Discrete(self.candidates.num_candidates + 1)
        self.observation_space = _observation_space(self.candidates, num_selected)

    def _check(self) -> None:
        num_candidates = self.candidates.num_candidates
        check_task(self.candidates, self.invalid_reward)
        if not 1 <= self.num_selected <= num_candidates:
            raise ConfigError(
                f"num_selected is {self.num_selected} but a question has {num_candidates} "
                f"candidates; choose a number from 1 to {num_candidates}"
            )

    def start(self, num_episodes: int) -> Episodes:
        """Fresh episodes."""
        return transitions.start(num_episodes, self.candidates.num_candidates, self.num_selected)

    def texts(self, question_row: int) -> EpisodeTexts:
        """Question and candidates of one row of the table."""
        passages = self.candidates.passages(question_row)
        return EpisodeTexts(
            question_row=question_row,
            question=self.candidates.questions[question_row],
            passages=passages,
            contents=tuple(passage.contents for passage in passages),
        )

    def features(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        """The part of the observations that stays the same during an episode, in new arrays."""
        table = self.candidates
        features = {"retriever_scores": np.asarray(table.scores_QNC[rows_B], dtype=np.float32)}
        if table.vector_size:
            features["question_embedding"] = np.asarray(
                table.question_vectors_QD[rows_B], dtype=np.float32
            )
            features["candidate_embeddings"] = table.passage_vectors(rows_B)
        return features

    def observe(
        self, features: Mapping[str, np.ndarray], episodes: Episodes
    ) -> dict[str, np.ndarray]:
        """Batched observations, in new arrays."""
        return {name: array.copy() for name, array in features.items()} | {
            "picked": transitions.picked(episodes).astype(np.int8),
            "order": episodes.order_BK.copy(),
            "action_mask": transitions.action_masks(episodes).astype(np.int8),
        }

    def conclude(
        self,
        texts: Sequence[EpisodeTexts],
        selections: Sequence[tuple[int, ...]],
        valid: Sequence[bool],
    ) -> list[Outcome]:
        """How these episodes ended; see the function `conclude`."""
        return conclude(self.reward, self.invalid_reward, texts, selections, valid)


def check_task(candidates: CandidateTable, invalid_reward: float) -> None:
    """Refuse a table and a reward of invalid actions that no episode can be played with.

    Raises:
        DataError: for a table without questions, or with scores that are not finite.
        ConfigError: for a reward that is not finite.
    """
    if len(candidates) == 0:
        raise DataError("the candidate table has no questions; give it at least one")
    if not math.isfinite(invalid_reward):
        raise ConfigError(f"invalid_reward is {invalid_reward}; give a finite number")
    if not np.isfinite(candidates.scores_QNC).all():
        row = int(np.argwhere(~np.isfinite(candidates.scores_QNC))[0, 0])
        raise DataError(
            f"the retriever scores of question {candidates.questions[row].id!r} are not "
            "all finite; compute its candidates again"
        )


def conclude(
    reward: SelectionReward,
    invalid_reward: float,
    texts: Sequence[EpisodeTexts],
    selections: Sequence[tuple[int, ...]],
    valid: Sequence[bool],
) -> list[Outcome]:
    """How these episodes ended: one call of the reward for all that ended validly, in order.

    Raises:
        RewardError: when the reward does not give one result for each question, or something
            that is none.
    """
    picked = [
        tuple(text.passages[position] for position in selection)
        for text, selection in zip(texts, selections, strict=True)
    ]
    asked = [index for index, is_valid in enumerate(valid) if is_valid]
    questions = [texts[index].question for index in asked]
    results = reward(questions, [picked[index] for index in asked]) if asked else []
    if len(results) != len(asked):
        raise RewardError(
            f"the reward {reward!r} gave {len(results)} results for {len(asked)} "
            "questions; it must return one result per question, in the same order"
        )
    result_of = dict(zip(asked, results, strict=True))
    outcomes = []
    for index, text in enumerate(texts):
        evidence = picked[index]
        result = result_of.get(index)
        if not valid[index]:
            outcome = Outcome(invalid_reward, evidence, False, None, {})
        elif isinstance(result, RlragError):
            outcome = Outcome(math.nan, evidence, True, None, {}, error=result)
        elif not isinstance(result, RewardResult):
            raise RewardError(
                f"the reward {reward!r} gave {reprlib.repr(result)} for question "
                f"{text.question.id!r}; it must return a RewardResult, or the RlragError that "
                "says why there is none"
            )
        elif not math.isfinite(result.total):
            error = RewardError(
                f"the reward of question {text.question.id!r} is {result.total}; "
                "a reward must be a finite number"
            )
            outcome = Outcome(math.nan, evidence, True, result.answer, {}, error=error)
        else:
            terms = {name: float(value) for name, value in result.terms.items()}
            outcome = Outcome(
                float(result.total),
                evidence,
                True,
                result.answer,
                terms,
                golden_logps=result.golden_logps,
            )
        outcomes.append(outcome)
    return outcomes


def check_options(options: Mapping[str, Any] | None, known: tuple[str, ...]) -> dict[str, Any]:
    """The options of a reset as a new dict.

    Raises:
        ConfigError: for an option that is not `known`, with the nearest one that is.
    """
    chosen = dict(options or {})
    for name in chosen:
        if name not in known:
            nearest = (difflib.get_close_matches(str(name), known, n=1) or known)[0]
            raise ConfigError(f"unknown reset option {name!r}; did you mean {nearest!r}?")
    return chosen


def finite(*shape: int) -> spaces.Box:
    """The space of float32 arrays of finite numbers."""
    return spaces.Box(-_LARGEST, _LARGEST, shape, dtype=np.float32)


def _observation_space(candidates: CandidateTable, num_selected: int) -> spaces.Dict:
    num_candidates, vector_size = candidates.num_candidates, candidates.vector_size
    num_scores = candidates.scores_QNC.shape[2]
    parts: dict[str, spaces.Space[Any]] = {
        "retriever_scores": finite(num_candidates, num_scores),
        "picked": spaces.Box(0, 1, (num_candidates,), dtype=np.int8),
        "order": spaces.Box(0, num_candidates, (num_selected,), dtype=np.int64),
        "action_mask": spaces.Box(0, 1, (num_candidates + 1,), dtype=np.int8),
    }
    if vector_size:
        parts["question_embedding"] = finite(vector_size)
        parts["candidate_embeddings"] = finite(num_candidates, vector_size)
    return spaces.Dict(parts)
