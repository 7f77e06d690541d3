"""Data classes that pass between the parts of the pipeline, in the order of their use.

Question -> Prompt -> Generation | Score -> RewardResult -> Trajectories. All are frozen. Numbers
are in the units that their names give; log-probabilities are sums in nats.

Shape letters: E episodes, T actions of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from rlrag.errors import RlragError


@dataclass(frozen=True, slots=True)
class Passage:
    r"""One retrievable piece of text.

    Example:
        >>> Passage(id="fr-capital", title="France", text="The capital is Paris.").contents
        'France\nThe capital is Paris.'
    """

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        """Title and text, the form that retrievers index."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its accepted answers; `golden_answers` is empty when it has no answer.

    Example:
        >>> Question(id="q1", question="capital of France?", golden_answers=("Paris",)).gold_ids
        ()
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gold_ids(self) -> tuple[str, ...]:
        """Ids of the passages known to hold the answer, from `metadata["gold_ids"]`."""
        return tuple(self.metadata.get("gold_ids", ()))


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a generator reads: token ids, and the text that they came from for people to read.

    `text` is the whole prompt as the tokenizer saw it; `num_passages` counts the passages shown
    in it, and `num_cut_tokens` the passage tokens that truncation removed. `question` is what it
    asks, empty where nobody says.
    """

    token_ids: tuple[int, ...]
    text: str
    num_passages: int
    num_cut_tokens: int = 0
    question: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `logp` sums the log-probabilities of its tokens under the model, in nats.

    It is None where a server answered that does not give it.
    """

    text: str
    logp: float | None
    num_tokens: int
    num_prompt_tokens: int
    version: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """Teacher-forced log p(answer | prompt).

    `logp` is the sum over the answer's `num_tokens` tokens in nats; `mean_logp` divides by them.

    Example:
        >>> Score(logp=-3.0, num_tokens=2, num_prompt_tokens=40).mean_logp
        -1.5
    """

    logp: float
    num_tokens: int
    num_prompt_tokens: int
    version: int = 0

    @property
    def mean_logp(self) -> float:
        """Mean log-probability per answer token, in nats."""
        return self.logp / self.num_tokens


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The reward of one selection: `total` is what is trained on, `terms` its parts unweighted.

    `answer` is the generator's text where one was asked for. Terms with weight zero are recorded
    and do not count in `total`. `golden_logps` are the log-likelihoods of the distinct golden
    answers in nats, in their order, where `reward.golden_answers` counts them all.
    """

    total: float
    terms: Mapping[str, float]
    answer: str | None = None
    answer_logp: float | None = None
    golden_logps: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A passage that a turn of an episode brought into its pool.

    `by` is what found it: a `query`, a `hop` from the passage in slot `source` along an edge of the
    kind `edge`, or a `title` that the question names.
    """

    slot: int
    passage_id: str
    by: Literal["query", "hop", "title"]
    source: int | None = None
    edge: str | None = None


@dataclass(frozen=True, slots=True)
class PathTurn:
    """What an episode did in one turn, and what that found.

    `start` is the question's own hits, `invalid` an action that was not allowed. A pick has the
    `slot` of its passage; a search the `query`, the number of its `writer` and the slot of the pick
    that it was written on, where it was. `num_left_out` counts what was found and had no room.
    """

    action: Literal["start", "pick", "search", "stop", "invalid"]
    slot: int | None = None
    passage_id: str | None = None
    query: str | None = None
    writer: int | None = None
    found: tuple[FoundPassage, ...] = ()
    num_left_out: int = 0


class EpisodePath(Protocol):
    """What an episode that looked further did, turn by turn."""

    def turns(self) -> tuple[PathTurn, ...]:
        """Its start, and every action with what it found."""
        ...


Columns = Mapping[str, np.ndarray]
"""Arrays by name, one row an episode."""


@dataclass(frozen=True)
class Trajectories:
    """E episodes of any length: what the policy saw, what it did and what it got.

    `observations[t]` and `infos[t]` are what it saw before action t, a row an episode, where that
    is kept; a row means nothing from the end of its episode on. `actions_ET` is -1 there. `logp_ET`
    are the actions' log-probabilities under the policy, and `log_weights_E` the logarithms of
    sample weights that correct for how they were drawn (`rlrag.selection.protocol.Draws`).

    `rewards_E` sum an episode's rewards, NaN where one could not be computed, for the reason in
    `errors`. `evidence` are the passages that an episode ended with, in order; `answers` what the
    environment said was answered from them, None where nothing was, and `golden_logps` the
    log-likelihoods of the distinct golden answers, where the reward counts them all. `terms` are
    the parts of the reward before weighting, NaN for episodes that have no such part. `paths` tell
    how an episode came to its evidence, None where its environment does not.
    """

    question_rows_E: np.ndarray
    observations: tuple[Columns, ...]
    infos: tuple[Columns, ...]
    actions_ET: np.ndarray
    logp_ET: np.ndarray
    log_weights_E: np.ndarray
    rewards_E: np.ndarray
    terms: Columns
    evidence: tuple[tuple[Passage, ...], ...]
    answers: tuple[str | None, ...]
    golden_logps: tuple[tuple[float, ...] | None, ...]
    errors: tuple[RlragError | None, ...]
    paths: tuple[EpisodePath | None, ...]

    def __len__(self) -> int:
        return len(self.actions_ET)

    @property
    def acts_ET(self) -> np.ndarray:
        """Where an episode has an action: bool (E, T)."""
        return self.actions_ET >= 0

    @property
    def logp_E(self) -> np.ndarray:
        """Log-probability of each whole episode under the policy that acted, in nats."""
        return self.logp_ET.sum(axis=1)

    def of(self, episodes: Sequence[int] | np.ndarray | slice) -> Trajectories:
        """Some of the episodes, in this order."""
        rows = np.arange(len(self))[episodes]
        return Trajectories(
            question_rows_E=self.question_rows_E[rows],
            observations=tuple(_rows(columns, rows) for columns in self.observations),
            infos=tuple(_rows(columns, rows) for columns in self.infos),
            actions_ET=self.actions_ET[rows],
            logp_ET=self.logp_ET[rows],
            log_weights_E=self.log_weights_E[rows],
            rewards_E=self.rewards_E[rows],
            terms=_rows(self.terms, rows),
            evidence=tuple(self.evidence[row] for row in rows),
            answers=tuple(self.answers[row] for row in rows),
            golden_logps=tuple(self.golden_logps[row] for row in rows),
            errors=tuple(self.errors[row] for row in rows),
            paths=tuple(self.paths[row] for row in rows),
        )


def joined(parts: Sequence[Trajectories]) -> Trajectories:
    """The episodes of several batches together, without what was seen in them.

    Terms that a batch has not are NaN in its rows.
    """
    longest = max(part.actions_ET.shape[1] for part in parts)
    names = dict.fromkeys(name for part in parts for name in part.terms)

    def padded(values_ET: np.ndarray, filler: float) -> np.ndarray:
        missing = longest - values_ET.shape[1]
        return np.pad(values_ET, ((0, 0), (0, missing)), constant_values=filler)

    def column(name: str) -> np.ndarray:
        return np.concatenate([p.terms.get(name, np.full(len(p), np.nan)) for p in parts])

    return Trajectories(
        question_rows_E=np.concatenate([part.question_rows_E for part in parts]),
        observations=(),
        infos=(),
        actions_ET=np.concatenate([padded(part.actions_ET, -1) for part in parts]),
        logp_ET=np.concatenate([padded(part.logp_ET, 0) for part in parts]),
        log_weights_E=np.concatenate([part.log_weights_E for part in parts]),
        rewards_E=np.concatenate([part.rewards_E for part in parts]),
        terms={name: column(name) for name in names},
        evidence=tuple(evidence for part in parts for evidence in part.evidence),
        answers=tuple(answer for part in parts for answer in part.answers),
        golden_logps=tuple(logps for part in parts for logps in part.golden_logps),
        errors=tuple(error for part in parts for error in part.errors),
        paths=tuple(path for part in parts for path in part.paths),
    )


def _rows(columns: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {
        # Vector environments nest the terms of a reward.
        name: _rows(array, rows) if isinstance(array, Mapping) else array[rows]
        for name, array in columns.items()
    }
