"""Writes and reads the file of an evaluation with every system's picks and answers.

`evaluation.questions.jsonl` lies beside `evaluation.json`. Each line is one JSON object.

    {"kind": "header", "format": 1, "hashes": {..}, "bundle_step": 40, "num_selected": 2}
    {"kind": "passage", "id": "p9", "title": "Rhine", "text": "..."}
    {"kind": "question", "id": "q1", "question": "..", "golden_answers": [..], "gold_ids": [..],
     "type": "bridge", "retrieved": {"retriever": ["p9", ..]}, "systems": {"trained": {
     "retriever": "retriever", "picked": ["p9"], "answer": "..", "em": 1.0, "f1": 1.0,
     "contained": 1.0}}}

The header comes first and has what `evaluation.json` says of itself, so that a file of another
evaluation is known. A passage stands there once, before the questions, and shortened: to
`PICKED_CHARS` where a system picked it or a question names it as gold, else to `FOUND_CHARS`.
`retrieved` has every retriever's candidates in its order. `retriever` and `picked` are left out for
a system that picks nothing; where no answer could be given, `error` says why in place of the answer
and its measures. These are null where no question has golden answers. A system that looks further
has a `path`: `[{"action": "pick", "passage": "p9", "found": ["p4"]}, ..]`, an object a turn. `type`
is what the question's metadata calls so, `unanswerable` where there are no golden answers, else
null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrag.errors import CheckpointError, DataError
from rlrag.files.text import whole_file
from rlrag.records import Passage, PathTurn, Question
from rlrag.rewards.answer_match import answer_contained, exact_match, token_f1

if TYPE_CHECKING:  # it brings torch, which reading does without
    from rlrag.evaluation.systems import Answered

FORMAT = 1
PICKED_CHARS = 400
FOUND_CHARS = 160
_FACTS = ("hashes", "bundle_step", "baselines")
_MEASURES = ("em", "f1", "contained")


@dataclass(frozen=True)
class Turn:
    """One turn of a path: an action, the passage or query that it is about, and what that found."""

    action: str
    passage: str | None
    query: str | None
    found: tuple[str, ...]


@dataclass(frozen=True)
class SystemAnswer:
    """One system's answer to one question; `error` says why there is none.

    Its measures are None without an answer, and where no question has golden answers.

    `picked` and `retrieved` are passage ids, best first: what was shown and what it was chosen
    from. `path` is how a system that looks further came to its picks.
    """

    picked: tuple[str, ...]
    retriever: str | None
    answer: str | None
    error: str | None
    em: float | None
    f1: float | None
    contained: float | None
    path: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class EvaluatedQuestion:
    """One question, what the retrievers found for it, and every system's answer."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    gold_ids: tuple[str, ...]
    type: str | None
    retrieved: Mapping[str, tuple[str, ...]]
    systems: Mapping[str, SystemAnswer]


@dataclass(frozen=True)
class EvaluatedQuestions:
    """A whole file: title and shortened text of each passage by its id, and the questions."""

    facts: Mapping[str, Any]
    passages: Mapping[str, tuple[str, str]]
    questions: tuple[EvaluatedQuestion, ...]

    @property
    def systems(self) -> list[str]:
        """The systems' names, in the order in which they answered."""
        return list(self.questions[0].systems) if self.questions else []

    def belongs_to(self, evaluation: Mapping[str, Any]) -> bool:
        """Whether these are the questions of a comparison, by what both say of themselves."""
        return all(self.facts.get(name) == evaluation.get(name) for name in _FACTS)


def questions_path(evaluation: Path) -> Path:
    """Where the questions of an evaluation lie.

    Example:
        >>> questions_path(Path("runs/nq/evaluation.json")).as_posix()
        'runs/nq/evaluation.questions.jsonl'
    """
    return evaluation.with_name(f"{evaluation.stem}.questions.jsonl")


class QuestionRecorder:
    """Takes each system's answers as they come; `write` makes the file of them."""

    def __init__(self, num_selected: int) -> None:
        self._num_selected = num_selected
        self._questions: Sequence[Question] = ()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._retrieved: dict[str, list[list[str]]] = {}
        self._passages: dict[str, tuple[str, str]] = {}
        self._shown: set[str] = set()

    def keep(self, name: str, answered: Answered) -> None:
        """Take one system's answers, in the order of the table."""
        self._questions = answered.questions
        self._shown |= {p.id for picks in answered.selections for p in picks}
        has_golden = any(question.golden_answers for question in answered.questions)
        self._answers[name] = [
            _answer_record(answered, row, text, has_golden)
            for row, text in enumerate(answered.texts)
        ]
        for passage in (p for picks in answered.selections for p in picks):
            self._keep(passage)
        source, table = answered.retriever, answered.candidates
        if source is None or table is None or source in self._retrieved:
            return
        # Not the table itself, which may hold the vectors of a whole corpus.
        found = self._retrieved[source] = []
        for row in range(len(table)):
            passages = table.passages(row)
            found.append([passage.id for passage in passages])
            for passage in passages:
                self._keep(passage)

    def _keep(self, passage: Passage) -> None:
        self._passages[passage.id] = (passage.title, shortened(passage.text, PICKED_CHARS))

    def write(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """Write the file, which is whole at every moment.

        Args:
            path: From `questions_path`.
            evaluation: What `evaluation.json` will hold.

        Raises:
            CheckpointError: when it cannot be written; an older file then stays.
        """
        try:
            with whole_file(path) as stream:
                for record in self._records(evaluation):
                    stream.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error.strerror or error}; free space, then run the same "
                "command again"
            ) from error

    def _records(self, evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        facts = {name: evaluation[name] for name in _FACTS if name in evaluation}
        header = {"kind": "header", "format": FORMAT, **facts}
        yield header | {"num_selected": self._num_selected}
        shown = self._shown.union(*(question.gold_ids for question in self._questions))
        for passage_id, (title, text) in self._passages.items():
            yield {
                "kind": "passage",
                "id": passage_id,
                "title": shortened(title, FOUND_CHARS),
                "text": text if passage_id in shown else shortened(text, FOUND_CHARS),
            }
        for row, question in enumerate(self._questions):
            yield {
                "kind": "question",
                "id": question.id,
                "question": question.question,
                "golden_answers": list(question.golden_answers),
                "gold_ids": list(question.gold_ids),
                "type": _type(question),
                "retrieved": {name: ids[row] for name, ids in self._retrieved.items()},
                "systems": {name: answers[row] for name, answers in self._answers.items()},
            }


def _answer_record(
    answered: Answered, row: int, text: str | None, has_golden: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if answered.retriever is not None:
        record["retriever"] = answered.retriever
        record["picked"] = [passage.id for passage in answered.selections[row]]
    path = answered.paths[row] if answered.paths else None
    if path is not None:
        record["path"] = [_turn_record(turn) for turn in path.turns()]
    if text is None:
        return record | {"error": str(answered.answers[row])}
    if not has_golden:
        return record | {"answer": text, **dict.fromkeys(_MEASURES)}
    golden = answered.questions[row].golden_answers
    values = [
        measure(answer=text, golden_answers=golden)
        for measure in (exact_match, token_f1, answer_contained)
    ]
    return record | {"answer": text, **dict(zip(_MEASURES, values, strict=True))}


def _turn_record(turn: PathTurn) -> dict[str, Any]:
    told = {"passage": turn.passage_id, "query": turn.query}
    found = {"found": [found.passage_id for found in turn.found]} if turn.found else {}
    return {"action": turn.action} | {k: v for k, v in told.items() if v is not None} | found


def _type(question: Question) -> str | None:
    if not question.golden_answers:
        return "unanswerable"
    found = question.metadata.get("type")
    return shortened(found, FOUND_CHARS) if isinstance(found, str) and found.strip() else None


def shortened(text: str, room: int) -> str:
    """A text in one line of at most `room` characters; what is cut ends in an ellipsis.

    Example:
        >>> shortened("one  line of text", 8), shortened("short", 8)
        ('one lin…', 'short')
    """
    line = " ".join(text.split())
    return line if len(line) <= room else line[: room - 1].rstrip() + "…"


def read_questions(path: Path) -> EvaluatedQuestions:
    """The file that `QuestionRecorder.write` wrote.

    Raises:
        DataError: naming the line that is no such record, or a format of another version.
    """
    facts: dict[str, Any] | None = None
    passages: dict[str, tuple[str, str]] = {}
    questions: list[EvaluatedQuestion] = []
    number = 0
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007 (named where one is damaged)
                record = json.loads(line)
                kind = record["kind"]
                if facts is None:
                    facts = _header(record)
                elif kind == "passage":
                    passages[_text(record["id"])] = (_text(record["title"]), _text(record["text"]))
                elif kind == "question":
                    questions.append(_question(record))
                else:
                    raise ValueError(f"there is no record of kind {kind!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}, line {number} is damaged ({reason}); {_WAY_OUT}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if facts is None or not questions:
        raise DataError(f"{path} contains no question; {_WAY_OUT}")
    for question in questions:
        answers = question.systems.values()
        lists = [*question.retrieved.values(), *(answer.picked for answer in answers)]
        unknown = {passage_id for ids in lists for passage_id in ids} - passages.keys()
        if unknown:
            raise DataError(f"{path} does not contain the passage {min(unknown)!r}; {_WAY_OUT}")
    names = list(questions[0].systems)
    if any(list(question.systems) != names for question in questions):
        raise DataError(f"{path}: its questions do not all have the same systems; {_WAY_OUT}")
    return EvaluatedQuestions(facts, passages, tuple(questions))


_WAY_OUT = "delete it, and run the command that wrote it again"


def _header(record: Mapping[str, Any]) -> dict[str, Any]:
    if record["kind"] != "header" or record["format"] != FORMAT:
        raise ValueError(f"it is not a header of format {FORMAT}")
    return {name: value for name, value in record.items() if name not in ("kind", "format")}


def _question(record: Mapping[str, Any]) -> EvaluatedQuestion:
    return EvaluatedQuestion(
        id=_text(record["id"]),
        question=_text(record["question"]),
        golden_answers=_texts(record["golden_answers"]),
        gold_ids=_texts(record["gold_ids"]),
        type=None if record["type"] is None else _text(record["type"]),
        retrieved={name: _texts(ids) for name, ids in record["retrieved"].items()},
        systems={name: _answer(answer) for name, answer in record["systems"].items()},
    )


def _answer(record: Mapping[str, Any]) -> SystemAnswer:
    error = record.get("error")
    retriever = record.get("retriever")
    return SystemAnswer(
        picked=_texts(record.get("picked", [])),
        retriever=None if retriever is None else _text(retriever),
        answer=_text(record["answer"]) if error is None else None,
        error=None if error is None else _text(error),
        path=tuple(
            Turn(
                _text(turn["action"]),
                None if turn.get("passage") is None else _text(turn["passage"]),
                None if turn.get("query") is None else _text(turn["query"]),
                _texts(turn.get("found", [])),
            )
            for turn in record.get("path", [])
        ),
        **{
            name: None if error is not None or record[name] is None else _share(record[name])
            for name in _MEASURES
        },
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is not a list")
    return tuple(map(_text, values))


def _share(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a number from 0 to 1")
    return float(value)
