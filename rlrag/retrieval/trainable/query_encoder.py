"""A trainable question encoder over a fixed passage index.

Training changes the questions' vectors alone: the passages keep their encoder and their index. What
is saved has an encoder for each, `question/` and `passage/`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.errors import ConfigError
from rlrag.models.directories import resolve_model
from rlrag.retrieval.build import open_vocabulary_encoder
from rlrag.retrieval.dense.search import DenseRetriever
from rlrag.retrieval.protocol import Hits, Retriever
from rlrag.retrieval.role_directories import role_directory
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.retrieval.vocabulary.semi_parametric import SemiParametricRetriever


class StaticIndex(Protocol):
    """Vectors of all passages, which do not change."""

    def search_vectors(self, vectors_BD: np.ndarray, k: int) -> Hits:
        """The best `k` rows for each vector."""
        ...

    def vectors(self, rows_N: np.ndarray) -> np.ndarray:
        """The vectors of given rows, float32 of shape (N, D)."""
        ...


def open_query_encoder(
    retrieval: RetrievalConfig, cache_dir: Path
) -> TrainableTextEncoder | VocabularyEncoder:
    """The untrained encoder of questions of the retriever that `retrieval.kind` names.

    Raises:
        ConfigError: when that retriever has no encoder to train.
    """
    model_dir = role_directory(_saved(retrieval, cache_dir), "question")
    if retrieval.kind == "dense":
        return TrainableTextEncoder(model_dir, retrieval.encoder_max_tokens)
    own = retrieval.model_copy(update={"vocabulary_encoder": str(model_dir)})
    return open_vocabulary_encoder(own, cache_dir, tied=True)


def save_with_passages(
    encoder: TrainableTextEncoder | VocabularyEncoder,
    retrieval: RetrievalConfig,
    cache_dir: Path,
    directory: Path,
) -> None:
    """Write a trained encoder of questions beside that of the passages, which stays as it was.

    Raises:
        FileExistsError: when the directory exists.
    """
    directory.mkdir(parents=True)
    encoder.save_pretrained(directory / "question")
    passages = role_directory(_saved(retrieval, cache_dir), "passage")
    shutil.copytree(passages, directory / "passage")


def static_index(retriever: Retriever) -> StaticIndex:
    """What a retriever searches by the vectors of questions.

    Raises:
        ConfigError: when it has no index that is searched by vectors.
    """
    if isinstance(retriever, SemiParametricRetriever):
        return retriever.passages
    if isinstance(retriever, DenseRetriever):
        return retriever
    raise ConfigError(
        f"the retriever {retriever.name!r} has no index that is searched by vectors; use "
        "retrieval.kind dense or semi_parametric"
    )


def _saved(retrieval: RetrievalConfig, cache_dir: Path) -> Path:
    name = {"dense": retrieval.encoder, "semi_parametric": retrieval.vocabulary_encoder}.get(
        retrieval.kind
    )
    if name is None:
        raise ConfigError(
            f"retrieval.kind {retrieval.kind!r} has no encoder to train; use dense or "
            "semi_parametric"
        )
    return resolve_model(name, cache_dir)
