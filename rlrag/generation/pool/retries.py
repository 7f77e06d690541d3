"""Retries of chunks that actors lost: sent again, split, or given up.

    lost once    the chunk is sent again as it was: most actors die of something else
    lost twice   its prompts are sent one by one
    alone        a prompt that is lost twice is given up, and refused from then on
    a question   of which two prompts were given up is refused in every other prompt too

An answer that does not come in time and an engine that raises count as two losses at once: both
would most likely happen again. Where actors answer nothing at all, the fault is not a prompt's:
after some losses without an answer between them the call fails.

With several clients, a chunk that waits behind another client's prompt is lost with it; in the
worst case its prompts are given up too.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

from rlrag.errors import GenerationError
from rlrag.records import Prompt

logger = logging.getLogger(__name__)

DIED, HUNG, RAISED = 1, 2, 2
"""How many losses each kind counts for."""

_MAX_LOSSES = 2
_MAX_PROMPTS = 2
_MAX_IN_A_ROW = 8
"""For each actor, as each may lose a prompt of the same question at the same time."""


@dataclass(slots=True)
class Chunk:
    """The places of some prompts in a call, and how often they were lost together.

    `is_doubled` says that two actors may be asked for it; it is lost when both lost it.
    """

    places: list[int]
    losses: int = 0
    is_doubled: bool = False


class Losses:
    """What one client remembers of prompts that actors did not survive."""

    def __init__(self) -> None:
        self._given_up: dict[tuple[int, ...], GenerationError] = {}
        self._of_question: Counter[str] = Counter()
        self._in_a_row = 0

    def refusal(self, prompt: Prompt) -> GenerationError | None:
        """Why a prompt is not asked any more."""
        if prompt.question and self._of_question[prompt.question] >= _MAX_PROMPTS:
            return self._given_up.get(prompt.token_ids) or GenerationError(
                f"not asked, since {_MAX_PROMPTS} other prompts of the question "
                f"{prompt.question[:80]!r} were lost with every actor that was asked for them"
            )
        return self._given_up.get(prompt.token_ids)

    def answered(self) -> None:
        """Some actor answered: the pool works."""
        self._in_a_row = 0

    def lost(
        self,
        chunk: Chunk,
        count: int,
        error: GenerationError,
        prompts: list[Prompt],
        num_actors: int = 1,
    ) -> list[Chunk]:
        """What to send in place of a lost chunk; nothing when its one prompt is given up.

        Args:
            chunk: What was lost.
            count: `DIED`, `HUNG` or `RAISED`.
            error: Says who lost it and how.
            prompts: The prompts of the chunk.
            num_actors: How many there are to lose chunks.

        Raises:
            GenerationError: after too many losses with no answer between them; of the class of
                `error`.
        """
        self._in_a_row += count
        chunk.losses += count
        if self._in_a_row >= _MAX_IN_A_ROW * num_actors:
            self._fail(error)
        if chunk.losses < _MAX_LOSSES:
            logger.warning("%s; its chunk is sent again", error)
            return [chunk]
        if len(prompts) > 1:
            logger.warning("%s; its prompts are sent one by one", error)
            return [Chunk([place]) for place in chunk.places]
        logger.warning("%s; this prompt is not asked again", error)
        self._given_up[prompts[0].token_ids] = error
        self._of_question[prompts[0].question] += 1
        return []

    def _fail(self, error: GenerationError) -> NoReturn:
        self._in_a_row = 0
        raise type(error)(
            f"{error}; several chunks in a row were lost, so the engines, not a prompt, are at "
            "fault: read Ray's logs of the actors; if memory ran out, lower generator.batch_size "
            "or prompt.max_prompt_tokens"
        ) from error
