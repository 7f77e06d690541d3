"""The table of a judge's verdicts: shares of correct answers, and agreement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rlrag.errors import DataError
from rlrag.evaluation.baselines import Baseline
from rlrag.evaluation.judge.agreement import Agreement
from rlrag.evaluation.question_records import EvaluatedQuestion, EvaluatedQuestions
from rlrag.evaluation.significance import (
    NUM_RESAMPLES,
    bootstrap_ci,
    paired_randomization_ci,
    paired_randomization_test,
)
from rlrag.evaluation.table import name_pair, paired_systems
from rlrag.rewards.llm_judge import CORRECT, UNPARSABLE, Case, Judged, Verdict

MEASURES = ("em", "contained")
"""What the judge is compared with; both are 0 or 1."""

Labels = Mapping[tuple[str, str], bool]
"""Whether people call an answer correct, by question id and system."""


@dataclass(frozen=True)
class JudgedAnswer:
    """One system's answer to one question; `verdict` is None where the judge did not reply."""

    question_id: str
    verdict: Verdict | None
    measures: Mapping[str, bool]

    @property
    def is_judged(self) -> bool:
        """Whether there is a verdict that says something."""
        return self.verdict not in (None, UNPARSABLE)

    @property
    def is_correct(self) -> bool:
        """Whether the judge calls it correct."""
        return self.verdict == CORRECT


def case_of(question: EvaluatedQuestion, system: str) -> Case:
    """What the judge is asked about one system's answer, which must be there."""
    answer = question.systems[system].answer
    assert answer is not None
    return Case(question.question, question.golden_answers, answer)


def answered_by_all(
    found: EvaluatedQuestions, systems: Sequence[str]
) -> tuple[EvaluatedQuestion, ...]:
    """The questions that have an answer of every one of these systems, so that they compare."""
    return tuple(
        question
        for question in found.questions
        if all(question.systems[name].answer is not None for name in systems)
    )


@dataclass(frozen=True)
class JudgeTable:
    """What a judge makes of systems on the same questions, in the same order for all."""

    systems: Mapping[str, Sequence[JudgedAnswer]]
    labels: Labels = field(default_factory=dict)
    num_resamples: int = NUM_RESAMPLES
    seed: int = 0
    baselines: Sequence[Baseline] = ()

    @classmethod
    def of(
        cls,
        questions: Sequence[EvaluatedQuestion],
        systems: Sequence[str],
        judged: Judged,
        labels: Labels,
        seed: int = 0,
        baselines: Sequence[Baseline] = (),
    ) -> JudgeTable:
        """Lay the verdicts out by system and question.

        `baselines` are what the evaluation compared `trained` with.
        """
        answers = {}
        for name in systems:
            answers[name] = [
                JudgedAnswer(
                    question.id,
                    judged.verdicts.get(case_of(question, name)),
                    {m: getattr(question.systems[name], m) == 1.0 for m in MEASURES},
                )
                for question in questions
            ]
        return cls(answers, labels, seed=seed, baselines=baselines)

    def to_json(self) -> dict[str, Any]:
        """Values that `json.dumps` takes.

        `systems.NAME` has the share judged correct with its interval, over the answers that have a
        verdict, the same answers' EM and containment, and how the judge agrees with each.
        `agreement` pools all systems, `human` the answers that people labelled, `paired.A_vs_B`
        compares systems on the questions where both have a verdict.
        """
        pooled = [answer for answers in self.systems.values() for answer in answers]
        record: dict[str, Any] = {
            "systems": {name: self._summary(answers) for name, answers in self.systems.items()},
            "agreement": _agreement(pooled),
            "paired": self._paired(),
        }
        return record | ({"human": self._human()} if self.labels else {})

    def _summary(self, answers: Sequence[JudgedAnswer]) -> dict[str, Any]:
        judged = [answer for answer in answers if answer.is_judged]
        values = np.array([answer.is_correct for answer in judged], dtype=np.float64)
        interval = bootstrap_ci(values, self.num_resamples, self.seed) if judged else None
        return {
            "correct": float(values.mean()) if judged else None,
            "ci95": None if interval is None else list(interval),
            "num_judged": len(judged),
            "num_unparsable": sum(answer.verdict == UNPARSABLE for answer in answers),
            "num_failed": sum(answer.verdict is None for answer in answers),
            **{
                measure: float(np.mean([a.measures[measure] for a in judged])) if judged else None
                for measure in MEASURES
            },
            "agreement": _agreement(judged),
        }

    def _paired(self) -> dict[str, Any]:
        found = {}
        for pair in paired_systems(self.systems, self.baselines):
            both = [
                (ours.is_correct, theirs.is_correct)
                for ours, theirs in zip(*(self.systems[name] for name in pair), strict=True)
                if ours.is_judged and theirs.is_judged
            ]
            if not both:
                continue
            ours, theirs = np.array(both, dtype=np.float64).T
            interval = paired_randomization_ci(ours, theirs, self.num_resamples, self.seed)
            found["_vs_".join(pair)] = {
                "diff": float(ours.mean() - theirs.mean()),
                "ci95": list(interval),
                "p_value": paired_randomization_test(ours, theirs, self.num_resamples, self.seed),
                "num_questions": len(both),
            }
        return found

    def _human(self) -> dict[str, Any]:
        labelled = [
            (answer, self.labels[answer.question_id, name])
            for name, answers in self.systems.items()
            for answer in answers
            if (answer.question_id, name) in self.labels and answer.is_judged
        ]
        judge = Agreement.of((answer.is_correct, label) for answer, label in labelled)
        return {
            "num_labels": len(self.labels),
            "judge": judge.to_json("judge", "human"),
            **{
                measure: Agreement.of(
                    (answer.measures[measure], label) for answer, label in labelled
                ).to_json(measure, "human")
                for measure in MEASURES
            },
        }


def _agreement(answers: Sequence[JudgedAnswer]) -> dict[str, Any]:
    judged = [answer for answer in answers if answer.is_judged]
    return {
        measure: Agreement.of(
            (answer.is_correct, answer.measures[measure]) for answer in judged
        ).to_json("judge", measure)
        for measure in MEASURES
    }


def read_labels(path: Path, found: EvaluatedQuestions) -> dict[tuple[str, str], bool]:
    """Lines such as `{"id": "q1", "system": "trained", "correct": true}`.

    Raises:
        DataError: naming the line that is none, that is of an unknown question or system, or that
            contradicts an earlier one.
    """
    known = {question.id for question in found.questions}
    labels: dict[tuple[str, str], bool] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--human {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key, label = (record["id"], record["system"]), record["correct"]
            is_label = isinstance(label, bool) and all(isinstance(part, str) for part in key)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_label = False
        if not is_label:
            raise DataError(
                f'--human {path}, line {number} is not a label; write it as {{"id": "q1", '
                '"system": "trained", "correct": true}'
            )
        if key[0] not in known or key[1] not in found.systems:
            raise DataError(
                f"--human {path}, line {number}: there is no answer of {key[1]!r} to {key[0]!r} "
                "in the evaluation; remove the line"
            )
        if labels.setdefault(key, label) != label:
            raise DataError(
                f"--human {path}, line {number} contradicts an earlier label of {key[1]!r} for "
                f"{key[0]!r}; keep one of them"
            )
    if not labels:
        raise DataError(f"--human {path} contains no label; leave the flag out")
    return labels


def render(record: Mapping[str, Any], title: str) -> Table:
    """`JudgeTable.to_json` as a rich table that fits 80 columns.

    `alike` is the share of answers that the judge and exact match, or containment, judge alike.
    """
    drawn = Table(
        title=Text(title),
        caption=Text("\n".join(_remarks(record))),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    drawn.add_column("system", no_wrap=True)
    drawn.add_column("judged correct (95 %)", justify="right")
    for heading in ("EM", "alike", "kappa", "cont.", "alike", "kappa"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    for name, found in record["systems"].items():
        drawn.add_row(Text(name), *_cells(found))
    return drawn


def _cells(found: Mapping[str, Any]) -> list[str]:
    if not found["num_judged"]:
        return ["-"] * 7
    low, high = found["ci95"]
    cells = [f"{found['correct']:.3f} ({low:.3f}-{high:.3f})"]
    for measure in MEASURES:
        agreement = found["agreement"][measure]
        cells += [f"{found[measure]:.3f}", _number(agreement["raw"]), _number(agreement["kappa"])]
    return cells


def _remarks(record: Mapping[str, Any]) -> list[str]:
    names = {"em": "exact match", "contained": "containment", "judge": "the judge"}
    lines = [
        f"{name_pair(name)}: {pair['diff']:+.3f}, 95 % {pair['ci95'][0]:+.3f} to "
        f"{pair['ci95'][1]:+.3f}, p = {pair['p_value']:.2g}"
        for name, pair in record["paired"].items()
    ]
    for name, pair in record["agreement"].items():
        lines.append(
            f"all systems, judge and {names[name]}: both {pair['both']}, judge only "
            f"{pair['judge_only']}, {names[name]} only {pair[f'{name}_only']}, neither "
            f"{pair['neither']}; kappa {_number(pair['kappa'])}"
        )
    for name, pair in record.get("human", {}).items():
        if name != "num_labels":
            lines.append(
                f"people and {names[name]}: {_number(pair['raw'])} alike of {pair['num']}, kappa "
                f"{_number(pair['kappa'])}"
            )
    for key, text in (("num_unparsable", "no verdict"), ("num_failed", "no reply")):
        counts = {name: found[key] for name, found in record["systems"].items() if found[key]}
        if counts:
            told = ", ".join(f"{count} of {name}" for name, count in counts.items())
            lines.append(f"{text}: {told}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
