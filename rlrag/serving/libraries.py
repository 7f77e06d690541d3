"""Libraries of bundle versions: the corpus, retrievers and passage graph that a part searches.

What two versions have in common is opened once. Whether they have it in common is decided by
content, since a path may hold something else by the time of the second. Retriever and selector open
theirs by the same rules, so that both search the same passages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlrag.bundle_files import BundleFiles
from rlrag.config import EnvironmentConfig, RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import corpus_of, corpus_stamp
from rlrag.models.directories import resolve_model, weights_hash
from rlrag.pipeline import Library, open_library
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.plugin import PluginRetriever
from rlrag.retrieval.role_directories import ROLES, role_directory
from rlrag.retrieval.tables import retrieve


@dataclass(frozen=True)
class OpenedLibrary:
    """A library with what it was opened from; equal `key`s stand for equal contents."""

    key: str
    library: Library
    corpus: str | None
    corpus_stamp: str | None


def open_shared(
    files: BundleFiles,
    corpus: str | None,
    opened: Iterable[OpenedLibrary],
    looks_further: bool = False,
) -> OpenedLibrary:
    """The library of a bundle, which is that of another version where the contents are equal.

    Args:
        files: The bundle, whose code has been allowed.
        corpus: Takes the place of the corpus that its configuration names; unset keeps it.
        opened: The libraries of the other versions.
        looks_further: Whether episodes look further in it, along the bundle's graph.

    Raises:
        RlragError: what is wrong with the corpus, its index or its graph.
    """
    config = files.searching_config
    if corpus is not None:
        data = config.data.model_copy(update={"corpus": corpus})
        config = config.model_copy(update={"data": data})
    if not looks_further:
        config = config.model_copy(update={"environment": EnvironmentConfig()})
    stamp = corpus_stamp(config.data.corpus)
    passages = corpus_of(config)
    key = _library_key(config, passages)
    library = next((other.library for other in opened if other.key == key), None)
    if library is None:
        library = open_library(config, files.index_dir, passages)
        _warm_up(library.retrievers)
    return OpenedLibrary(key, library, config.data.corpus, stamp)


def is_own(retrievers: RetrieverSet) -> bool:
    """Whether they are somebody's own, who may find what is in no corpus."""
    return isinstance(retrievers.primary, PluginRetriever)


def _warm_up(retrievers: RetrieverSet) -> None:
    """Load the encoders, which are otherwise loaded when they are first asked.

    A retriever of somebody's own is not asked: it may find nothing for what nobody would ask.
    """
    if is_own(retrievers):
        retrievers.question_vectors(["warm up"])
    else:
        retrieve(["warm up"], retrievers, 1)


def _library_key(config: RunConfig, corpus: Corpus) -> str:
    """Equal for versions that search the same passages alike, with the same weights."""
    retrieval, environment = config.retrieval, config.environment
    names = [retrieval.encoder] if retrieval.encoder is not None else []
    if retrieval.kind == "semi_parametric":
        names.append(retrieval.vocabulary_encoder)
    parameters = retrieval.model_dump_json(exclude={"encoder", "vocabulary_encoder"})
    weights = [_encoder_weights(resolve_model(name, config.cache_path)) for name in names]
    graph = (
        environment.looks_further,
        bool(environment.hops.edges),
        environment.hops.edge_sources,
    )
    return repr((corpus.content_hash, parameters, weights, graph))


def _encoder_weights(model_dir: Path) -> tuple[str, ...]:
    """Of the encoder of questions and that of passages."""
    return tuple(weights_hash(role_directory(model_dir, role)) for role in ROLES)
