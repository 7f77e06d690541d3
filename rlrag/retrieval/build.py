"""A corpus and a configuration to retrievers that are ready to search.

What is missing under `cache_dir/indexes` is built, what is there is loaded, and what does not
belong is refused. Each part lies in a directory of its own (`bm25-*`, `vectors-*`, `hnsw-*`,
`ivfpq-*`, `vocabulary_vectors-*`), named by a hash of what it was made from, so that a change of
one parameter builds one part anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import ConfigError
from rlrag.models import resolve_device, resolve_model
from rlrag.retrieval.bm25 import open_bm25
from rlrag.retrieval.dense import DenseRetriever, check_index_fits, open_index
from rlrag.retrieval.encoder import Encoder, TextEncoder
from rlrag.retrieval.hybrid import HybridRetriever
from rlrag.retrieval.manifest import IndexKind, Manifest, digest
from rlrag.retrieval.protocol import Retriever, check_num_hits
from rlrag.retrieval.vectors import open_vectors

if TYPE_CHECKING:
    from rlrag.retrieval.vocabulary_encoder import VocabularyEncoder


@dataclass(frozen=True)
class RetrieverSet:
    """The retriever that ranks, those whose scores are features, and the vectors beneath.

    `passage_vectors` has shape (P, D), or (P, 0) where there is no encoder. `manifest_hash` is
    equal exactly when corpus, indexes and search parameters are.
    """

    primary: Retriever
    components: Mapping[str, Retriever]
    encoder: Encoder | None
    passage_vectors: np.ndarray
    manifest_hash: str

    @property
    def score_names(self) -> tuple[str, ...]:
        """Columns of scores: the ranking first, then every component that is not the ranking."""
        primary = self.primary.name
        return (primary, *(name for name in self.components if name != primary))

    def question_vectors(self, questions: Sequence[str]) -> np.ndarray:
        """Vectors of the questions, shape (B, D), or (B, 0) where there is no encoder."""
        dense = self.components.get("dense")
        if isinstance(dense, DenseRetriever):
            return dense.question_vectors(questions)
        return np.zeros((len(questions), 0), dtype=np.float32)


def open_retrievers(
    corpus: Corpus,
    config: RetrievalConfig,
    cache_dir: Path,
    encoder: Encoder | None = None,
    vocabulary_encoder: VocabularyEncoder | None = None,
) -> RetrieverSet:
    """Build or load everything that `config` asks for.

    `bm25` and `hybrid` have a BM25 component, the others have one with `bm25_scores`; a configured
    encoder always gives a dense one, since its vectors and scores are features of the selection
    policy. An `encoder` that is given takes the place of the one that `config.encoder` names, and
    a `vocabulary_encoder` that of `config.vocabulary_encoder`; its weights must not change as long
    as the retrievers are used.

    Raises:
        ConfigError: when the corpus has fewer passages than `num_candidates`, or too few vectors
            for the lists of an IVF-PQ index, or an encoder was given that nothing uses.
        IndexMismatchError: when a directory on disk belongs to something else or is damaged.
    """
    check_num_hits(config.num_candidates, len(corpus))
    indexes_dir = cache_dir / "indexes"
    components: dict[str, Retriever] = {}
    manifests: list[Manifest] = []
    if config.kind in ("bm25", "hybrid") or config.bm25_scores:
        manifest = _manifest("bm25", corpus, parameters={"k1": config.bm25_k1, "b": config.bm25_b})
        components["bm25"] = open_bm25(corpus, indexes_dir / manifest.directory_name, manifest)
        manifests.append(manifest)
    vectors_PD: np.ndarray = np.zeros((len(corpus), 0), dtype=np.float32)
    if config.encoder is not None:
        encoder = encoder or _configured_encoder(config, config.encoder, cache_dir)
        manifest = _manifest("vectors", corpus, config.encoder, encoder)
        vectors_dir = indexes_dir / manifest.directory_name
        # Before hours of encoding. An encoder is loaded by asking its size, hence only then.
        if config.index == "ivfpq" and not vectors_dir.exists():
            check_index_fits(config, len(corpus), encoder.size)
        vectors_PD = open_vectors(corpus, encoder, vectors_dir, manifest)
        manifests.append(manifest)
        index = None
        if config.index != "flat":
            manifest = _manifest(
                config.index, corpus, config.encoder, encoder, _index_parameters(config)
            )
            index = open_index(vectors_PD, config, indexes_dir / manifest.directory_name, manifest)
            manifests.append(manifest)
        components["dense"] = DenseRetriever(encoder, vectors_PD, config, index)
    elif encoder is not None:
        raise ConfigError("an encoder was given, but retrieval.encoder is unset; set it")
    if config.kind == "semi_parametric":
        components["semi_parametric"], manifest = _semi_parametric(
            corpus, config, cache_dir, vocabulary_encoder
        )
        manifests.append(manifest)
    elif vocabulary_encoder is not None:
        raise ConfigError(
            f"a vocabulary encoder was given, but retrieval.kind is {config.kind!r}; set it to "
            "semi_parametric"
        )
    return RetrieverSet(
        primary=_primary(config, components, len(corpus)),
        components=components,
        encoder=encoder,
        passage_vectors=vectors_PD,
        manifest_hash=digest(
            [[manifest.compared for manifest in manifests], _search_parameters(config)]
        ),
    )


def open_vocabulary_encoder(
    config: RetrievalConfig, cache_dir: Path, tied: bool | None = None
) -> VocabularyEncoder:
    """Load the encoder that `config.vocabulary_encoder` names.

    Args:
        config: Names the encoder and how it is used.
        cache_dir: Where a built-in model is unpacked.
        tied: One encoder for questions and passages, or one each; unset takes it as it was saved.

    Raises:
        ConfigError: when it is no masked language model with its own head and tokenizer.
        ModelNotFoundError: when there is no such model.
    """
    from rlrag.retrieval.vocabulary_encoder import VocabularyEncoder, has_encoder_each

    model_dir = resolve_model(config.vocabulary_encoder, cache_dir)
    encoder = VocabularyEncoder(
        model_dir,
        config.encoder_max_tokens,
        config.vocabulary_top_k,
        config.vocabulary_head,
        tied=not has_encoder_each(model_dir) if tied is None else tied,
        batch_size=config.encode_batch_size,
    )
    return encoder.to(resolve_device("auto"))


def _semi_parametric(
    corpus: Corpus,
    config: RetrievalConfig,
    cache_dir: Path,
    encoder: VocabularyEncoder | None,
) -> tuple[Retriever, Manifest]:
    from rlrag.retrieval.semi_parametric import (
        SemiParametricRetriever,
        open_vocabulary_vectors,
        vocabulary_manifest,
    )

    encoder = encoder or open_vocabulary_encoder(config, cache_dir)
    manifest = vocabulary_manifest(corpus, encoder, config.vocabulary_encoder)
    directory = cache_dir / "indexes" / manifest.directory_name
    passages = open_vocabulary_vectors(corpus, encoder, directory, manifest)
    return SemiParametricRetriever(encoder, passages), manifest


def _configured_encoder(config: RetrievalConfig, name: str, cache_dir: Path) -> TextEncoder:
    return TextEncoder(
        resolve_model(name, cache_dir),
        config.encoder_dtype,
        config.encoder_max_tokens,
        config.encode_batch_size,
    )


def _primary(
    config: RetrievalConfig, components: Mapping[str, Retriever], num_passages: int
) -> Retriever:
    if config.kind == "hybrid":
        return HybridRetriever(components["bm25"], components["dense"], num_passages, config.rrf_k)
    return components[config.kind]


def _manifest(
    kind: IndexKind,
    corpus: Corpus,
    encoder_name: str | None = None,
    encoder: Encoder | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Manifest:
    return Manifest(
        kind=kind,
        corpus_hash=corpus.content_hash,
        num_passages=len(corpus),
        encoder=encoder_name,
        encoder_identity=encoder.identity if encoder else None,
        parameters=parameters or {},
    )


def _index_parameters(config: RetrievalConfig) -> dict[str, int]:
    if config.index == "hnsw":
        return {"links": config.hnsw_links}
    return {"lists": config.ivf_lists, "bytes": config.pq_bytes}


def _search_parameters(config: RetrievalConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"kind": config.kind}
    if config.kind == "hybrid":
        parameters["rrf_k"] = config.rrf_k
    if config.encoder is not None and config.index == "hnsw":
        parameters["hnsw_search_depth"] = config.hnsw_search_depth
    if config.encoder is not None and config.index == "ivfpq":
        parameters["ivf_probes"] = config.ivf_probes
    return parameters
