"""Question sets: a hash that sees everything, and parts that are the same every time."""

from __future__ import annotations

import pytest

from rlrag.config import RunConfig
from rlrag.data.checks import DataReport
from rlrag.data.questions import QuestionSet
from rlrag.data.split import TrainingQuestions, remarks
from rlrag.errors import DataError
from rlrag.records import Question


def question_set(num_questions: int) -> QuestionSet:
    questions = [
        Question(f"q{n}", f"Question {n}?", (f"answer {n}",)) for n in range(num_questions)
    ]
    return QuestionSet.of(questions, DataReport("made up", num_questions, num_questions))


def ids_of(questions: QuestionSet) -> set[str]:
    return {question.id for question in questions.questions}


def test_the_question_hash_is_stable_and_sees_every_part():
    question = Question("q1", "Which?", ("a", "b"), {"type": "t", "gold_ids": ["p1"]})
    variants = [
        question,
        Question("q2", "Which?", ("a", "b"), {"type": "t", "gold_ids": ["p1"]}),
        Question("q1", "What?", ("a", "b"), {"type": "t", "gold_ids": ["p1"]}),
        Question("q1", "Which?", ("b", "a"), {"type": "t", "gold_ids": ["p1"]}),
        Question("q1", "Which?", ("a", "b"), {"type": "t", "gold_ids": ["p2"]}),
    ]
    report = DataReport("made up", 1, 1)
    hashes = [QuestionSet.of([variant], report).content_hash for variant in variants]
    assert len(set(hashes)) == len(variants)
    reordered = Question("q1", "Which?", ("a", "b"), {"gold_ids": ["p1"], "type": "t"})
    assert QuestionSet.of([reordered], report).content_hash == hashes[0]
    two = variants[:2]
    assert (
        QuestionSet.of(two, report).content_hash != QuestionSet.of(two[::-1], report).content_hash
    )


def test_a_sample_is_seeded_ordered_and_nested():
    questions = question_set(50)
    sample = questions.sample(10, seed=1)
    order = [question.id for question in questions.questions]
    positions = [order.index(question.id) for question in sample.questions]
    assert positions == sorted(set(positions))
    assert len(positions) == 10
    assert sample == questions.sample(10, seed=1)
    assert sample.questions != questions.sample(10, seed=2).questions
    assert sample.content_hash != questions.content_hash
    assert ids_of(sample) <= ids_of(questions.sample(20, seed=1))
    assert questions.sample(None, seed=1) is questions
    assert questions.sample(50, seed=1) is questions


def test_a_split_is_disjoint_and_complete():
    questions = question_set(30)
    rest, held_out = questions.split(7, seed=3)
    assert (len(rest), len(held_out)) == (23, 7)
    assert ids_of(rest) | ids_of(held_out) == ids_of(questions)
    assert not ids_of(rest) & ids_of(held_out)
    assert questions.split(7, seed=3) == (rest, held_out)
    assert questions.split(7, seed=4)[1].questions != held_out.questions
    assert questions.split(0, seed=3)[0].questions == questions.questions
    with pytest.raises(DataError, match="cannot hold out 30 of the 30"):
        questions.split(30, seed=3)


def test_questions_of_training_that_are_asked_again_are_named():
    def a_set(**texts: str) -> QuestionSet:
        questions = [Question(name, text, ("v",)) for name, text in texts.items()]
        return QuestionSet.of(questions, DataReport("a.jsonl", len(texts), len(texts)))

    train = a_set(a="Who wrote \u201cEmma\u201d?", b="Where is Rome?", c="???")
    held_back = a_set(d="where is rome", e="!!!", f="Where is Rome now?")
    found = TrainingQuestions(train, train, held_back, 6, 0)
    evaluation = a_set(a="Who wrote it?", x="who  wrote Emma", c="???", z="Why?")
    held, asked = remarks(RunConfig(), found, evaluation)
    assert held.startswith("1 of 3 held-back questions are training questions too: 1 by their text")
    assert "3 of 4 evaluation questions are training questions too: " in asked
    assert "2 by their text and 1 by their id alone (x, c, a)" in asked
    assert remarks(RunConfig(), TrainingQuestions(train, train, None, 3, 0), a_set(z="Why?")) == []
