"""Retrieval in the service: corpora and indexes of all loaded bundle versions.

What two versions have in common, corpus, indexes and encoder, is opened once. Whether they have it
in common is decided by content, since a path may hold something else by the time of the second.

Shape letters: N candidates, C retriever scores, D vector length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlrag.bundle_files import read_bundle
from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import corpus_stamp, load_corpus
from rlrag.errors import DataError, OverloadedError, RequestError, RlragError
from rlrag.models.directories import resolve_model, weights_hash
from rlrag.pipeline import Library, retrievers_of
from rlrag.retrieval.role_directories import ROLES, role_directory
from rlrag.retrieval.tables import retrieve, warn_of_unmatched
from rlrag.serving.records import Filters, Retrieved
from rlrag.serving.versions.registry import check_version

_NO_FILTERS = Filters()
_FIRST_DEPTH = 4  # times the candidates asked for, when filters leave some out


@dataclass(frozen=True)
class _Loaded:
    key: str
    library: Library
    num_candidates: int
    corpus: str
    corpus_stamp: str | None


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to retrieve for."""

    question: str
    num_candidates: int | None = None
    filters: Filters = _NO_FILTERS


class RetrieverPart:
    """The retrievers of every version that is loaded.

    `load` and `drop` may run in other threads than `retrieve`.

    Args:
        corpus: Takes the place of the corpus that a bundle's configuration names; unset keeps it.
        max_filtered: Passages, best first, that a question with filters looks through.
        allow_code: Retrievers `module:name` that bundles may have imported.
    """

    def __init__(
        self,
        corpus: str | None = None,
        max_filtered: int = 5_000,
        allow_code: Collection[str] = (),
    ) -> None:
        self._allow_code = allow_code
        self._corpus = corpus
        self._max_filtered = max_filtered
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()

    def loaded(self) -> tuple[str, ...]:
        """Versions that can be asked."""
        return tuple(self._loaded)

    def load(self, version: str, directory: Path) -> None:
        """Open what a bundle retrieves with.

        Raises:
            RlragError: what is wrong with the bundle, its corpus or its index.
        """
        with self._loading:
            files = read_bundle(directory)
            check_version(version, files.version, directory)
            files.check_code("retrieval.kind", self._allow_code)
            config = files.searching_config
            if self._corpus is not None:
                data = config.data.model_copy(update={"corpus": self._corpus})
                config = config.model_copy(update={"data": data})
            stamp = corpus_stamp(config.data.corpus)
            corpus = load_corpus(config.data.corpus, config.cache_path, config.data.passage_words)
            key = _library_key(config, corpus)
            library = next((v.library for v in self._loaded.values() if v.key == key), None)
            if library is None:
                retrievers = retrievers_of(
                    corpus, config.retrieval, config.cache_path, files.index_dir
                )
                retrieve(["warm up"], retrievers, 1)  # encoders load when they are first asked
                library = Library(corpus, retrievers, files.index_dir)
            num_candidates = config.retrieval.num_candidates
            loaded = _Loaded(key, library, num_candidates, config.data.corpus, stamp)
            self._loaded = {**self._loaded, version: loaded}

    def changed_corpus(self, version: str) -> str | None:
        """The corpus of a version, where its files have changed since they were read, or are gone.

        What was read goes on being searched.
        """
        loaded = self._loaded.get(version)
        if loaded is None:
            return None
        try:
            changed = corpus_stamp(loaded.corpus) != loaded.corpus_stamp
        except (DataError, OSError):
            changed = True
        return loaded.corpus if changed else None

    def drop(self, version: str) -> None:
        """Forget a version; what no other one shares is freed."""
        with self._loading:
            self._loaded = {v: loaded for v, loaded in self._loaded.items() if v != version}

    def retrieve(self, version: str, asks: Sequence[Ask]) -> list[Retrieved | RlragError]:
        """Candidates of each question, or what is wrong with its request.

        Questions that want equally many candidates and set no filters are searched together.

        Raises:
            OverloadedError: when the version is not loaded here yet.
        """
        loaded = self._loaded.get(version)
        if loaded is None:
            raise OverloadedError(f"version {version} is being loaded here; try again")
        found: dict[int, Retrieved | RlragError] = {}
        together: dict[int, list[int]] = {}
        for place, ask in enumerate(asks):
            wanted = loaded.num_candidates
            if ask.num_candidates is not None:
                wanted = ask.num_candidates
            problem = _impossible(wanted, loaded)
            if problem is not None:
                found[place] = problem
            elif ask.filters == _NO_FILTERS:
                together.setdefault(wanted, []).append(place)
            else:
                found[place] = _filtered(loaded.library, ask, wanted, self._max_filtered)
        for wanted, places in together.items():
            texts = [asks[place].question for place in places]
            table = loaded.library.search(texts, wanted)
            for row, place in enumerate(places):
                found[place] = _retrieved(
                    loaded.library,
                    table.rows_QN[row],
                    table.scores_QNC[row],
                    table.question_vectors_QD[row],
                )
        return [found[place] for place in range(len(asks))]


def _library_key(config: RunConfig, corpus: Corpus) -> str:
    """Equal for versions that search the same passages alike, with the same weights."""
    retrieval = config.retrieval
    names = [retrieval.encoder] if retrieval.encoder is not None else []
    if retrieval.kind == "semi_parametric":
        names.append(retrieval.vocabulary_encoder)
    parameters = retrieval.model_dump_json(exclude={"encoder", "vocabulary_encoder"})
    weights = [_encoder_weights(resolve_model(name, config.cache_path)) for name in names]
    return repr((corpus.content_hash, parameters, weights))


def _encoder_weights(model_dir: Path) -> tuple[str, ...]:
    """Of the encoder of questions and that of passages."""
    return tuple(weights_hash(role_directory(model_dir, role)) for role in ROLES)


def _impossible(wanted: int, loaded: _Loaded) -> RequestError | None:
    most = min(loaded.num_candidates, len(loaded.library.corpus))
    if 1 <= wanted <= most:
        return None
    return RequestError.about(
        "num_candidates",
        f"is {wanted}; this bundle was trained to choose among "
        f"{loaded.num_candidates} candidates, so give a number from 1 to {most}",
    )


def _filtered(library: Library, ask: Ask, wanted: int, most: int) -> Retrieved | RlragError:
    """The best passages that pass, of those that are named or else of the best `most`."""
    passes = _row_filter(library.corpus, ask.filters)
    if ask.filters.ids:
        return _best_named(library, ask, wanted, passes)
    return _searched_deeper(library, ask, wanted, most, passes)


def _best_named(
    library: Library, ask: Ask, wanted: int, passes: Callable[[int], bool]
) -> Retrieved | RlragError:
    """The best of the passages that `ids` names, whose rows are looked up.

    Fusion scores alike what neither of its rankings reaches; the other scores then decide.
    """
    named = sorted(filter(passes, _rows_of(library.corpus, ask.filters.ids)))
    if len(named) < wanted:
        return _too_few(len(named), f"{len(library.corpus):,} passages", wanted)
    rows_N = np.array(named, dtype=np.int64)
    retrievers = library.retrievers
    others = [retrievers.components[name] for name in retrievers.score_names[1:]]
    columns = [one.scores([ask.question], rows_N[None])[0] for one in (retrievers.primary, *others)]
    best = np.lexsort((rows_N, *(-column for column in reversed(columns))))[:wanted]
    vectors_BD = retrievers.question_vectors([ask.question])
    return _retrieved(library, rows_N[best], np.stack(columns, axis=-1)[best], vectors_BD[0])


def _searched_deeper(
    library: Library, ask: Ask, wanted: int, most: int, passes: Callable[[int], bool]
) -> Retrieved | RlragError:
    """The best passages that pass, found by searching deeper until there are enough."""
    num_passages = len(library.corpus)
    most = min(most, num_passages)
    depth = min(_FIRST_DEPTH * wanted, most)
    while True:
        rows_BN, scores_BNC, vectors_BD = retrieve([ask.question], library.retrievers, depth)
        kept = [place for place, row in enumerate(rows_BN[0].tolist()) if passes(row)]
        if len(kept) >= wanted:
            warn_of_unmatched(scores_BNC, library.retrievers.primary.name)
            kept = kept[:wanted]
            return _retrieved(library, rows_BN[0][kept], scores_BNC[0][kept], vectors_BD[0])
        if depth == num_passages:
            return _too_few(len(kept), f"{num_passages:,} passages", wanted)
        if depth == most:
            searched = f"the first {most:,} passages, the bound of limits.max_filtered"
            return _too_few(len(kept), searched, wanted)
        depth = min(_FIRST_DEPTH * depth, most)


def _row_filter(corpus: Corpus, filters: Filters) -> Callable[[int], bool]:
    """Whether a row passes `exclude_ids` and `title_contains`; a passage is read for the latter."""
    excluded = _rows_of(corpus, filters.exclude_ids)
    part = filters.title_contains.casefold()
    return lambda row: row not in excluded and (not part or part in corpus[row].title.casefold())


def _rows_of(corpus: Corpus, ids: Sequence[str]) -> set[int]:
    """Rows of those ids that the corpus has."""
    return {row for one in ids if (row := corpus.row_of(one)) is not None}


def _too_few(num_left: int, searched: str, wanted: int) -> RequestError:
    return RequestError(
        f"the filters leave {num_left} of {searched}, but num_candidates is {wanted}; widen the "
        "filters or ask for fewer candidates"
    )


def _retrieved(
    library: Library, rows_N: np.ndarray, scores_NC: np.ndarray, question_vector_D: np.ndarray
) -> Retrieved:
    return Retrieved(
        passages=tuple(library.corpus[int(row)] for row in rows_N),
        scores_NC=np.asarray(scores_NC, dtype=np.float32),
        question_vector_D=np.asarray(question_vector_D, dtype=np.float32),
        passage_vectors_ND=np.asarray(library.retrievers.passage_vectors[rows_N], dtype=np.float32),
    )
