"""Draws an episode as text (`render_mode="ansi"`) or as a picture (`"rgb_array"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlrag.environment.task import EpisodeTexts, Outcome
from rlrag.errors import ConfigError

RENDER_MODES = ("ansi", "rgb_array")

_CELL_PIXELS = 16
_LINE, _FREE, _PICKED, _INVALID = (255, 255, 255), (205, 205, 205), (40, 90, 200), (210, 50, 40)


def draw_episode(
    selection: tuple[int, ...], num_candidates: int, num_selected: int, outcome: Outcome | None
) -> np.ndarray:
    """A grid with a row for each place of the selection and a column for each candidate.

    The candidate at a place is blue, or all of them red after an episode that a candidate ended
    which was already picked. Texts are left to `render_episode`.

    Returns:
        Colours, uint8 [16 K + 1, 16 N + 1, 3], of N candidates and at most K picks.
    """
    colours = np.full((num_selected, num_candidates, 3), _FREE, dtype=np.uint8)
    is_valid = outcome is None or outcome.valid
    for place, position in enumerate(selection):
        colours[place, position] = _PICKED if is_valid else _INVALID
    picture = np.pad(
        colours.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1), ((0, 1), (0, 1), (0, 0))
    )
    picture[::_CELL_PIXELS] = _LINE
    picture[:, ::_CELL_PIXELS] = _LINE
    return picture


def render_episode(
    texts: EpisodeTexts,
    selection: tuple[int, ...],
    num_selected: int,
    outcome: Outcome | None,
    queries: Sequence[str] | None = None,
) -> str:
    """Question, picks with their titles, answer where there is one, and reward.

    Args:
        texts: the episode's question and candidates.
        selection: candidate positions picked so far, best first.
        num_selected: the most that may be picked (K).
        outcome: how the episode ended, or None while it runs.
        queries: what was searched for, where an episode can search.
    """
    question = texts.question
    lines = [
        f"Question {question.id}: {question.question}",
        f"Picked {len(selection)} of at most {num_selected}:",
    ]
    for place, position in enumerate(selection, start=1):
        passage = texts.passages[position]
        lines.append(f"  {place}. {passage.title or passage.id} (candidate {position})")
    lines += [f"Searched for: {query}" for query in queries or ()]
    if outcome is None:
        return "\n".join([*lines, "Still picking."]) + "\n"
    if not outcome.valid:
        reason = "a candidate that was already picked" if queries is None else "an invalid action"
        lines.append(f"Ended by {reason}.")
    if outcome.answer is not None:
        lines.append(f"Answer: {outcome.answer}")
    if outcome.error is not None:
        lines.append(f"Reward: not computed: {outcome.error}")
        return "\n".join(lines) + "\n"
    terms = ", ".join(f"{name} {value:.3f}" for name, value in outcome.reward_terms.items())
    lines.append(f"Reward: {outcome.reward:.3f}" + (f" ({terms})" if terms else ""))
    return "\n".join(lines) + "\n"


def check_render_mode(render_mode: str | None, metadata: Mapping[str, Any]) -> None:
    """Refuse a render mode that the environment does not have.

    Raises:
        ConfigError: naming those that it has.
    """
    if render_mode is not None and render_mode not in metadata["render_modes"]:
        raise ConfigError(
            f"render_mode is {render_mode!r}; choose None or one of {metadata['render_modes']}"
        )
