"""The questions of an evaluation: what is kept of them, read back, refused, and put into a page."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from question_files import EVIL, few_questions, many_questions
from stand_ins import ReadingGenerator, WordPrompts
from test_evaluation_report import Page, evaluation, run
from test_evaluation_systems import LastFirst, three_questions

from rlrag.config import EnvironmentConfig, EvaluationConfig, RunConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.errors import CheckpointError, DataError, GenerationError
from rlrag.evaluation.question_records import (
    FOUND_CHARS,
    PICKED_CHARS,
    QuestionRecorder,
    questions_path,
    read_questions,
    shortened,
)
from rlrag.evaluation.report.page import render_report
from rlrag.evaluation.report.question_browser import SCRIPT
from rlrag.evaluation.systems import Answered, evaluate
from rlrag.pipeline import open_reward
from rlrag.records import Generation, Passage, Question
from rlrag.retrieval.candidates import CandidateTable
from rlrag.selection.plackett_luce import PlackettLucePolicy

MEASURES = ("em", "f1", "contained")
FACTS = {"hashes": {"corpus": "c", "questions": "q"}, "bundle_step": 7, "systems": {}}


def table() -> CandidateTable:
    """Two questions of three candidates each; the middle one is candidate of both."""
    return CandidateTable(
        questions=(
            Question(
                "q0",
                "which city",
                ("Paris", "City of\nParis"),
                {"type": "a", "gold_ids": ["p2", "px"]},
            ),
            Question("q1", "which\u2028river \ud800", (), {"type": 3}),
        ),
        corpus=MemoryCorpus([Passage(f"p{n}", f"T{n}", f"text {n} " * 200) for n in range(5)]),
        rows_QN=np.array([[0, 1, 2], [2, 3, 4]]),
        scores_QNC=np.zeros((2, 3, 1), dtype=np.float32),
        score_names=("bm25",),
        question_vectors_QD=np.zeros((2, 0), dtype=np.float32),
        passage_vectors_PD=np.zeros((5, 0), dtype=np.float32),
    )


def recorded() -> QuestionRecorder:
    found = table()
    said = [Generation("in Paris", -1.0, 2, 9), GenerationError("took more than 60 s")]
    picks = [[found.passages(0)[1], found.passages(0)[0]], [found.passages(1)[2]]]
    nothing = [Generation("", -1.0, 0, 9), Generation("Rhine", -1.0, 1, 9)]
    recorder = QuestionRecorder(2)
    recorder.keep("no_retrieval", Answered(found.questions, [(), ()], nothing))
    recorder.keep("trained", Answered(found.questions, picks, said, found, "tuned_retriever"))
    recorder.keep(
        "tuned_retriever", Answered(found.questions, picks, said, found, "tuned_retriever")
    )
    return recorder


def test_what_was_picked_and_answered_comes_back(tmp_path):
    path = questions_path(tmp_path / "evaluation.json")
    recorded().write(path, FACTS)
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.questions.jsonl"]
    found = read_questions(path)
    assert found.systems == ["no_retrieval", "trained", "tuned_retriever"]
    first, second = found.questions
    assert (first.golden_answers, first.gold_ids) == (("Paris", "City of\nParis"), ("p2", "px"))
    assert (first.type, second.type) == ("a", "unanswerable")
    assert second.question == "which\u2028river \ud800"
    assert first.retrieved == {"tuned_retriever": ("p0", "p1", "p2")}
    ours = first.systems["trained"]
    assert (ours.picked, ours.retriever, ours.answer, ours.error) == (
        ("p1", "p0"),
        "tuned_retriever",
        "in Paris",
        None,
    )
    # Words "in paris" against "paris": precision 1/2, recall 1.
    assert (ours.em, ours.f1, ours.contained) == (0.0, pytest.approx(2 / 3), 1.0)
    none = first.systems["no_retrieval"]
    assert (none.picked, none.retriever, none.answer, none.f1) == ((), None, "", 0.0)
    failed = second.systems["trained"]
    assert (failed.answer, failed.error, failed.em) == (None, "took more than 60 s", None)
    assert second.systems["no_retrieval"].em == 0.0  # no golden answers: only silence is right


def test_passages_are_kept_once_and_shortened_by_whether_they_were_shown(tmp_path):
    recorded().write(tmp_path / "f", FACTS)
    lines = [json.loads(line) for line in (tmp_path / "f").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds == ["header", *["passage"] * 5, *["question"] * 2]
    lengths = {line["id"]: len(line["text"]) for line in lines if line["kind"] == "passage"}
    # p0, p1 and p4 are picked, p2 is gold, p3 only found; a cut at a space loses that space.
    assert lengths.pop("p3") in (FOUND_CHARS, FOUND_CHARS - 1)
    assert set(lengths.values()) <= {PICKED_CHARS, PICKED_CHARS - 1}
    assert shortened("abc", 3) == "abc"
    assert shortened("ab cd", 4) == "ab…"


def test_questions_of_another_evaluation_are_known(tmp_path):
    recorded().write(tmp_path / "f", FACTS)
    found = read_questions(tmp_path / "f")
    assert found.belongs_to(FACTS)
    assert not found.belongs_to(FACTS | {"bundle_step": 8})
    assert not found.belongs_to(FACTS | {"hashes": {}})


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(ValueError):
        recorded().write(tmp_path / "f", FACTS | {"bundle_step": math.nan})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "old")]
    with pytest.raises(CheckpointError, match=r"cannot write .*no/f: No such file"):
        recorded().write(tmp_path / "no" / "f", FACTS)


@pytest.mark.parametrize(
    ("at", "line", "complaint"),
    [
        (0, '{"kind": "header", "format": 2}', "line 1 is damaged .*not a header of format 1"),
        (1, '{"kind": "passage", "id": 3, "title": "", "text": ""}', "line 2 .*3 is not a string"),
        (3, '{"kind": "pass', "line 4 is damaged"),
        (3, '{"kind": "joke"}', "there is no record of kind 'joke'"),
        (3, "[]", "line 4 is damaged"),
        (
            1,
            '{"kind": "passage", "id": "x", "title": "", "text": ""}',
            "does not contain the passage 'p1'",
        ),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, at, line, complaint):
    recorded().write(tmp_path / "f", FACTS)
    lines = (tmp_path / "f").read_text().splitlines()
    lines[at] = line
    (tmp_path / "f").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=complaint):
        read_questions(tmp_path / "f")


def test_an_answer_is_measured_from_0_to_1_and_systems_agree(tmp_path):
    recorded().write(tmp_path / "f", FACTS)
    text = (tmp_path / "f").read_text()
    for old, new, complaint in (
        ('"em":0.0', '"em":7', "7 is not a number from 0 to 1"),
        ('"em":0.0', '"em":NaN', "nan is not a number"),
        ('"no_retrieval"', '"other"', "do not all have the same systems"),
    ):
        (tmp_path / "f").write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=complaint):
            read_questions(tmp_path / "f")
    (tmp_path / "f").write_text(text.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="contains no question"):
        read_questions(tmp_path / "f")


def packed(text: str) -> dict:
    (data,) = re.findall(r'id="question-data">([A-Za-z0-9+/=]*)</script>', text)
    return json.loads(gzip.decompress(base64.b64decode(data)))


def test_a_page_with_questions_is_whole_and_nothing_of_them_is_markup():
    text = render_report([run(questions=few_questions())])
    page = Page(text)
    assert EVIL not in text
    assert "onerror" not in text
    assert "://" not in text
    assert [tag.get("type") for tag in page.all("script")] == ["text/plain", None]
    assert not page.all("img")
    (policy,) = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "To look through the single questions, allow this page to run" in text
    found = packed(text)
    assert found["passages"][1] == ["b", EVIL, f"\u2028text {EVIL} of the second"]
    (one,) = found["runs"]
    assert one["systems"] == ["retriever_order", "trained"]
    assert one["questions"][3]["gold"] == [1, EVIL]
    assert one["questions"][0]["answers"][0]["picked"] == [1, 0]
    assert "</script" not in SCRIPT


def test_passages_of_several_runs_stand_in_the_page_once():
    other = few_questions()
    other = replace(other, passages={**other.passages, "a": ("First", "another corpus")})
    runs = [run("x", questions=few_questions()), run("y", questions=other)]
    found = packed(render_report(runs))
    assert [passage[0] for passage in found["passages"]] == ["a", "b", "a"]
    assert [r["questions"][0]["retrieved"]["retriever"] for r in found["runs"]] == [[0, 1], [2, 1]]


def test_two_thousand_questions_make_a_small_page():
    text = render_report([run(questions=many_questions(2000))])
    assert len(text) - len(render_report([run()])) < 100_000


def test_runs_without_kept_questions_are_named():
    page = Page(render_report([run("old"), run("new", questions=few_questions())]))
    assert "There are no single questions to look through for old: its evaluation" in page.text
    assert "single questions" not in render_report([run(finished=False)])
    alone = render_report([run("<old>")])
    assert "through for &lt;old&gt;" in alone
    assert "<script" not in alone
    assert evaluation()["bundle_step"] == 4


def test_an_evaluation_keeps_all_systems_with_what_they_picked_from(tmp_path):
    """The oracle too: of "paris", "wrong" and so on it picks what answers best."""
    recorder = QuestionRecorder(1)
    names = ("no_retrieval", "oracle", "trained")
    config = RunConfig(
        environment=EnvironmentConfig(num_selected=1),
        evaluation=EvaluationConfig(systems=names),
    )
    answering = open_reward(config, ReadingGenerator(), WordPrompts())
    policy = PlackettLucePolicy(LastFirst(), 1)
    kept = evaluate(config, policy, three_questions(), answering, keep=recorder.keep)
    recorder.write(tmp_path / "f", FACTS)
    found = read_questions(tmp_path / "f")
    assert set(found.systems) == set(names)
    assert found.questions[0].retrieved == {"retriever": ("p0-0", "p0-1", "p0-2")}
    best = [question.systems["oracle"] for question in found.questions]
    assert [(given.picked, given.answer) for given in best] == [
        (("p0-1",), "paris"),
        (("p1-0",), "lima"),
        (("p2-2",), "blue"),
    ]
    last = [question.systems["trained"].picked for question in found.questions]
    assert last == [("p0-2",), ("p1-2",), ("p2-2",)]
    for name in names:
        means = [np.mean([getattr(q.systems[name], m) for q in found.questions]) for m in MEASURES]
        summary = kept.systems[name]
        assert means == pytest.approx([summary.em, summary.f1, summary.accuracy])
