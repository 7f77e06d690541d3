"""Validates a request and resolves the settings for its answer."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from rlrag.errors import RequestError
from rlrag.serving.records import Decoding, Filters
from rlrag.serving.settings import LimitSettings

_MAX_SEED = 2**31
_NO_FILTERS = Filters()
_AS_BUNDLE_SAYS = Decoding()


@dataclass(frozen=True, slots=True)
class Ask:
    """One question with everything that decides its answer.

    `version` is what the client asked for. `assigned` is the version that a request of several
    questions holds for all of them. `deadline` is a moment of the event loop's clock.
    """

    question: str
    deadline: float
    num_selected: int | None = None
    num_candidates: int | None = None
    filters: Filters = _NO_FILTERS
    decoding: Decoding = _AS_BUNDLE_SAYS
    version: str | None = None
    assigned: str | None = None

    @property
    def repeats(self) -> bool:
        """Whether equal asks get equal answers: decoding is greedy, or as the bundle says."""
        return not self.decoding.temperature


def decoding_of(
    max_new_tokens: int | None, temperature: float | None, seed: int | None
) -> Decoding:
    """How an answer is decoded; a sampled one takes a random seed where none is given.

    Example:
        >>> decoding_of(None, 0.0, None)
        Decoding(max_new_tokens=None, temperature=0.0, seed=0, streamed=False)
    """
    if seed is None:
        seed = secrets.randbelow(_MAX_SEED) if temperature else 0
    return Decoding(max_new_tokens, temperature, seed)


def holds_words(question: str) -> bool:
    """Whether there is anything to look up: a letter or a digit.

    Example:
        >>> holds_words("où?"), holds_words(" ?! ")
        (True, False)
    """
    return any(character.isalnum() for character in question)


def check_ask(ask: Ask, limits: LimitSettings) -> None:
    """Check a question against what depends on the settings.

    Raises:
        RequestError: naming the field and the bound.
    """
    if not holds_words(ask.question):
        raise RequestError.about(
            "question", "has no letter and no digit, so there is nothing to look up"
        )
    check_length(ask.question, limits)
    check_numbers(ask, limits)


def check_length(question: str, limits: LimitSettings) -> None:
    """Check a question's length.

    Raises:
        RequestError: naming the bound.
    """
    if len(question) > limits.max_question_chars:
        raise RequestError.about(
            "question",
            f"has {len(question)} characters, more than the {limits.max_question_chars} that the "
            "service takes",
        )


def check_numbers(ask: Ask, limits: LimitSettings) -> None:
    """Check the numbers of a request.

    Raises:
        RequestError: naming the field and the bound.
    """
    bounds = {
        "num_selected": (ask.num_selected, limits.max_candidates),
        "num_candidates": (ask.num_candidates, limits.max_candidates),
        "max_new_tokens": (ask.decoding.max_new_tokens, limits.max_new_tokens),
    }
    for name, (value, bound) in bounds.items():
        if value is not None and value > bound:
            raise RequestError.about(
                name, f"is {value}, more than the {bound} that the service allows"
            )
