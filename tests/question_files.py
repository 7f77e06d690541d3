"""Words for questions in; evaluated questions whose numbers are known by hand out."""

from __future__ import annotations

from rlrag.evaluation.question_records import EvaluatedQuestion, EvaluatedQuestions, SystemAnswer

EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


def answer(text: str | None, f1: float = 0.0, em: float = 0.0, picked=("a",)) -> SystemAnswer:
    if text is None:
        return SystemAnswer(picked, "retriever", None, f"took too long {EVIL}", None, None, None)
    return SystemAnswer(picked, "retriever", text, None, em, f1, em)


def question(number: int, ours: SystemAnswer, theirs: SystemAnswer, **changes) -> EvaluatedQuestion:
    return EvaluatedQuestion(
        **{
            "id": f"q{number}",
            "question": f"What is number {number}?",
            "golden_answers": (f"answer {number}",),
            "gold_ids": ("b",),
            "type": "bridge" if number % 2 else None,
            "retrieved": {"retriever": ("a", "b")},
            "systems": {"retriever_order": theirs, "trained": ours},
            **changes,
        }
    )


def few_questions() -> EvaluatedQuestions:
    """F1 of the trained system against the retriever's order: -1, +0.5, 0, +1, not answered."""
    right = answer("right", f1=1.0, em=1.0, picked=("b", "a"))
    half, wrong = answer("half", f1=0.5), answer("wrong")
    evil = question(
        3,
        answer(EVIL, f1=1.0),
        wrong,
        question=f"{EVIL} Paris",
        golden_answers=(EVIL,),
        gold_ids=("b", EVIL),
        type=EVIL,
    )
    return EvaluatedQuestions(
        {"hashes": {"questions": "abc"}, "bundle_step": 4},
        {"a": ("First", "text of the first"), "b": (EVIL, f"\u2028text {EVIL} of the second")},
        (
            question(0, wrong, right),
            question(1, half, wrong),
            question(2, right, right, golden_answers=()),
            evil,
            question(4, right, answer(None)),
        ),
    )


def many_questions(count: int) -> EvaluatedQuestions:
    """Every third gained, every third lost, the others the same."""
    one, none = answer("yes", f1=1.0, em=1.0), answer("no")
    pairs = ((one, none), (none, one), (one, one))
    return EvaluatedQuestions(
        {"hashes": {"questions": "abc"}, "bundle_step": 4},
        {"a": ("First", "text"), "b": ("Second", "text")},
        tuple(question(number, *pairs[number % 3]) for number in range(count)),
    )
