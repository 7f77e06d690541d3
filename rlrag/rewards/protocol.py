"""The reward protocol: one result for each pair of a question and ordered passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlrag.errors import RlragError
from rlrag.records import Passage, Question, RewardResult


class SelectionReward(Protocol):
    """Scores ordered selections, a whole batch in one call."""

    def __call__(
        self, questions: Sequence[Question], selections: Sequence[Sequence[Passage]]
    ) -> list[RewardResult | RlragError]:
        """Reward each pair.

        `selections[i]` are the passages picked for `questions[i]`, best first; it may be empty.
        Element i of the result is the reward, or the error that names why it could not be
        computed: a failed rollout is reported, never given a made-up number.
        """
        ...
