"""The values that flow through the pipeline, in the order in which they arise.

Question -> Selection -> Prompt -> Generation | Score -> RewardResult. All are frozen. Numbers are
in the units that their names give; log-probabilities are sums in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """One answer. `logp` sums the log-probabilities of its tokens under the model, in nats."""

    text: str
    logp: float
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
class Selection:
    """An ordered pick of passages: `positions` index the question's candidates, best first.

    Example:
        >>> Selection(question_id="q1", positions=(2, 0), passage_ids=("p9", "p4")).positions
        (2, 0)
    """

    question_id: str
    positions: tuple[int, ...]
    passage_ids: tuple[str, ...]


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
