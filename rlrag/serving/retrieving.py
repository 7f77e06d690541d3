"""Retrieval in the service: corpora and indexes of the loaded bundle versions.

What two versions have in common, corpus, indexes and encoder, is opened once
(`rlrag.serving.libraries`).

Shape letters: N candidates, C retriever scores, D vector length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlrag.bundle_files import read_bundle
from rlrag.data.corpus import Corpus
from rlrag.data.load import corpus_stamp
from rlrag.errors import DataError, OverloadedError, RequestError, RlragError
from rlrag.pipeline import Library
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.plugin import FewFoundError
from rlrag.serving.libraries import OpenedLibrary, is_own, open_shared
from rlrag.serving.records import Filters, Retrieved
from rlrag.serving.versions.registry import check_version

_NO_FILTERS = Filters()
_FIRST_DEPTH = 4  # times the candidates asked for, when filters leave some out


@dataclass(frozen=True)
class _Loaded:
    opened: OpenedLibrary
    num_candidates: int

    @property
    def library(self) -> Library:
        """What is searched."""
        return self.opened.library


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
            others = [loaded.opened for loaded in self._loaded.values()]
            opened = open_shared(files, self._corpus, others)
            num_candidates = files.config.retrieval.num_candidates
            self._loaded = {**self._loaded, version: _Loaded(opened, num_candidates)}

    def changed_corpus(self, version: str) -> str | None:
        """The corpus of a version, where its files have changed since they were read, or are gone.

        What was read goes on being searched.
        """
        loaded = self._loaded.get(version)
        if loaded is None:
            return None
        corpus = loaded.opened.corpus
        try:
            changed = corpus_stamp(corpus) != loaded.opened.corpus_stamp
        except (DataError, OSError):
            changed = True
        return corpus if changed else None

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
                kept = _filtered(loaded.library, ask, wanted, self._max_filtered)
                if isinstance(kept, Retrieved):
                    kept = replace(kept, filtered=True)
                found[place] = kept
        for wanted, places in together.items():
            texts = [asks[place].question for place in places]
            table = loaded.library.search(texts, wanted)
            for row, place in enumerate(places):
                found[place] = _retrieved(table, row, slice(None))
        return [found[place] for place in range(len(asks))]


def _impossible(wanted: int, loaded: _Loaded) -> RequestError | None:
    most = loaded.num_candidates
    if not is_own(loaded.library.retrievers):
        most = min(most, len(loaded.library.corpus))
    if 1 <= wanted <= most:
        return None
    return RequestError.about(
        "num_candidates",
        f"is {wanted}; this bundle was trained to choose among "
        f"{loaded.num_candidates} candidates, so give a number from 1 to {most}",
    )


def _filtered(library: Library, ask: Ask, wanted: int, most: int) -> Retrieved | RlragError:
    """The best passages that pass, of those that are named or else of the best `most`."""
    if ask.filters.ids:
        return _best_named(library, ask, wanted)
    return _searched_deeper(library, ask, wanted, most)


def _best_named(library: Library, ask: Ask, wanted: int) -> Retrieved | RlragError:
    """The best of the passages that `ids` names, whose rows are looked up.

    Fusion scores alike what neither of its rankings reaches; the other scores then decide.
    """
    if not library.corpus:
        return RequestError.about(
            "filters.ids",
            "names passages of a corpus, and this bundle has none; leave it out",
        )
    passes = _row_filter(library.corpus, ask.filters)
    named = sorted(filter(passes, _rows_of(library.corpus, ask.filters.ids)))
    if len(named) < wanted:
        return _too_few(len(named), f"{len(library.corpus):,} passages", wanted)
    rows_N = np.array(named, dtype=np.int64)
    retrievers = library.retrievers
    others = [retrievers.components[name] for name in retrievers.score_names[1:]]
    columns = [one.scores([ask.question], rows_N[None])[0] for one in (retrievers.primary, *others)]
    best = np.lexsort((rows_N, *(-column for column in reversed(columns))))[:wanted]
    rows_N = rows_N[best]
    return Retrieved(
        passages=tuple(library.corpus[int(row)] for row in rows_N),
        scores_NC=np.stack(columns, axis=-1)[best],
        question_vector_D=retrievers.question_vectors([ask.question])[0],
        passage_vectors_ND=np.asarray(retrievers.passage_vectors[rows_N], dtype=np.float32),
    )


def _searched_deeper(library: Library, ask: Ask, wanted: int, most: int) -> Retrieved | RlragError:
    """The best passages that pass, found by searching deeper until there are enough.

    How many passages a retriever of somebody's own can find shows when it finds fewer.
    """
    num_passages = max(len(library.corpus), wanted) if library.corpus else None
    most = min(most, num_passages or most)
    depth = min(wanted if is_own(library.retrievers) else _FIRST_DEPTH * wanted, most)
    kept: list[int] = []
    while True:
        try:
            table = library.search([ask.question], depth)
        except FewFoundError:
            if depth <= wanted:
                raise
            return _too_few(len(kept), "the passages that the retriever finds", wanted)
        passes = _row_filter(table.corpus, ask.filters)
        kept = [place for place, row in enumerate(table.rows_QN[0].tolist()) if passes(row)]
        if len(kept) >= wanted:
            return _retrieved(table, 0, kept[:wanted])
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


def _retrieved(table: CandidateTable, question_row: int, places: list[int] | slice) -> Retrieved:
    """Some of the candidates of one question."""
    passages = np.empty(table.num_candidates, dtype=object)
    passages[:] = table.passages(question_row)
    return Retrieved(
        passages=tuple(passages[places]),
        scores_NC=np.asarray(table.scores_QNC[question_row][places], dtype=np.float32),
        question_vector_D=np.asarray(table.question_vectors_QD[question_row], dtype=np.float32),
        passage_vectors_ND=table.passage_vectors(np.array([question_row]))[0][places],
    )
