"""The table of questions and answers in a report, with search and filters.

The page's script (question_browser.js) draws the list. What it reads is JSON, packed by gzip and
written in base 64, so that no text of a run can be taken for markup; the script puts texts into the
page as text nodes. Passages stand there once for all runs and are named by their number.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlrag.evaluation.question_records import EvaluatedQuestion, EvaluatedQuestions
from rlrag.evaluation.report.run_record import RunRecord

SCRIPT = Path(__file__).with_name("question_browser.js").read_text(encoding="utf-8")

_CHOICES = {
    "measure": ("by", {"f1": "F1", "em": "EM", "contained": "contained answer"}),
    "order": (
        "sort by",
        {
            "gains": "greatest gain",
            "losses": "greatest loss",
            "changes": "greatest change",
            "file": "order of the file",
        },
    ),
    "change": (
        "show",
        {
            "all": "all",
            "gained": "gained",
            "lost": "lost",
            "same": "same",
            "unanswered": "not answered",
        },
    ),
}


def question_browser(runs: Sequence[RunRecord]) -> str:
    """HTML for the questions of all finished runs; nothing where no run is finished."""
    finished = [run for run in runs if run.evaluation is not None]
    kept = {run.name: run.questions for run in finished if run.questions is not None}
    without = [run.name for run in finished if run.questions is None]
    told = ""
    if without:
        text = (
            f"There are no single questions to look through for {', '.join(without)}: its "
            "evaluation kept none, or another one wrote evaluation.questions.jsonl. The command "
            "that trained the run evaluates it again once evaluation.json is deleted."
        )
        told = f'<p class="note">{escape(text)}</p>\n'
    if not kept:
        return told
    return (
        # Not noscript, which says nothing where a browser runs scripts but not this one.
        f'{told}<p id="question-note">To look through the single questions, allow this page to run '
        'its script.</p>\n<div id="question-browser" hidden>\n'
        f'<form id="question-controls">\n{_controls()}</form>\n'
        '<p id="question-status" role="status"></p>\n<ol id="question-list"></ol>\n'
        '<p id="question-pages"><button type="button" id="question-previous">Previous</button>\n'
        '<span id="question-page" role="status"></span>\n'
        '<button type="button" id="question-next">Next</button></p>\n</div>\n'
        f'<script type="text/plain" id="question-data">{pack(kept)}</script>\n'
        f"<script>{SCRIPT}</script>\n"
    )


def pack(kept: Mapping[str, EvaluatedQuestions]) -> str:
    """The questions of each run, by its name, as base 64 of gzip of JSON."""
    text = json.dumps(_numbered(kept), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), mtime=0)).decode("ascii")


def _numbered(kept: Mapping[str, EvaluatedQuestions]) -> dict[str, Any]:
    """What the script reads; `passages` has id, title and text of each passage of all runs."""
    numbers: dict[tuple[str, str, str], int] = {}
    runs = []
    for name, found in kept.items():
        of_id = {
            passage_id: numbers.setdefault((passage_id, *texts), len(numbers))
            for passage_id, texts in found.passages.items()
        }
        questions = [_question(question, of_id) for question in found.questions]
        runs.append({"name": name, "systems": found.systems, "questions": questions})
    return {"passages": [list(passage) for passage in numbers], "runs": runs}


def _question(question: EvaluatedQuestion, of_id: Mapping[str, int]) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "golden": question.golden_answers,
        # Gold passages that were not retrieved keep their ids, as nothing else is known of them.
        "gold": [of_id.get(passage_id, passage_id) for passage_id in question.gold_ids],
        "type": question.type,
        "retrieved": {name: [of_id[i] for i in ids] for name, ids in question.retrieved.items()},
        "answers": [
            {
                "answer": given.answer,
                "error": given.error,
                "em": given.em,
                "f1": given.f1,
                "contained": given.contained,
                "picked": [of_id[passage_id] for passage_id in given.picked],
                # The passages that a path found and nobody picked have no text here.
                "path": [
                    [turn.action, of_id.get(turn.passage or ""), turn.query, len(turn.found)]
                    for turn in given.path
                ],
            }
            for given in question.systems.values()
        ],
    }


def _controls() -> str:
    """Labelled fields; the script fills those whose choices a run decides."""
    fixed = "".join(
        _field(name, label, [f'<option value="{v}">{text}</option>' for v, text in choices.items()])
        for name, (label, choices) in _CHOICES.items()
    )
    return (
        f"{_field('run', 'run')}{_field('ours', 'compare')}{_field('theirs', 'with')}{fixed}"
        f"{_field('type', 'type')}"
        '<span><label for="question-search">search</label> <input type="search" '
        'id="question-search" placeholder="question or answer" autocomplete="off"></span>\n'
    )


def _field(name: str, label: str, options: Sequence[str] = ()) -> str:
    return (
        f'<span id="question-{name}-field"><label for="question-{name}">{label}</label> '
        f'<select id="question-{name}">{"".join(options)}</select></span>\n'
    )
