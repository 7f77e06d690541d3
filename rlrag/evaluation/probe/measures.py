"""Measures how a system's answers change when its passages are changed.

The measures, by name: `mirage`, `position`, `distractors`, `duplicates` and `contradictions` change
what stands around a question's gold passages; `order` shuffles the picked passages; `attribution`,
`abstention`, `calibration` and `cost` look at the answers from the passages as they were picked.
Places of passages are in the order picked; `generator.prompt.passage_order` may show them reversed.
An answer is right if it contains a golden answer (`answer_contained`, the accuracy of the
evaluation table), except in `mirage`, which has a label of its own.

Shape letters: Q questions, K selected, S settings of a context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from rlrag.errors import ConfigError, DataError, RlragError
from rlrag.evaluation.picked import Picked, seconds_per_question
from rlrag.evaluation.probe.attribution import abstention, attribution
from rlrag.evaluation.probe.calibration import brier, expected_calibration_error, reliability
from rlrag.evaluation.probe.contradiction import Contradiction, contradictions
from rlrag.evaluation.probe.mirage import loosely_right, mirage
from rlrag.evaluation.probe.robustness import (
    GoldContext,
    GoldQuestions,
    by_setting,
    gold_at_places,
    order_sensitivity,
    orders,
    shuffled,
)
from rlrag.records import Generation, Passage, Question
from rlrag.rewards.answer_match import answer_contained, is_unanswerable, token_f1
from rlrag.rewards.answering import AnsweringReward

Variants = Mapping[int, Sequence[Sequence[Passage]]]
"""By question, the passages to show in each setting."""


@dataclass(frozen=True)
class ProbeSettings:
    """How contexts are changed."""

    num_distractors: int = 4
    distractor_counts: tuple[int, ...] = (0, 1, 2, 4)
    copies: tuple[int, ...] = (1, 2, 3)
    contradictions: tuple[int, ...] = (0, 1, 2)
    max_orders: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that no context can have.

        Raises:
            ConfigError: naming the setting.
        """
        if self.num_distractors < 1:
            raise ConfigError(f"num_distractors is {self.num_distractors}; give at least 1")
        if self.max_orders < 2:
            raise ConfigError(f"max_orders is {self.max_orders}; give at least 2")
        for name, numbers, least in (
            ("distractor_counts", self.distractor_counts, 0),
            ("copies", self.copies, 1),
            ("contradictions", self.contradictions, 0),
        ):
            if not numbers or min(numbers) < least or list(numbers) != sorted(set(numbers)):
                raise ConfigError(
                    f"{name} is {list(numbers)}; give ascending numbers of at least {least}"
                )

    @property
    def needed_distractors(self) -> int:
        """How many distractors a question must have."""
        return max(self.num_distractors, *self.distractor_counts)


@dataclass(frozen=True)
class Measured:
    """What one measure found: a value for each question, NaN where it says nothing of it.

    `numbers` are no means over questions and have no intervals; `tables` are rows of named numbers.
    """

    values: Mapping[str, np.ndarray]
    numbers: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """One system on one set of questions, whose answers are asked for as measures need them.

    `errors` collects, by row, why the generator could not answer: a measure leaves out the
    questions that it could not ask in every setting.
    """

    questions: Sequence[Question]
    gold: GoldQuestions
    picked: Picked
    answering: AnsweringReward
    settings: ProbeSettings
    errors: dict[int, RlragError] = field(default_factory=dict)

    @cached_property
    def answers(self) -> dict[int, Generation]:
        """From the passages as they were picked, by row."""
        asked = {row: [passages] for row, passages in enumerate(self.picked.selections)}
        return {row: answers[0] for row, answers in self._ask(asked).items()}

    def ask(self, variants: Variants) -> dict[int, list[str]]:
        """What is answered in each setting, by row."""
        return {row: [a.text for a in found] for row, found in self._ask(variants).items()}

    def _ask(self, variants: Variants) -> dict[int, list[Generation]]:
        asked = [(row, passages) for row, settings in variants.items() for passages in settings]
        answers = self.answering.answer(
            [self.questions[row] for row, _ in asked], [passages for _, passages in asked]
        )
        found: dict[int, list[Generation]] = {row: [] for row in variants}
        for (row, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, RlragError):
                self.errors[row] = answer
                found.pop(row, None)
            elif row in found:
                found[row].append(answer)
        if not found:
            raise next(iter(self.errors.values()))
        return found

    def grade(
        self,
        measure: Callable[[str, Sequence[str]], float],
        texts: Mapping[int, Sequence[str]],
    ) -> np.ndarray:
        """A measure of every answer, shape (Q, S); NaN for questions without answers."""
        num_settings = len(next(iter(texts.values())))
        graded_QS = np.full((len(self.questions), num_settings), np.nan)
        for row, said in texts.items():
            golden = self.questions[row].golden_answers
            graded_QS[row] = [measure(text, golden) for text in said]
        return graded_QS

    def spread(self, values: Mapping[str, np.ndarray], rows: Sequence[int]) -> Measured:
        """Values of the questions in these rows, as values of all questions."""
        spread = {name: np.full(len(self.questions), np.nan) for name in values}
        for name, values_Q in spread.items():
            values_Q[list(rows)] = values[name]
        return Measured(spread)

    def around_gold(
        self, change: Callable[[Question, GoldContext], Sequence[Sequence[Passage]]]
    ) -> dict[int, Sequence[Sequence[Passage]]]:
        """Changed contexts of the questions whose gold passages are known."""
        return {
            row: change(self.questions[row], context)
            for row, context in enumerate(self.gold.contexts)
            if context is not None
        }


def _mirage(probe: Probe) -> dict[str, Measured]:
    """With a fixed mixed context, and with the picked passages as the mixed one."""
    settings = probe.settings

    def contexts(question: Question, context: GoldContext) -> list[Sequence[Passage]]:
        around = context.distractors[: settings.num_distractors]
        mixed = shuffled(question.id, context.gold + around, settings.seed)
        return [(), mixed, context.gold]

    def shares(texts: Mapping[int, Sequence[str]]) -> Measured:
        rows = list(texts)
        return probe.spread(mirage(*probe.grade(loosely_right, texts)[rows].T), rows)

    texts = probe.ask(probe.around_gold(contexts))
    picked = {
        row: [base, probe.answers[row].text, oracle]
        for row, (base, _, oracle) in texts.items()
        if row in probe.answers
    }
    found = {"mirage": shares(texts)}
    return found | ({"mirage_picked": shares(picked)} if picked else {})


def _order(probe: Probe) -> dict[str, Measured]:
    num_picked = min(len(selection) for selection in probe.picked.selections)
    asked = orders(num_picked, probe.settings.max_orders, probe.settings.seed)
    texts = probe.ask(
        {
            row: [[selection[place] for place in order] for order in asked]
            for row, selection in enumerate(probe.picked.selections)
        }
    )
    found = order_sensitivity(probe.grade(answer_contained, texts), probe.grade(token_f1, texts))
    return {"order": Measured(found, {"num_orders": float(len(asked))})}


def _position(probe: Probe) -> dict[str, Measured]:
    num = probe.settings.num_distractors
    texts = probe.ask(probe.around_gold(lambda _, context: gold_at_places(context, num)))
    return {"position": _settings(probe, range(1, num + 2), texts)}


def _distractors(probe: Probe) -> dict[str, Measured]:
    counts, seed = probe.settings.distractor_counts, probe.settings.seed
    texts = probe.ask(
        probe.around_gold(
            lambda question, context: [
                shuffled(question.id, context.gold + context.distractors[:count], seed)
                for count in counts
            ]
        )
    )
    return {"distractors": _settings(probe, counts, texts)}


def _duplicates(probe: Probe) -> dict[str, Measured]:
    settings = probe.settings
    texts = probe.ask(
        probe.around_gold(
            lambda question, context: [
                shuffled(
                    question.id,
                    context.gold * copies + context.distractors[: settings.num_distractors],
                    settings.seed,
                )
                for copies in settings.copies
            ]
        )
    )
    return {"duplicates": _settings(probe, settings.copies, texts)}


def _contradictions(probe: Probe) -> dict[str, Measured]:
    """So many copies of the gold passages say another answer; `misled@n` is given that one."""
    settings, counts = probe.settings, probe.settings.contradictions
    found = contradictions(probe.questions, probe.gold, settings.seed)

    def contexts(row: int, made: Contradiction) -> list[Sequence[Passage]]:
        context = probe.gold.contexts[row]
        assert context is not None
        around = context.gold + context.distractors[: settings.num_distractors]
        question_id = probe.questions[row].id
        return [shuffled(question_id, around + made.passages * n, settings.seed) for n in counts]

    texts = probe.ask({row: contexts(row, made) for row, made in found.items()})
    misled_QS = np.full((len(probe.questions), len(counts)), np.nan)
    for row, said in texts.items():
        misled_QS[row] = [answer_contained(text, [found[row].wrong_answer]) for text in said]
    misled = {f"misled@{count}": misled_QS[:, place] for place, count in enumerate(counts)}
    return {"contradictions": Measured({**_settings(probe, counts, texts).values, **misled})}


def _settings(
    probe: Probe, settings: Sequence[int], texts: Mapping[int, Sequence[str]]
) -> Measured:
    right_QS, f1_QS = probe.grade(answer_contained, texts), probe.grade(token_f1, texts)
    return Measured(by_setting(settings, right_QS, f1_QS))


def _attribution(probe: Probe) -> dict[str, Measured]:
    rows, texts = list(probe.answers), [answer.text for answer in probe.answers.values()]
    selections = [probe.picked.selections[row] for row in rows]
    found = attribution([probe.questions[row] for row in rows], selections, texts)
    return {"attribution": probe.spread(found, rows)}


def _abstention(probe: Probe) -> dict[str, Measured]:
    rows, texts = list(probe.answers), [answer.text for answer in probe.answers.values()]
    found = abstention([probe.questions[row] for row in rows], texts)
    return {"abstention": probe.spread(found, rows)}


def _calibration(probe: Probe) -> dict[str, Measured]:
    """Of the answer, of the whole selection, and of its first pick where gold is named.

    That of the answer is left out where the generator does not say how probable it was.
    """
    rows, answers = list(probe.answers), list(probe.answers.values())
    right = [
        answer_contained(answer.text, probe.questions[row].golden_answers)
        for row, answer in probe.answers.items()
    ]
    found = {}
    answer_logp = [answer.logp for answer in answers if answer.logp is not None]
    if len(answer_logp) == len(answers):
        found["calibration_answer"] = _calibrated(probe, rows, answer_logp, right)
    logp_QT = probe.picked.action_logp_QT
    if logp_QT is None:
        return found
    selection_logp = logp_QT[rows].sum(axis=1).tolist()
    found["calibration_selection"] = _calibrated(probe, rows, selection_logp, right)
    named = [row for row, question in enumerate(probe.questions) if question.gold_ids]
    if named:
        first_is_gold = [
            float(probe.picked.selections[row][0].id in probe.questions[row].gold_ids)
            for row in named
        ]
        first_logp = logp_QT[named, 0].tolist()
        found["calibration_first_pick"] = _calibrated(probe, named, first_logp, first_is_gold)
    return found


def _calibrated(
    probe: Probe, rows: Sequence[int], logp: Sequence[float], outcomes: Sequence[float]
) -> Measured:
    # The sum of the log-probabilities of a certain answer can end a rounding error above 0.
    probabilities = np.exp(np.minimum(logp, 0.0))
    bins = reliability(probabilities, outcomes)
    values = {
        "brier": brier(probabilities, outcomes),
        "probability": probabilities,
        "share": np.asarray(outcomes),
    }
    return replace(
        probe.spread(values, rows),
        numbers={"ece": expected_calibration_error(bins)},
        tables={"reliability": [asdict(row) for row in bins]},
    )


def _cost(probe: Probe) -> dict[str, Measured]:
    answers = probe.answers.values()
    tokens = {
        "prompt_tokens": np.array([answer.num_prompt_tokens for answer in answers], dtype=float),
        "answer_tokens": np.array([answer.num_tokens for answer in answers], dtype=float),
    }
    seconds = {
        f"{name}_seconds": seconds_per_question(part, len(probe.questions))
        for name, part in probe.picked.parts.items()
    }
    return {"cost": replace(probe.spread(tokens, list(probe.answers)), numbers=seconds)}


MEASURES: Mapping[str, Callable[[Probe], dict[str, Measured]]] = {
    "mirage": _mirage,
    "order": _order,
    "position": _position,
    "distractors": _distractors,
    "duplicates": _duplicates,
    "contradictions": _contradictions,
    "attribution": _attribution,
    "abstention": _abstention,
    "calibration": _calibration,
    "cost": _cost,
}
"""What can be measured, by name."""

_AROUND_GOLD = ("mirage", "position", "distractors", "duplicates", "contradictions")


def impossible(
    questions: Sequence[Question], gold: GoldQuestions, num_selected: int, num_needed: int
) -> dict[str, RlragError]:
    """The measures that these questions or this pipeline do not allow, each with the reason.

    Args:
        questions: Those to ask.
        gold: Their gold passages.
        num_selected: Passages that the pipeline picks (K).
        num_needed: Distractors that a question was asked to have.
    """
    found: dict[str, RlragError] = {}
    if not gold.rows:
        reason = _no_gold(gold, num_needed)
        found = {name: DataError(f"{name}: {reason}") for name in _AROUND_GOLD}
    elif not contradictions(questions, gold):
        found["contradictions"] = DataError(
            "contradictions: no gold passage contains a golden answer literally, or no other "
            "question has an answer to replace it with; give more questions, or leave this "
            "measure out"
        )
    if num_selected < 2:
        found["order"] = ConfigError(
            f"order: the pipeline picks {num_selected} passage, which has only one order; "
            "leave this measure out"
        )
    if not any(is_unanswerable(question.golden_answers) for question in questions):
        found["abstention"] = DataError(
            f"abstention: all {len(questions)} questions have golden answers; add questions "
            "whose golden_answers are empty, or leave this measure out"
        )
    return found


def _no_gold(gold: GoldQuestions, num_needed: int) -> str:
    counts = gold.left_out
    if counts.get("too_few_distractors"):
        return (
            f"none of the {counts['too_few_distractors']} questions with gold passages has "
            f"{num_needed} distractors among its candidates; ask for fewer"
        )
    if counts.get("gold_not_in_corpus"):
        return (
            f"the corpus lacks the gold passages of all {counts['gold_not_in_corpus']} answerable "
            "questions that name any; give the corpus that belongs to the questions"
        )
    return (
        f"no gold passages are known: of {len(gold.contexts)} questions none has both golden "
        "answers and metadata.gold_ids; add them, or leave it out"
    )


def measure(
    names: Sequence[str], probe: Probe, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Measured]:
    """Take the named measures; some have several parts with names of their own.

    Args:
        names: Of `MEASURES`, without those that are `impossible`.
        probe: The system to ask.
        progress: Called with the name of each before it is taken.
    """
    found: dict[str, Measured] = {}
    for name in names:
        progress(name)
        found |= MEASURES[name](probe)
    return found
