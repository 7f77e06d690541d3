"""A TREC run file: what is read of it, in which order, and what is refused."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from rlrag.data.ranking_run import read_ranking_run
from rlrag.errors import DataError

WANTED = {"q1": ("a", "b", "c"), "q2": ("d", "e")}
LINES = (
    "q1 Q0 b 1 3.5 tag",
    "q9 Q0 a 1 9.0 tag",  # a question that nobody asks for
    "q1\tQ0\tz\t2\t3.0\ttag",  # a passage that nobody asks for
    "  q1 Q0 a   3 -2e0 tag ",
    "",
    "q2 Q0 e 0 7 tag",
    "q1 Q0 c 4 -1.5 tag",
)


def save(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def test_the_wanted_passages_come_by_score(tmp_path):
    """-1.5 is more than -2, whatever the ranks say."""
    run = read_ranking_run(save(tmp_path / "run.txt", *LINES), WANTED)
    assert run == {"q1": ("b", "c", "a"), "q2": ("e",)}


def test_gzip_is_known_by_its_bytes(tmp_path):
    plain = save(tmp_path / "run.txt", *LINES)
    for name in ("run.gz", "run.trec"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        assert read_ranking_run(tmp_path / name, WANTED) == read_ranking_run(plain, WANTED)


def test_rank_breaks_ties_and_then_the_line(tmp_path):
    run = save(
        tmp_path / "run.txt", "q1 Q0 a 3 1 t", "q1 Q0 b 2 1.0 t", "q2 Q0 e 5 0 t", "q2 Q0 d 5 -0 t"
    )
    assert read_ranking_run(run, WANTED) == {"q1": ("b", "a"), "q2": ("e", "d")}


def test_lines_may_stand_in_any_order(tmp_path):
    lines = [f"q{q} Q0 p{n} {n} {1 / (n + 1)} tag" for q in range(5) for n in range(8)]
    wanted = {f"q{q}": {f"p{n}" for n in range(1, 7)} for q in range(5)}
    random.Random(0).shuffle(lines)
    run = read_ranking_run(save(tmp_path / "run.txt", *lines), wanted)
    assert run == {f"q{q}": tuple(f"p{n}" for n in range(1, 7)) for q in range(5)}


def test_trec_eval_sees_the_same_order(tmp_path):
    """The reciprocal rank of each passage in turn, by another program; scores without ties."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(1)
    scores = {f"p{n}": rng.uniform(-5, 5) for n in range(9)}
    ranks = rng.sample(range(9), 9)  # which trec_eval does not read
    lines = [
        f"q Q0 {passage} {rank} {score!r} t"
        for (passage, score), rank in zip(scores.items(), ranks, strict=True)
    ]
    found = read_ranking_run(save(tmp_path / "run.txt", *lines), {"q": scores.keys()})["q"]
    for place, passage in enumerate(found, start=1):
        judge = pytrec_eval.RelevanceEvaluator({"q": {passage: 1}}, {"recip_rank"})
        assert judge.evaluate({"q": scores})["q"]["recip_rank"] == pytest.approx(1 / place)


def test_a_question_without_wanted_passages_has_an_empty_order(tmp_path):
    run = save(tmp_path / "run.txt", "q1 Q0 z 1 1 t", "q2 Q0 d 1 1 t")
    assert read_ranking_run(run, WANTED) == {"q1": (), "q2": ("d",)}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("q1 Q0 a 1 1.0", "5 columns; expected six columns, 'query-id Q0 passage-id rank score"),
        ("q1 Q0 a b 1 1.0 tag", "7 columns"),
        ("q1 Q0 a first 1.0 tag", "rank 'first', score '1.0'; expected six columns"),
        ("q1 Q0 a 1.0 1.0 tag", "rank '1.0'"),
        ("q1 Q0 a 1 high tag", "score 'high'"),
        ("q9 Q0 a 1 nan tag", "score 'nan'"),
        ("q1 Q0 a 1 -inf tag", "score '-inf'"),
        ("q1 Q0 b 7 0.1 tag", "passage 'b' is ranked twice for question 'q1'"),
    ],
)
def test_a_bad_line_is_named_and_refused(tmp_path, line, words):
    path = save(tmp_path / "run.txt", "q1 Q0 b 1 3.5 tag", "", line)
    with pytest.raises(DataError) as caught:
        read_ranking_run(path, WANTED)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "has no lines; expected six columns"),
        (
            ("17 Q0 a 1 1 t",),
            "its first question is '17', but the first of the 2 questions of this run is 'q1'; "
            "give a ranking for the same questions",
        ),
        (
            ("q2 Q0 doc7 1 1 t", "q2 Q0 doc8 2 0 t"),
            "for question 'q2' it names 'doc7', where 'd' is wanted; give a ranking over the same",
        ),
    ],
)
def test_a_run_of_something_else_is_refused(tmp_path, lines, words):
    path = save(tmp_path / "run.txt", *lines)
    with pytest.raises(DataError) as caught:
        read_ranking_run(path, WANTED)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; check the path"):
        read_ranking_run(tmp_path / "run.txt", WANTED)
