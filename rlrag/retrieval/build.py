"""Builds the retrievers that a configuration describes, and their indexes.

What is missing under `cache_dir/indexes` is built, what is there is loaded, and what does not
belong is refused. Each part lies in a directory of its own (`bm25-*`, `vectors-*`, `hnsw-*`,
`ivfpq-*`, `vocabulary_vectors-*`), named by a hash of what it was made from, so that a change of
one parameter builds one part anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlrag import plugins
from rlrag.config import RetrievalConfig
from rlrag.data.corpus import Corpus
from rlrag.errors import ConfigError
from rlrag.models.directories import resolve_device, resolve_model
from rlrag.records import Passage
from rlrag.retrieval.bm25 import open_bm25
from rlrag.retrieval.cut_tokens import cut_share
from rlrag.retrieval.dense.encoder import Encoder, TextEncoder
from rlrag.retrieval.dense.index import (
    HNSW_LINKS,
    HNSW_SEARCH_DEPTH,
    IVF_PROBES,
    check_index_fits,
    ivfpq_parameters,
    open_index,
)
from rlrag.retrieval.dense.search import DenseRetriever, ShardedDenseRetriever
from rlrag.retrieval.dense.shards import Shards, ShardSource, shard_sources
from rlrag.retrieval.dense.vectors import VECTORS_FILE, open_vectors
from rlrag.retrieval.hybrid import RRF_K, HybridRetriever
from rlrag.retrieval.manifest import IndexKind, Manifest, digest
from rlrag.retrieval.plugin import PluginRetriever
from rlrag.retrieval.protocol import Retriever, check_num_hits
from rlrag.retrieval.role_directories import has_encoder_each
from rlrag.retrieval.words import WORDS_VERSION

if TYPE_CHECKING:
    from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder

OpenShards = Callable[[Sequence[ShardSource]], Shards]


@dataclass(frozen=True)
class RetrieverSet:
    """The retriever that ranks, those whose scores are features, and the vectors beneath.

    `passage_vectors` has shape (P, D), or (P, 0) where there is no encoder, or no passage.
    `manifest_hash` is equal exactly when corpus, indexes and search parameters are.
    """

    primary: Retriever
    components: Mapping[str, Retriever]
    encoder: Encoder | None
    passage_vectors: np.ndarray
    manifest_hash: str
    index_dirs: tuple[Path, ...] = field(default=(), kw_only=True)
    """What all this was read from; parts of vectors have indexes besides."""

    @property
    def score_names(self) -> tuple[str, ...]:
        """Columns of scores: the ranking first, then every component that is not the ranking."""
        primary = self.primary.name
        return (primary, *(name for name in self.components if name != primary))

    def vectors_of(self, brought: Sequence[Passage]) -> np.ndarray:
        """Vectors of passages that no corpus has, (X, D), or (X, 0) where there is no encoder."""
        if self.encoder is None or not brought:
            return np.zeros((len(brought), 0), dtype=np.float32)
        return self.encoder.encode([passage.contents for passage in brought])

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
    open_shards: OpenShards | None = None,
    shipped: Path | None = None,
) -> RetrieverSet:
    """Build or load everything that `config` asks for.

    `bm25` and `hybrid` have a BM25 component, the others have one with `bm25_scores`; a configured
    encoder always gives a dense one, since its vectors and scores are features of the selection
    policy. An `encoder` that is given takes the place of the one that `config.encoder` names, and
    a `vocabulary_encoder` that of `config.vocabulary_encoder`; its weights must not change as long
    as the retrievers are used. `open_shards` makes what searches the parts of the vectors where
    there are several; see `rlrag.shard_actors`. What lies in `shipped`, the indexes of a bundle, is
    taken from there.

    Raises:
        ConfigError: when the corpus has fewer passages than `num_candidates`, or too few vectors
            for the lists of an IVF-PQ index, or an encoder was given that nothing uses, or shards
            are wanted and nothing opens them.
        IndexMismatchError: when a directory on disk belongs to something else or is damaged.
    """
    if not plugins.is_own(config.kind):  # which may find what is in no corpus
        check_num_hits(config.num_candidates, len(corpus))
    places = _Places(cache_dir / "indexes", shipped)
    components: dict[str, Retriever] = {}
    manifests: list[Manifest] = []
    if config.kind in ("bm25", "hybrid") or config.bm25_scores:
        manifest = _manifest("bm25", corpus, parameters=_bm25_parameters(config))
        components["bm25"] = open_bm25(corpus, places.of(manifest), manifest)
        manifests.append(manifest)
    vectors_PD: np.ndarray = np.zeros((len(corpus), 0), dtype=np.float32)
    if config.encoder is not None:
        encoder = encoder or _configured_encoder(config, config.encoder, cache_dir)
        components["dense"], vectors_PD, found = _dense(
            corpus, config, config.encoder, encoder, places, open_shards
        )
        manifests.extend(found)
    elif encoder is not None:
        raise ConfigError("an encoder was given, but retrieval.encoder is unset; set it")
    if config.kind == "semi_parametric":
        components["semi_parametric"], manifest = _semi_parametric(
            corpus, config, cache_dir, places, vocabulary_encoder
        )
        manifests.append(manifest)
    elif vocabulary_encoder is not None:
        raise ConfigError(
            f"a vocabulary encoder was given, but retrieval.kind is {config.kind!r}; set it to "
            "semi_parametric"
        )
    if plugins.is_own(config.kind):
        components[config.kind] = PluginRetriever(corpus, config)
    return RetrieverSet(
        primary=_primary(config, components, len(corpus)),
        components=components,
        encoder=encoder,
        passage_vectors=vectors_PD,
        manifest_hash=digest(
            [
                [manifest.compared for manifest in manifests],
                _search_parameters(config, corpus),
                *_question_weights(encoder),
            ]
        ),
        index_dirs=tuple(place for place in map(places.of, manifests) if place.is_dir()),
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
    from rlrag.retrieval.vocabulary.encoder import VocabularyEncoder

    model_dir = resolve_model(config.vocabulary_encoder, cache_dir)
    encoder = VocabularyEncoder(
        model_dir,
        config.encoder_max_tokens,
        head=config.vocabulary_head,
        tied=not has_encoder_each(model_dir) if tied is None else tied,
    )
    return encoder.to(resolve_device("auto"))


def _dense(
    corpus: Corpus,
    config: RetrievalConfig,
    name: str,
    encoder: Encoder,
    places: _Places,
    open_shards: OpenShards | None,
) -> tuple[DenseRetriever, np.ndarray, list[Manifest]]:
    """What searches the vectors of the passages, these vectors, and what both were made from."""
    manifest = _manifest("vectors", corpus, name, encoder)
    if not corpus:  # what is brought is encoded when it is found
        nothing_PD = np.zeros((0, 0), dtype=np.float32)
        return DenseRetriever(encoder, nothing_PD, config), nothing_PD, [manifest]
    if isinstance(encoder, TextEncoder):
        cut_share(corpus, encoder.count_tokens, encoder.identity.max_tokens)
    vectors_dir = places.of(manifest)
    check_index_fits(config, len(corpus) // config.num_shards)  # before hours of encoding
    vectors_PD = open_vectors(corpus, encoder, vectors_dir, manifest)
    manifests = [manifest]
    index_manifest = None
    if config.index != "flat":
        parameters = _index_parameters(config, vectors_PD)
        index_manifest = _manifest(config.index, corpus, name, encoder, parameters)
        manifests.append(index_manifest)
    if config.num_shards > 1:
        sources = shard_sources(
            vectors_dir / VECTORS_FILE, len(corpus), config, places.cache, index_manifest
        )
        if open_shards is None:
            raise ConfigError(
                f"retrieval.num_shards is {config.num_shards}, but shards are searched by Ray "
                "actors, which this program does not use; set it to 1"
            )
        shards = open_shards(sources)
        return ShardedDenseRetriever(encoder, vectors_PD, config, shards), vectors_PD, manifests
    index = index_manifest and open_index(
        vectors_PD, config, places.of(index_manifest), index_manifest
    )
    return DenseRetriever(encoder, vectors_PD, config, index), vectors_PD, manifests


def _semi_parametric(
    corpus: Corpus,
    config: RetrievalConfig,
    cache_dir: Path,
    places: _Places,
    encoder: VocabularyEncoder | None,
) -> tuple[Retriever, Manifest]:
    from rlrag.retrieval.vocabulary.semi_parametric import (
        SemiParametricRetriever,
        open_vocabulary_vectors,
        vocabulary_manifest,
    )

    encoder = encoder or open_vocabulary_encoder(config, cache_dir)
    cut_share(corpus, encoder.vocabulary.count_tokens, encoder.max_tokens)
    manifest = vocabulary_manifest(corpus, encoder, config.vocabulary_encoder)
    passages = open_vocabulary_vectors(corpus, encoder, places.of(manifest), manifest)
    return SemiParametricRetriever(encoder, passages), manifest


def _configured_encoder(config: RetrievalConfig, name: str, cache_dir: Path) -> TextEncoder:
    model_dir = resolve_model(name, cache_dir)
    return TextEncoder(model_dir, config.encoder_dtype, config.encoder_max_tokens)


def _primary(
    config: RetrievalConfig, components: Mapping[str, Retriever], num_passages: int
) -> Retriever:
    if config.kind == "hybrid":
        return HybridRetriever(components["bm25"], components["dense"], num_passages)
    return components[config.kind]


@dataclass(frozen=True)
class _Places:
    """Where an index lies: among those of a bundle, or in the cache, where it is also built."""

    cache: Path
    shipped: Path | None

    def of(self, manifest: Manifest) -> Path:
        name = manifest.directory_name
        shipped = self.shipped and self.shipped / name
        return shipped if shipped and shipped.is_dir() else self.cache / name


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


def _bm25_parameters(config: RetrievalConfig) -> dict[str, float]:
    return {"k1": config.bm25_k1, "b": config.bm25_b, "words_version": WORDS_VERSION}


def _index_parameters(config: RetrievalConfig, vectors_PD: np.ndarray) -> dict[str, int]:
    if config.index == "hnsw":
        return {"links": HNSW_LINKS}
    num_passages, size = vectors_PD.shape
    return ivfpq_parameters(num_passages // config.num_shards, size)


def _question_weights(encoder: Encoder | None) -> tuple[str, ...]:
    """Of an encoder of questions alone, which the passages' vectors do not tell of."""
    own = encoder.question_weights_hash if isinstance(encoder, TextEncoder) else None
    return () if own is None else (own,)


def _search_parameters(config: RetrievalConfig, corpus: Corpus) -> dict[str, Any]:
    parameters: dict[str, Any] = {"kind": config.kind}
    if config.kind == "hybrid":
        parameters["rrf_k"] = RRF_K
    if plugins.is_own(config.kind):
        parameters["own"] = plugins.identity("retriever", config.kind, config.options)
        parameters["corpus"] = corpus.content_hash  # where no index tells of it
    if config.index != "flat" and config.num_shards > 1:
        parameters["num_shards"] = config.num_shards  # each has an approximate index of its own
    if config.encoder is not None and config.index == "hnsw":
        parameters["hnsw_search_depth"] = HNSW_SEARCH_DEPTH
    if config.encoder is not None and config.index == "ivfpq":
        parameters["ivf_probes"] = IVF_PROBES
    return parameters
