"""The built-in candidates: a table that any retriever could have made, and always the same."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import envs
from rlrag.environment import sample_task
from rlrag.environment.sample_task import (
    NUM_CANDIDATES,
    VECTOR_SIZE,
    hashed_vectors,
    overlap_scores,
    sample_candidates,
)


def test_the_table_has_consistent_shapes():
    table = sample_candidates()
    num_questions = len(table)
    assert num_questions > 0
    assert table.rows_QN.shape == (num_questions, NUM_CANDIDATES)
    assert table.scores_QNC.shape == (num_questions, NUM_CANDIDATES, len(table.score_names))
    assert table.question_vectors_QD.shape == (num_questions, VECTOR_SIZE)
    assert table.passage_vectors_PD.shape == (len(table.corpus), VECTOR_SIZE)
    assert table.batch([0, 1]).passage_vectors_BND.shape == (2, NUM_CANDIDATES, VECTOR_SIZE)


def test_candidates_are_distinct_and_in_order_of_score():
    table = sample_candidates()
    assert (np.diff(table.scores_QNC[:, :, 0], axis=1) <= 0).all()
    assert all(len(set(rows)) == NUM_CANDIDATES for rows in table.rows_QN.tolist())


def test_most_questions_have_their_answer_among_the_candidates():
    table = sample_candidates()
    found = [
        any(
            answer.lower() in passage.contents.lower()
            for passage in table.passages(row)
            for answer in question.golden_answers
        )
        for row, question in enumerate(table.questions)
    ]
    assert sum(found) > 0.8 * len(found)


def test_overlap_weights_rare_words_by_hand():
    # P = 2: "the" is in both passages, "cat" in one, "dog" in none.
    idf_the, idf_cat, idf_dog = (math.log(1 + 2 / (1 + count)) for count in (2, 1, 0))
    scores = overlap_scores([["the", "cat", "dog"]], [["the", "cat"], ["the", "the"]])
    total = idf_the + idf_cat + idf_dog
    np.testing.assert_allclose(scores, [[(idf_the + idf_cat) / total, idf_the / total]])


def test_case_makes_no_difference(monkeypatch):
    table = sample_candidates()
    questions = tuple(replace(q, question=q.question.upper()) for q in table.questions)
    monkeypatch.setattr(sample_task, "sample_questions", lambda: questions)
    loud = sample_candidates.__wrapped__()  # not the one that the process keeps
    assert np.array_equal(loud.rows_QN, table.rows_QN)
    assert np.array_equal(loud.scores_QNC, table.scores_QNC)
    assert np.array_equal(loud.question_vectors_QD, table.question_vectors_QD)


def test_overlap_of_a_question_without_words_is_zero():
    assert overlap_scores([[]], [["a"], []]).tolist() == [[0.0, 0.0]]


def test_vectors_have_unit_length_or_are_zero():
    vectors = hashed_vectors([["a", "b", "b"], []])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1.0, 0.0], rtol=1e-6)
    # Counts 1 and 2 in two buckets: 1/sqrt(5) and 2/sqrt(5).
    np.testing.assert_allclose(
        sorted(vectors[0][vectors[0] > 0]), [1 / math.sqrt(5), 2 / math.sqrt(5)], rtol=1e-6
    )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_builds_the_same_table(hash_seed):
    program = (
        "import hashlib; from rlrag.environment.sample_task import sample_candidates as s; t = s();"
        "h = hashlib.sha256();"
        "[h.update(a.tobytes()) for a in (t.rows_QN, t.scores_QNC, t.question_vectors_QD,"
        " t.passage_vectors_PD)]; print(h.hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(envs.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", hash_seed)
    }
    assert len(outputs) == 1
