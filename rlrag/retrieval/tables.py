"""Candidate tables of question sets: computed once and cached on disk.

The file is `cache_dir/candidates/<key>.npz` with rows, scores and question vectors. Its key covers
the questions, the retrievers and the number of candidates.

Shape letters: Q questions, B questions of a chunk, N candidates, C retriever scores, D vector
length.
"""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import DataError, IndexMismatchError
from rlrag.files.text import hidden_beside
from rlrag.records import Question
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.manifest import cannot_write, digest

logger = logging.getLogger(__name__)

_CHUNK_QUESTIONS = 256
_QUESTIONS_IN = "float32"  # files that earlier versions left hold vectors of other formats
_LOG_EVERY_S = 10.0


def candidate_table(
    questions: tuple[Question, ...],
    questions_hash: str,
    corpus: Corpus,
    retrievers: RetrieverSet,
    config: RetrievalConfig,
    cache_dir: Path,
) -> CandidateTable:
    """The best `config.num_candidates` passages of every question, in the retriever's order.

    Column 0 of the scores is the ranking score; `CandidateTable.score_names` names them all.

    Raises:
        ConfigError: when the corpus has fewer passages than candidates are asked.
        DataError: when there are no questions.
        IndexMismatchError: when the file on disk is damaged.
    """
    if not questions:
        raise DataError("the question set is empty; give at least one question")
    # A sample of a question file carries that file's hash, hence the texts themselves as well.
    key = digest(
        [
            questions_hash,
            digest([question.question for question in questions]),
            retrievers.manifest_hash,
            _QUESTIONS_IN,
            config.num_candidates,
        ]
    )
    path = cache_dir / "candidates" / f"{key}.npz"
    if path.exists():
        arrays = _load(path)
    else:
        arrays = _compute(questions, retrievers, config.num_candidates)
        _save(path, arrays)
    return _table(questions, corpus, retrievers, arrays)


def search_table(
    questions: tuple[Question, ...],
    corpus: Corpus,
    retrievers: RetrieverSet,
    num_candidates: int,
) -> CandidateTable:
    """`candidate_table` without a file: for questions that are asked once.

    Raises:
        ConfigError: when the corpus has fewer passages than candidates are asked.
    """
    arrays = _compute(questions, retrievers, num_candidates)
    return _table(questions, corpus, retrievers, arrays)


def _table(
    questions: tuple[Question, ...],
    corpus: Corpus,
    retrievers: RetrieverSet,
    arrays: tuple[np.ndarray, ...],
) -> CandidateTable:
    rows_QN, scores_QNC, question_vectors_QD = arrays
    warn_of_unmatched(scores_QNC, retrievers.score_names[0])
    return CandidateTable(
        questions=questions,
        corpus=corpus,
        rows_QN=rows_QN,
        scores_QNC=scores_QNC,
        score_names=retrievers.score_names,
        question_vectors_QD=question_vectors_QD,
        passage_vectors_PD=retrievers.passage_vectors,
    )


def retrieve(
    questions: Sequence[str], retrievers: RetrieverSet, num_candidates: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates of B questions: rows (B, N), scores (B, N, C), question vectors (B, D).

    Raises:
        ConfigError: when the corpus has fewer passages than candidates are asked.
    """
    hits = retrievers.primary.search(questions, num_candidates)
    others = [
        retrievers.components[name].scores(questions, hits.rows_BK)
        for name in retrievers.score_names[1:]
    ]
    scores_BNC = np.stack([hits.scores_BK, *others], axis=-1)
    return hits.rows_BK, scores_BNC, retrievers.question_vectors(questions)


def warn_of_unmatched(scores_NC: Iterable[np.ndarray], retriever: str) -> None:
    """Log how many questions match no passage: all their ranking scores are zero.

    Args:
        scores_NC: Scores of each question's candidates; those of the ranking are the first column.
        retriever: What ranked them.
    """
    matched = [bool(scores[:, 0].any()) for scores in scores_NC]
    if not all(matched):
        logger.warning(
            "%d of %d questions match no passage: %s scores all 0, so their candidates are merely "
            "the first of the corpus; check that questions and corpus are of one language, or use "
            "retrieval.kind dense or hybrid",
            matched.count(False),
            len(matched),
            retriever,
        )


def _compute(
    questions: tuple[Question, ...], retrievers: RetrieverSet, num_candidates: int
) -> tuple[np.ndarray, ...]:
    parts: list[tuple[np.ndarray, ...]] = []
    last_logged = time.monotonic()
    for start in range(0, len(questions), _CHUNK_QUESTIONS):
        texts = [question.question for question in questions[start : start + _CHUNK_QUESTIONS]]
        parts.append(retrieve(texts, retrievers, num_candidates))
        if time.monotonic() - last_logged >= _LOG_EVERY_S:
            last_logged = time.monotonic()
            logger.info("retrieved for %d of %d questions", start + len(texts), len(questions))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _save(path: Path, arrays: tuple[np.ndarray, ...]) -> None:
    temporary = hidden_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            rows_QN, scores_QNC, question_vectors_QD = arrays
            np.savez(
                stream,
                rows_QN=rows_QN,
                scores_QNC=scores_QNC,
                question_vectors_QD=question_vectors_QD,
            )
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it has become the file, or its folder could not be made
            temporary.unlink()


def _load(path: Path) -> tuple[np.ndarray, ...]:
    try:
        with np.load(path) as stored:
            return stored["rows_QN"], stored["scores_QNC"], stored["question_vectors_QD"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise IndexMismatchError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run again, the "
            "candidates are then retrieved anew"
        ) from error
