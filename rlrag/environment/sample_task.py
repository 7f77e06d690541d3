"""A small built-in selection task for examples and tests.

No model is involved: candidates are ranked by the words that they share with the question, and a
vector counts words in hashed buckets. Everything is deterministic and takes milliseconds.
Shape letters: Q questions, P passages, W distinct words, N candidates, D vector length.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Iterable

import numpy as np

from rlrag.data.sample import sample_corpus, sample_questions
from rlrag.retrieval.candidates import CandidateTable

NUM_CANDIDATES = 8
VECTOR_SIZE = 32


@functools.cache
def sample_candidates() -> CandidateTable:
    """The candidates of the built-in questions; built once a process."""
    corpus, questions = sample_corpus(), sample_questions()
    passage_words = [_words(passage.contents) for passage in corpus]
    question_words = [_words(question.question) for question in questions]
    scores_QP = overlap_scores(question_words, passage_words)
    # A stable sort: passages with equal scores keep the order of the corpus.
    rows_QN = np.argsort(-scores_QP, axis=1, kind="stable")[:, :NUM_CANDIDATES]
    scores_QN = np.take_along_axis(scores_QP, rows_QN, axis=1)
    return CandidateTable(
        questions=questions,
        corpus=corpus,
        rows_QN=rows_QN,
        scores_QNC=scores_QN[:, :, None].astype(np.float32),
        score_names=("overlap",),
        question_vectors_QD=hashed_vectors(question_words),
        passage_vectors_PD=hashed_vectors(passage_words),
    )


def overlap_scores(question_words: list[list[str]], passage_words: list[list[str]]) -> np.ndarray:
    """Share of each question's distinct words that each passage has, rare words counting more.

    score = sum of idf over shared words / sum of idf over the question's words, float64 [Q, P] in
    [0, 1], with idf(w) = log(1 + P / (1 + passages with w)), in nats. A question without words
    scores 0 everywhere.

    Example:
        >>> overlap_scores([["a", "b"]], [["a", "b"], ["c"]]).tolist()
        [[1.0, 0.0]]
    """
    index = {word: i for i, word in enumerate(sorted({w for row in question_words for w in row}))}
    has_QW = _presence(question_words, index)
    has_PW = _presence(passage_words, index)
    idf_W = np.log1p(len(passage_words) / (1.0 + has_PW.sum(axis=0)))
    total_Q = has_QW @ idf_W
    return (has_QW * idf_W) @ has_PW.T / np.where(total_Q > 0, total_Q, 1.0)[:, None]


def hashed_vectors(texts: list[list[str]]) -> np.ndarray:
    """Unit vectors of word counts in `VECTOR_SIZE` buckets, float32; zero for no words.

    The bucket is CRC-32 of the word, which, unlike Python's `hash`, is the same in every process.

    Example:
        >>> hashed_vectors([["paris", "paris"]]).max().item()
        1.0
    """
    vectors = np.zeros((len(texts), VECTOR_SIZE), dtype=np.float64)
    for row, words in enumerate(texts):
        for word in words:
            vectors[row, zlib.crc32(word.encode()) % VECTOR_SIZE] += 1.0
        vectors[row] /= math.sqrt(float(vectors[row] @ vectors[row])) or 1.0
    return vectors.astype(np.float32)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _presence(texts: Iterable[list[str]], index: dict[str, int]) -> np.ndarray:
    rows = [[index[word] for word in set(words) if word in index] for words in texts]
    presence = np.zeros((len(rows), len(index)), dtype=np.float64)
    for row, columns in enumerate(rows):
        presence[row, columns] = 1.0
    return presence
