"""Builds the encoder to train and the fixed first stage of its retrieval."""

from __future__ import annotations

from pathlib import Path

from rlrag.config import OpenRAGConfig, RetrievalConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import ConfigError
from rlrag.models.directories import resolve_model
from rlrag.retrieval.build import RetrieverSet, open_vocabulary_encoder
from rlrag.retrieval.dense.search import DenseRetriever
from rlrag.retrieval.protocol import Retriever
from rlrag.retrieval.role_directories import has_encoder_each
from rlrag.retrieval.trainable.late_parametric import (
    FirstStage,
    FrozenIndex,
    RetrieverProposals,
    VectorSearch,
)
from rlrag.retrieval.trainable.protocol import TrainableEncoder
from rlrag.retrieval.trainable.sentence_encoder import TrainableTextEncoder
from rlrag.retrieval.vocabulary.bag_of_tokens import open_bag_of_tokens
from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder
from rlrag.retrieval.vocabulary.semi_parametric import SemiParametricRetriever


def open_trainable_encoder(
    retrieval: RetrievalConfig, openrag: OpenRAGConfig, cache_dir: Path
) -> TrainableTextEncoder | VocabularyEncoder:
    """The untrained encoder of the retriever that `retrieval.kind` names.

    Raises:
        ConfigError: when that retriever has no encoder to train.
    """
    if retrieval.kind == "semi_parametric":
        return open_vocabulary_encoder(retrieval, cache_dir, openrag.tied)
    if retrieval.kind == "dense" and retrieval.encoder is not None:
        model_dir = resolve_model(retrieval.encoder, cache_dir)
        if has_encoder_each(model_dir):
            raise ConfigError(
                f"{model_dir} has separate encoders for questions and passages, but OpenRAG "
                "trains one dense encoder for both; use algorithm.name jsa, or another "
                "encoder"
            )
        return TrainableTextEncoder(model_dir, retrieval.encoder_max_tokens)
    raise ConfigError(
        f"retrieval.kind {retrieval.kind!r} has no encoder to train; use dense or semi_parametric"
    )


def open_first_stage(
    retrievers: RetrieverSet,
    corpus: Corpus,
    encoder: TrainableEncoder,
    openrag: OpenRAGConfig,
    cache_dir: Path,
) -> FirstStage:
    """What proposes passages while the encoder is trained; it never changes.

    Raises:
        ConfigError: when there is no such index.
    """
    if openrag.first_stage == "bm25":
        return RetrieverProposals(retrievers.components["bm25"])
    if openrag.first_stage == "frozen":
        return FrozenIndex(searched_index(retrievers.primary))
    if isinstance(encoder, VocabularyEncoder):
        return FrozenIndex(open_bag_of_tokens(corpus, encoder, cache_dir / "indexes"))
    raise ConfigError(
        "algorithm.first_stage 'bag_of_tokens' needs an encoder into a vocabulary; use "
        "retrieval.kind semi_parametric, or another first stage"
    )


def searched_index(retriever: Retriever) -> VectorSearch:
    """What a retriever with an encoder searches by vectors.

    Raises:
        ConfigError: when it has none.
    """
    if isinstance(retriever, SemiParametricRetriever):
        return retriever.passages
    if isinstance(retriever, DenseRetriever):
        return retriever
    raise ConfigError(
        f"the retriever {retriever.name!r} has no index that is searched by vectors; use "
        "retrieval.kind dense or semi_parametric"
    )
