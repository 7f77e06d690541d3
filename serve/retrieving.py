"""Bundle versions and questions in; the candidates of each question out.

What two versions have in common, corpus, indexes and encoder, is opened once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlrag.bundle_files import read_bundle
from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import load_corpus
from rlrag.errors import OverloadedError, RequestError, RlragError
from rlrag.pipeline import retrievers_of
from rlrag.records import Passage
from rlrag.retrieval.build import RetrieverSet
from rlrag.retrieval.tables import retrieve
from rlrag.retrieval.tuned import tuned_retrieval
from serve.records import Filters, Retrieved

_NO_FILTERS = Filters()
_FIRST_DEPTH = 4  # times the candidates asked for, when filters leave some out


@dataclass(frozen=True)
class _Shelf:
    """An opened corpus with its retrievers."""

    corpus: Corpus
    retrievers: RetrieverSet


@dataclass(frozen=True)
class _Loaded:
    shelf_key: str
    shelf: _Shelf
    num_candidates: int


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
    """

    def __init__(self, corpus: str | None = None) -> None:
        self._corpus = corpus
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
            config = _retrieval_of(files.config, files.retriever_dir, self._corpus)
            key = f"{config.data.model_dump_json()}\n{config.retrieval.model_dump_json()}"
            shelf = next((v.shelf for v in self._loaded.values() if v.shelf_key == key), None)
            if shelf is None:
                corpus = load_corpus(
                    config.data.corpus, config.cache_path, config.data.passage_words
                )
                retrievers = retrievers_of(
                    corpus, config.retrieval, config.cache_path, files.index_dir
                )
                shelf = _Shelf(corpus, retrievers)
                _search(shelf, ["warm up"], 1)  # encoders load when they are first asked
            loaded = _Loaded(key, shelf, config.retrieval.num_candidates)
            self._loaded = {**self._loaded, version: loaded}

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
                found[place] = _filtered(loaded.shelf, ask, wanted)
        for wanted, places in together.items():
            texts = [asks[place].question for place in places]
            for place, retrieved in zip(places, _search(loaded.shelf, texts, wanted), strict=True):
                found[place] = retrieved
        return [found[place] for place in range(len(asks))]


def _retrieval_of(config: RunConfig, retriever_dir: Path | None, corpus: str | None) -> RunConfig:
    """The bundle's configuration with its tuned encoder and the service's corpus."""
    if retriever_dir is not None:
        tuned = tuned_retrieval(config.retrieval, retriever_dir)
        config = config.model_copy(update={"retrieval": tuned})
    if corpus is not None:
        data = config.data.model_copy(update={"corpus": corpus})
        config = config.model_copy(update={"data": data})
    return config


def _impossible(wanted: int, loaded: _Loaded) -> RequestError | None:
    most = min(loaded.num_candidates, len(loaded.shelf.corpus))
    if 1 <= wanted <= most:
        return None
    return RequestError(
        f"num_candidates is {wanted}; this bundle was trained to choose among "
        f"{loaded.num_candidates} candidates, so give a number from 1 to {most}"
    )


def _search(shelf: _Shelf, questions: Sequence[str], wanted: int) -> list[Retrieved]:
    rows_BN, scores_BNC, question_vectors_BD = retrieve(questions, shelf.retrievers, wanted)
    return [
        _retrieved(shelf, rows_BN[b], scores_BNC[b], question_vectors_BD[b])
        for b in range(len(questions))
    ]


def _filtered(shelf: _Shelf, ask: Ask, wanted: int) -> Retrieved | RlragError:
    """The best passages that pass, found by searching deeper until there are enough."""
    num_passages = len(shelf.corpus)
    depth = min(_FIRST_DEPTH * wanted, num_passages)
    while True:
        rows_BN, scores_BNC, vectors_BD = retrieve([ask.question], shelf.retrievers, depth)
        kept = [
            place
            for place, row in enumerate(rows_BN[0].tolist())
            if _passes(shelf.corpus[row], ask.filters)
        ]
        if len(kept) >= wanted:
            kept = kept[:wanted]
            return _retrieved(shelf, rows_BN[0][kept], scores_BNC[0][kept], vectors_BD[0])
        if depth == num_passages:
            return RequestError(
                f"the filters leave {len(kept)} of {num_passages:,} passages, but num_candidates "
                f"is {wanted}; widen the filters or ask for fewer candidates"
            )
        depth = min(_FIRST_DEPTH * depth, num_passages)


def _passes(passage: Passage, filters: Filters) -> bool:
    if filters.ids and passage.id not in filters.ids:
        return False
    if passage.id in filters.exclude_ids:
        return False
    return filters.title_contains.casefold() in passage.title.casefold()


def _retrieved(
    shelf: _Shelf, rows_N: np.ndarray, scores_NC: np.ndarray, question_vector_D: np.ndarray
) -> Retrieved:
    return Retrieved(
        passages=tuple(shelf.corpus[int(row)] for row in rows_N),
        scores_NC=np.asarray(scores_NC, dtype=np.float32),
        question_vector_D=np.asarray(question_vector_D, dtype=np.float32),
        passage_vectors_ND=np.asarray(shelf.retrievers.passage_vectors[rows_N], dtype=np.float32),
    )
