"""Candidate tables of question sets, computed once and cached on disk.

The file is `cache_dir/candidates/<key>.npz` with rows, scores and question vectors, and with the
passages that the retriever brought, which are in no corpus. Its key covers the questions, the
retrievers and the number of candidates.

Shape letters: Q questions, B questions of a chunk, N candidates, C retriever scores, D vector
length, X passages that were brought.
"""

from __future__ import annotations

import logging
import os
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import Corpus, ExtendedCorpus, decode_passage, encode_passage
from rlrag.errors import ConfigError, DataError, IndexMismatchError, RetrievalError
from rlrag.files.text import hidden_beside
from rlrag.records import Passage, Question
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.candidates import CandidateTable, vectors_at
from rlrag.retrieval.dense.search import DenseRetriever
from rlrag.retrieval.manifest import cannot_write, digest
from rlrag.retrieval.protocol import Hits

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
        RetrievalError: when the retriever brought one id with two texts.
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
        found = _load(path)
    else:
        found = _compute(questions, len(corpus), retrievers, config.num_candidates)
        _check_ids(found.brought, retrievers.primary.name)
        _save(path, found)
    return _table(questions, corpus, retrievers, found)


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
    found = _compute(questions, len(corpus), retrievers, num_candidates)
    return _table(questions, corpus, retrievers, found)


@dataclass(frozen=True)
class FoundRows:
    """Candidates of B questions, as rows that go on from a corpus to what was brought.

    `brought_vectors_XD` has a vector for each of the passages `brought`.
    """

    rows_BN: np.ndarray
    scores_BNC: np.ndarray
    question_vectors_BD: np.ndarray
    brought: tuple[Passage, ...]
    brought_vectors_XD: np.ndarray


def _table(
    questions: tuple[Question, ...], corpus: Corpus, retrievers: RetrieverSet, found: FoundRows
) -> CandidateTable:
    warn_of_unmatched(found.scores_BNC, retrievers.score_names[0])
    return CandidateTable(
        questions=questions,
        corpus=ExtendedCorpus(corpus, found.brought) if found.brought else corpus,
        rows_QN=found.rows_BN,
        scores_QNC=found.scores_BNC,
        score_names=retrievers.score_names,
        question_vectors_QD=found.question_vectors_BD,
        passage_vectors_PD=retrievers.passage_vectors,
        brought_vectors_XD=found.brought_vectors_XD,
    )


def retrieve(questions: Sequence[str], retrievers: RetrieverSet, num_candidates: int) -> FoundRows:
    """The best candidates of B questions, with the scores of every retriever.

    Raises:
        ConfigError: when the corpus has fewer passages than candidates are asked, or a retriever
            has no scores of passages that another one brought.
    """
    hits = retrievers.primary.search(questions, num_candidates)
    brought_XD = retrievers.vectors_of(hits.brought)
    others = [
        _scores(name, questions, hits, retrievers, brought_XD)
        for name in retrievers.score_names[1:]
    ]
    return FoundRows(
        rows_BN=hits.rows_BK,
        scores_BNC=np.stack([hits.scores_BK, *others], axis=-1),
        question_vectors_BD=retrievers.question_vectors(questions),
        brought=hits.brought,
        brought_vectors_XD=brought_XD,
    )


def _scores(
    name: str,
    questions: Sequence[str],
    hits: Hits,
    retrievers: RetrieverSet,
    brought_XD: np.ndarray,
) -> np.ndarray:
    """Scores of one component for what another one found, shape (B, N)."""
    component = retrievers.components[name]
    if not hits.brought:
        return component.scores(questions, hits.rows_BK)
    if not isinstance(component, DenseRetriever):
        raise ConfigError(
            f"retriever {retrievers.primary.name!r} returned passage {hits.brought[0].id!r}, "
            f"which is not in the corpus and has no {name} score; set retrieval.bm25_scores False"
        )
    vectors_BND = vectors_at(hits.rows_BK, retrievers.passage_vectors, brought_XD)
    return component.scores_of(questions, vectors_BND)


def warn_of_unmatched(scores_NC: Iterable[np.ndarray], retriever: str) -> None:
    """Log how many questions match no passage: all their ranking scores are zero.

    Args:
        scores_NC: Scores of each question's candidates; those of the ranking are the first column.
        retriever: What ranked them.
    """
    matched = [bool(scores[:, 0].any()) for scores in scores_NC]
    if not all(matched):
        logger.warning(
            "%d of %d questions match no passage: %s scores all passages 0, so their candidates "
            "are just the first of the corpus; check that questions and corpus have the same "
            "language, or use retrieval.kind dense or hybrid",
            matched.count(False),
            len(matched),
            retriever,
        )


def _compute(
    questions: tuple[Question, ...],
    num_passages: int,
    retrievers: RetrieverSet,
    num_candidates: int,
) -> FoundRows:
    parts: list[FoundRows] = []
    last_logged = time.monotonic()
    for start in range(0, len(questions), _CHUNK_QUESTIONS):
        texts = [question.question for question in questions[start : start + _CHUNK_QUESTIONS]]
        parts.append(retrieve(texts, retrievers, num_candidates))
        if time.monotonic() - last_logged >= _LOG_EVERY_S:
            last_logged = time.monotonic()
            logger.info("retrieved for %d of %d questions", start + len(texts), len(questions))
    return _joined(parts, num_passages)


def _check_ids(brought: Sequence[Passage], retriever: str) -> None:
    """Refuse an id with two texts: a run's records name passages by their ids."""
    texts: dict[str, Passage] = {}
    for passage in brought:
        other = texts.setdefault(passage.id, passage)
        if other != passage:
            raise RetrievalError(
                f"retriever {retriever!r} returned passage {passage.id!r} with different texts "
                f"for two questions ({other.contents[:40]!r} and {passage.contents[:40]!r}); "
                "give each text a unique id"
            )


def _joined(parts: Sequence[FoundRows], num_passages: int) -> FoundRows:
    """What was found for several chunks of questions; equal passages that they brought are one."""
    row_of: dict[Passage, int] = {}
    vectors: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for part in parts:
        for passage, vector_D in zip(part.brought, part.brought_vectors_XD, strict=True):
            if passage not in row_of:
                row_of[passage] = num_passages + len(row_of)
                vectors.append(vector_D)
        behind_X = np.array([row_of[passage] for passage in part.brought], dtype=np.int64)
        rows_BN = part.rows_BN.copy()
        is_brought = rows_BN >= num_passages
        rows_BN[is_brought] = behind_X[rows_BN[is_brought] - num_passages]
        rows.append(rows_BN)
    nothing_XD = parts[0].brought_vectors_XD[:0]
    return FoundRows(
        rows_BN=np.concatenate(rows),
        scores_BNC=np.concatenate([part.scores_BNC for part in parts]),
        question_vectors_BD=np.concatenate([part.question_vectors_BD for part in parts]),
        brought=tuple(row_of),
        brought_vectors_XD=np.stack(vectors) if vectors else nothing_XD,
    )


def _save(path: Path, found: FoundRows) -> None:
    arrays: dict[str, Any] = {
        "rows_QN": found.rows_BN,
        "scores_QNC": found.scores_BNC,
        "question_vectors_QD": found.question_vectors_BD,
    }
    if found.brought:
        lines = b"".join(map(encode_passage, found.brought))
        arrays["brought"] = np.frombuffer(lines, dtype=np.uint8)
        arrays["brought_vectors_XD"] = found.brought_vectors_XD
    temporary = hidden_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # it has become the file, or its folder could not be made
            temporary.unlink()


def _load(path: Path) -> FoundRows:
    try:
        with np.load(path) as stored:
            brought: tuple[Passage, ...] = ()
            brought_vectors_XD = np.zeros((0, 0), dtype=np.float32)
            if "brought" in stored:
                lines = stored["brought"].tobytes().split(b"\n")[:-1]
                brought = tuple(map(decode_passage, lines))
                brought_vectors_XD = stored["brought_vectors_XD"]
            return FoundRows(
                stored["rows_QN"],
                stored["scores_QNC"],
                stored["question_vectors_QD"],
                brought,
                brought_vectors_XD,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise IndexMismatchError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run again to "
            "retrieve the candidates again"
        ) from error
