"""Data classes that pass between the parts of the service.

Routing -> Retrieved -> Picked -> AnswerPiece. All are frozen.

Shape letters: N candidates, C retriever scores, D vector length, K selected.
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlrag.records import Passage, PathTurn


@dataclass(frozen=True, slots=True)
class Routing:
    """Which bundle versions answer.

    A version is the start of the hash of a bundle's manifest. The canary answers `canary_share` of
    the requests in place of the active version; the shadow answers all of them a second time, to
    be compared and never shown. `epoch` counts the changes.
    """

    active: str
    canary: str | None = None
    canary_share: float = 0.0
    shadow: str | None = None
    epoch: int = 0

    @property
    def versions(self) -> frozenset[str]:
        """All versions in use."""
        return frozenset(v for v in (self.active, self.canary, self.shadow) if v is not None)

    def version_of(self, request_id: str) -> str:
        """The version that answers a request; equal ids get the same one.

        Example:
            >>> Routing("a1", canary="b2", canary_share=1.0).version_of("request-7")
            'b2'
        """
        place = zlib.crc32(request_id.encode()) / 2**32
        return self.canary if self.canary and place < self.canary_share else self.active


@dataclass(frozen=True, slots=True)
class Filters:
    """Which passages may be candidates. An empty field excludes nothing."""

    ids: tuple[str, ...] = ()
    """Only these passages."""
    exclude_ids: tuple[str, ...] = ()
    """None of these passages."""
    title_contains: str = ""
    """Only passages whose title contains this text; case does not matter."""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The candidates of one question, in the retriever's order.

    `scores_NC` has the ranking score in its first column; both vector arrays have length 0 along D
    where the bundle's retrieval has no encoder. `filtered` says that filters chose among what was
    found.
    """

    passages: tuple[Passage, ...]
    scores_NC: np.ndarray
    question_vector_D: np.ndarray
    passage_vectors_ND: np.ndarray
    filtered: bool = False


@dataclass(frozen=True, slots=True)
class PickedPath:
    """How an episode that looked further came to its pick.

    `turns` is empty where the environment does not tell them; `writers` names the query writers
    that they number. `action_logps` has the log-probability, in nats, with which each action was
    drawn after those before it, exploration included. With `num_selected`, the most picks that were
    allowed, the actions can be played again.
    """

    turns: tuple[PathTurn, ...]
    writers: tuple[str, ...]
    action_logps: tuple[float, ...]
    num_selected: int


@dataclass(frozen=True, slots=True)
class Picked:
    """An ordered pick of passages, the end of an episode.

    `positions` count the candidates and go on in `further`, what an episode that looks further
    found beyond them. `probs` holds for each pick its probability under the policy, given what it
    did before; `actions` are all that the policy did, a stop included. `propensity_logp` is the
    log-probability, in nats, with which this very episode was drawn, exploration included; 0 where
    nothing was left to chance. `path` is None where episodes end with their candidates.
    """

    positions: tuple[int, ...]
    probs: tuple[float, ...]
    actions: tuple[int, ...]
    propensity_logp: float
    explored: bool
    further: tuple[Passage, ...] = ()
    path: PickedPath | None = None

    def passages(self, candidates: tuple[Passage, ...]) -> tuple[Passage, ...]:
        """The picked passages, in order, of these candidates."""
        known = candidates + self.further
        return tuple(known[position] for position in self.positions)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How one answer is decoded; unset fields are those of the bundle.

    `streamed` says whether pieces are wanted as they come, or the answer whole. It does not change
    the answer, so that decodings which differ in it alone are equal.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    streamed: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """What a generator has added to an answer.

    `text` is new since the last piece. `logp` (nats) and `num_tokens` count the answer so far. The
    text of a finished answer is that of all pieces, stripped. `num_passages` are in its prompt,
    which had no room for `num_cut_tokens` of the tokens of the passages given.
    """

    text: str
    logp: float | None
    num_tokens: int
    num_prompt_tokens: int
    num_passages: int
    num_cut_tokens: int
    finished: bool


class ServedPipeline(Protocol):
    """What the HTTP side asks of the parts. Each call names the bundle version that must answer.

    Raises:
        RequestError: the request cannot be answered as asked (a `num_selected` beyond the bundle's,
            filters that leave too few passages).
        PromptTooLongError: the question leaves no room in the prompt.
        OverloadedError: a part is full or restarting; the caller may try again.
        GenerationError: the engine failed.
    """

    async def retrieve(
        self, version: str, question: str, num_candidates: int | None, filters: Filters
    ) -> Retrieved:
        """Candidates of a question; `num_candidates` unset takes the bundle's number."""
        ...

    async def select(
        self,
        version: str,
        question: str,
        retrieved: Retrieved,
        num_selected: int | None,
        explore: bool,
    ) -> Picked:
        """The policy's pick: the most probable one, or with `explore` one drawn from it.

        The caller explores with probability `feedback.explore_share`, independently of all else;
        the propensity counts on it.
        """
        ...

    def generate(
        self, version: str, question: str, passages: tuple[Passage, ...], decoding: Decoding
    ) -> AsyncIterator[AnswerPiece]:
        """The answer as it is decoded, by an asynchronous generator; see `Decoding.streamed`.

        Closing it frees the engine's slot.
        """
        ...


class VersionDesk(Protocol):
    """What the HTTP side asks about bundle versions."""

    def routing(self) -> Routing:
        """The newest known routing; never waits.

        Raises:
            OverloadedError: none is known yet.
        """
        ...

    def missing(self) -> tuple[str, ...]:
        """Parts of which no replica holds the active version yet, or any more."""
        ...

    def bundle_path(self, version: str) -> str:
        """Where a version in use was loaded from."""
        ...

    async def load(self, path: str, role: str, share: float) -> str:
        """Load and check the bundle at `path`, give it a role, and return its version.

        Args:
            path: A bundle directory that the service can read.
            role: `active`, `canary` or `shadow`.
            share: Part of the requests that a canary answers, from 0 to 1.

        Raises:
            CheckpointError: the bundle is damaged, or its golden questions are answered otherwise
                than recorded; what served before goes on serving.
            RequestError: the role or share is impossible, or another bundle is being loaded.
        """
        ...

    async def drop(self, role: str) -> None:
        """End the `canary` or the `shadow`."""
        ...

    async def changed_corpus(self, version: str) -> str | None:
        """The corpus of a version in use, where its files have changed since they were read."""
        ...

    def begin(self, version: str) -> None:
        """A request of this version starts here."""
        ...

    def end(self, version: str) -> None:
        """A request of this version ended here."""
        ...
