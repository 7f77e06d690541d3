"""One episode in, the text that `render_mode="ansi"` shows out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlrag.environment.task import EpisodeTexts, Outcome
from rlrag.errors import ConfigError


def render_episode(
    texts: EpisodeTexts,
    selection: tuple[int, ...],
    num_selected: int,
    outcome: Outcome | None,
) -> str:
    """Question, picks with their titles, answer where there is one, and reward.

    Args:
        texts: the episode's question and candidates.
        selection: candidate positions picked so far, best first.
        num_selected: the most that may be picked (K).
        outcome: how the episode ended, or None while it runs.
    """
    question = texts.question
    lines = [
        f"Question {question.id}: {question.question}",
        f"Picked {len(selection)} of at most {num_selected}:",
    ]
    for place, position in enumerate(selection, start=1):
        passage = texts.passages[position]
        lines.append(f"  {place}. {passage.title or passage.id} (candidate {position})")
    if outcome is None:
        return "\n".join([*lines, "Still picking."]) + "\n"
    if not outcome.valid:
        lines.append("Ended by a candidate that was already picked.")
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
